"""Add point tracks to a movie clip in Blender.

In Blender: open the video in the Movie Clip Editor, open this file in the Text Editor, and choose Run Script. Or, with
the video beside this file: blender --background --python THIS_FILE -- RESULT.blend

A track is enabled where the point is visible, and disabled where it is occluded and outside of the tracked frames.
"""

import os
import sys

VIDEO = ""
SIZE = (0, 0)
FRAMES = []
TRACKS = []


def add_tracks(clip) -> None:
    """Add every track of TRACKS to the movie clip; a marker in every frame of FRAMES, whose first is 1."""
    for name, places, visible in TRACKS:
        track = clip.tracking.tracks.new(name=name, frame=FRAMES[0])
        for frame, place, enabled in zip(FRAMES, places, visible, strict=True):
            track.markers.insert_frame(frame, co=place).mute = not enabled
        track.markers.insert_frame(FRAMES[-1] + 1, co=places[-1]).mute = True
        if FRAMES[0] > 1:
            track.markers.insert_frame(FRAMES[0] - 1, co=places[0]).mute = True


def find_clip():
    """The movie clip VIDEO of the open file, else the only clip that has its size, else the video beside this file."""
    import bpy

    clips = list(bpy.data.movieclips)
    named = [clip for clip in clips if VIDEO and os.path.basename(bpy.path.abspath(clip.filepath)) == VIDEO]
    fitting = named or [clip for clip in clips if tuple(clip.size) == SIZE]
    if len(fitting) == 1 or named:
        return fitting[0]
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), VIDEO)
    if not VIDEO or not os.path.isfile(beside):
        raise SystemExit(f"open the video {VIDEO} of {SIZE[0]}x{SIZE[1]} pixels in the Movie Clip Editor first")
    return bpy.data.movieclips.load(beside)


def main() -> None:
    import bpy

    clip = find_clip()
    if tuple(clip.size) != SIZE:
        raise SystemExit(f"{clip.name} has {clip.size[0]}x{clip.size[1]} pixels, the tracks are for "
                         f"{SIZE[0]}x{SIZE[1]}")
    add_tracks(clip)
    if bpy.context.scene.active_clip is None:
        bpy.context.scene.active_clip = clip  # Blender does not save a clip that nothing uses
    print(f"{len(TRACKS)} tracks added to {clip.name}")
    if "--" in sys.argv:
        bpy.ops.wm.save_as_mainfile(filepath=os.path.abspath(sys.argv[sys.argv.index("--") + 1]))


if __name__ == "__main__":
    main()
