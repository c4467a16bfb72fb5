"""Tracks for compositing programs: Nuke, After Effects, Blender.

Notation
    N, T     tracks, frames
    H, W     height and width of the frames
    numbers  frame number of each frame (T,), from 0 on
    (x, y)   pixels, x right, y down; pixel centers are at integers here and at half-integers in these programs
"""

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import atomic_folder, write_text
from loaders.sequence import VideoSequence
from loaders.track_files import PointTracks

log = logging.getLogger(__name__)
FRAME_RATE = 24.0  # frames per second where the source's is not known
BLENDER_SCRIPT = Path(__file__).with_name("blender_script.py")
BLENDER_DATA = '''VIDEO = ""
SIZE = (0, 0)
FRAMES = []
TRACKS = []
'''  # the lines of the script that are replaced


def write_nuke(path: Path, tracks: PointTracks, numbers: np.ndarray, sequence: VideoSequence | None = None) -> None:
    """Write a folder with track_00000.txt and so on: lines `frame x y`, as Nuke's Tracker reads them with File > Import
    Time+value Ascii; lines that begin with # are comments (Foundry, Nuke online help, "Importing Tracking Data",
    learn.foundry.com/nuke/10.5/content/comp_environment/tracking_stabilizing/importing_trackdata.html).

    Nuke's origin is the lower left corner of the frame. All frames are written; a comment lists the frames where the
    track is occluded."""
    H = tracks.frame_size[0]

    def text(n: int) -> str:
        t, y, x = tracks.query_points[n]
        lines = [f"# track {n}, query point: frame {numbers[int(t)]}, x {x + 0.5:.3f}, y {H - y - 0.5:.3f}",
                 f"# occluded in frames: {_ranges(numbers, ~tracks.visible[n]) or 'none'}"]
        lines += [f"{number} {x + 0.5:.4f} {H - y - 0.5:.4f}"
                  for number, (x, y) in zip(numbers, tracks.tracks[n], strict=True)]
        return "\n".join(lines) + "\n"

    _write_folder(path, map(text, range(len(tracks.tracks))))


def write_after_effects(path: Path, tracks: PointTracks, numbers: np.ndarray,
                        sequence: VideoSequence | None = None) -> None:
    """Write a folder with track_00000.txt and so on: the text that After Effects copies and pastes as keyframes of a
    layer's position. Tabs separate the columns; the lines of the head and of the keyframes are indented by a tab.

    The origin is the upper left corner of the frame. Frames where a track is occluded have no keyframe. After Effects
    puts the first keyframe of what is pasted at the current time."""
    H, W = tracks.frame_size
    rate = tracks.source.frame_rate if tracks.source else None
    if rate is None:
        log.info("the frame rate of the source is not known: %s has %g frames per second", path, FRAME_RATE)
    head = ["Adobe After Effects 8.0 Keyframe Data", "", f"\tUnits Per Second\t{rate or FRAME_RATE:.10g}",
            f"\tSource Width\t{W}", f"\tSource Height\t{H}", "\tSource Pixel Aspect Ratio\t1",
            "\tComp Pixel Aspect Ratio\t1", "", "Transform\tPosition", "\tFrame\tX pixels\tY pixels\tZ pixels\t"]

    def text(n: int) -> str:
        keys = [f"\t{numbers[t]}\t{tracks.tracks[n, t, 0] + 0.5:.4f}\t{tracks.tracks[n, t, 1] + 0.5:.4f}\t0\t"
                for t in np.flatnonzero(tracks.visible[n])]
        return "\r\n".join([*head, *keys, "", "", "End of Keyframe Data", ""])

    _write_folder(path, map(text, range(len(tracks.tracks))))


def write_blender(path: Path, tracks: PointTracks, numbers: np.ndarray, sequence: VideoSequence | None = None) -> None:
    """Write loaders/blender_script.py with the tracks in it.

    Positions are shares of width and height from the lower left corner of the frame; the first frame of a movie clip
    has the number 1 (Blender Python API, `MovieTrackingMarker`)."""
    H, W = tracks.frame_size
    script = BLENDER_SCRIPT.read_text()
    assert BLENDER_DATA in script
    rows = []
    for n, (points, visible) in enumerate(zip(tracks.tracks, tracks.visible, strict=True)):
        places = ", ".join(f"({(x + 0.5) / W:.7f}, {1 - (y + 0.5) / H:.7f})" for x, y in points.astype(np.float64))
        rows.append(f'    ("track_{n:05d}", [{places}], {visible.astype(int).tolist()}),\n')
    name = tracks.source.name if tracks.source else ""
    data = (f"VIDEO = {name!a}\nSIZE = ({W}, {H})\nFRAMES = {[int(number) + 1 for number in numbers]}\n"
            f"TRACKS = [\n{''.join(rows)}]\n")
    write_text(path, script.replace(BLENDER_DATA, data))


def _write_folder(path: Path, texts: Iterable[str]) -> None:
    """Write one file per track. UserError if `path` is something else than a folder of exported tracks."""
    if path.exists() and (path.is_file() or any(not file.match("track_*.txt") for file in path.iterdir())):
        raise UserError(f"{path} is not a folder of exported tracks: remove it, or choose another name")
    with atomic_folder(path) as folder:
        for n, text in enumerate(texts):
            (folder / f"track_{n:05d}.txt").write_text(text, newline="")


def _ranges(numbers: np.ndarray, chosen: np.ndarray) -> str:
    """Text for the frame numbers of the chosen frames `(T,)` bool: `3-5, 9` for 3, 4, 5, 9."""
    frames = numbers[chosen]
    runs = np.split(frames, np.flatnonzero(np.diff(frames) > 1) + 1) if len(frames) else []
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
