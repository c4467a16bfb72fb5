"""Tracks for After Effects and Blender, read back as these programs read them. Nuke: tests/test_exports.py."""

import ast
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import UserError
from loaders.source_frames import SourceFrames
from loaders.track_export import export_tracks
from loaders.track_files import PointTracks
from loaders.video import write_video

T, SIZE, SOURCE = 7, (48, 64), (96, 128)
NUMBERS = np.arange(3, 16, 2)
CLIP = SourceFrames(SIZE, SOURCE, NUMBERS, 30_000 / 1001, "the clip's é.mp4")


@pytest.fixture
def tracks():
    """Two tracks; the second one is hidden in frames 0, 3 and 6 of the sequence: 3, 9 and 15 of the source."""
    points = np.stack([np.stack([x + 2 * np.arange(T), 20 - np.arange(T)], axis=-1) for x in (10, 30)])
    visible = np.ones((2, T), bool)
    visible[1, ::3] = False
    queries = np.array([[0, 20, 10], [1, 19, 32]], np.float32)
    return PointTracks(points.astype(np.float32), visible, queries, SIZE, source=CLIP)


def corner_positions(tracks):
    """(x, y) `(N, T, 2)` in the source with the origin at the frame's upper left corner, from the definition: frame
    pixel x covers the interval from 2 x to 2 x + 2."""
    return (2 * tracks.tracks.astype(float) + 2 * (tracks.tracks + 1.0)) / 2


def after_effects_keyframes(text):
    """Parse keyframe data as After Effects puts it on the clipboard.

    The first line names the format. The head follows: lines of a tab, a name, a tab, a value. Then one block for each
    property: a line `group TAB property`, a line of the column names that begins with a tab and `Frame`, and one line
    for each keyframe that begins with a tab. Empty lines separate the blocks, the last line ends the data.
    Returns the head and, by property, the columns and rows of numbers."""
    lines = text.split("\r\n")
    assert lines[0] == "Adobe After Effects 8.0 Keyframe Data" and lines[1] == ""
    end = lines.index("End of Keyframe Data")
    assert not any(lines[end + 1:])
    blocks = [block.splitlines() for block in re.split(r"\n\n+", "\n".join(lines[2:end]).rstrip("\n"))]
    head = {}
    for line in blocks[0]:
        empty, name, value = line.split("\t")
        assert empty == ""
        head[name] = float(value)
    properties = {}
    for title, columns, *keys in blocks[1:]:
        names = columns.split("\t")
        assert names[:2] == ["", "Frame"] and names[-1] == ""
        rows = [key.split("\t") for key in keys]
        assert all(row[0] == row[-1] == "" and len(row) == len(names) for row in rows)
        properties[tuple(title.split("\t"))] = names[1:-1], np.array([row[1:-1] for row in rows], float)
    return head, properties


def test_after_effects_reads_the_source(tracks, tmp_path):
    for _ in range(2):  # again over its own files
        export_tracks(tmp_path / "t.ae", tracks)
    files = sorted((tmp_path / "t.ae").iterdir())
    assert [file.name for file in files] == ["track_00000.txt", "track_00001.txt"]
    for n, file in enumerate(files):
        head, properties = after_effects_keyframes(file.read_bytes().decode("ascii"))
        assert head == {"Units Per Second": pytest.approx(30_000 / 1001, abs=1e-6), "Source Width": 128,
                        "Source Height": 96, "Source Pixel Aspect Ratio": 1, "Comp Pixel Aspect Ratio": 1}
        assert list(properties) == [("Transform", "Position")]
        names, keys = properties["Transform", "Position"]
        assert names == ["Frame", "X pixels", "Y pixels", "Z pixels"]
        seen = tracks.visible[n]
        assert keys[:, 0].tolist() == NUMBERS[seen].tolist()  # no keyframe where the point is hidden
        assert np.allclose(keys[:, 1:3], corner_positions(tracks)[n, seen]) and not keys[:, 3].any()


def test_after_effects_in_the_sequences_frames(tracks, tmp_path, caplog):
    caplog.set_level("INFO")
    export_tracks(tmp_path / "t.ae", tracks, None, "frames")
    head, properties = after_effects_keyframes((tmp_path / "t.ae" / "track_00000.txt").read_bytes().decode())
    assert (head["Source Width"], head["Source Height"]) == (64, 48)
    keys = properties["Transform", "Position"][1]
    assert keys[:, 0].tolist() == list(range(T)) and np.allclose(keys[:, 1:3], tracks.tracks[0] + 0.5)
    assert not caplog.messages
    export_tracks(tmp_path / "t.ae", PointTracks(tracks.tracks, tracks.visible, tracks.query_points, SIZE))
    head, _ = after_effects_keyframes((tmp_path / "t.ae" / "track_00000.txt").read_bytes().decode())
    assert head["Units Per Second"] == 24 and "the frame rate of the source is not known" in caplog.text


def test_a_track_that_is_never_visible_has_no_keyframe(tracks, tmp_path):
    tracks.visible[0] = False
    export_tracks(tmp_path / "t.ae", tracks)
    _, properties = after_effects_keyframes((tmp_path / "t.ae" / "track_00000.txt").read_bytes().decode())
    assert len(properties["Transform", "Position"][1]) == 0


@pytest.mark.parametrize("ending", [".ae", ".nuke"])
def test_a_folder_of_something_else_stays(ending, tracks, tmp_path):
    (tmp_path / f"t{ending}").mkdir()
    (tmp_path / f"t{ending}" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a folder of exported tracks"):
        export_tracks(tmp_path / f"t{ending}", tracks)


class Markers(dict):
    """MovieTrackingMarkers of Blender: markers by frame number; a new one replaces that of the same frame."""

    def insert_frame(self, frame, co=(0.0, 0.0)):
        self[frame] = SimpleNamespace(co=co, mute=False)
        return self[frame]


class Clip:
    """MovieClip of Blender, as far as the script uses it."""

    def __init__(self):
        self.made = {}
        self.tracking = SimpleNamespace(tracks=SimpleNamespace(new=self._new))

    def _new(self, name, frame):
        self.made[name] = Markers({frame: SimpleNamespace(co=(0.0, 0.0), mute=False)})
        return SimpleNamespace(markers=self.made[name])


def check_markers(made, tracks):
    """made: by track, (frame, (u, v), mute) of its markers. The first frame of a clip is 1; (u, v) are shares of width
    and height from the lower left corner."""
    assert list(made) == ["track_00000", "track_00001"]
    for n, markers in enumerate(made.values()):
        frames = [frame for frame, _, _ in markers]
        assert frames == [3, *(NUMBERS + 1), 17]
        u, v = np.array([co for _, co, _ in markers[1:-1]]).T
        x, y = corner_positions(tracks)[n].T
        assert np.allclose(u * 128, x, atol=1e-4) and np.allclose(v * 96, 96 - y, atol=1e-4)
        # disabled where the point is hidden, and before and after the tracked frames, where Blender holds a position
        assert [mute for _, _, mute in markers] == [True, *(~tracks.visible[n]).tolist(), True]


def test_blenders_script_makes_the_markers(tracks, tmp_path):
    export_tracks(tmp_path / "t.blender.py", tracks)
    script = runpy.run_path(str(tmp_path / "t.blender.py"))
    assert (script["VIDEO"], script["SIZE"]) == ("the clip's é.mp4", (128, 96))
    clip = Clip()
    script["add_tracks"](clip)
    check_markers({name: sorted((frame, marker.co, marker.mute) for frame, marker in markers.items())
                   for name, markers in clip.made.items()}, tracks)


def test_blenders_script_is_data_and_the_projects_code(tracks, tmp_path):
    """The name of the video cannot become code."""
    bad = '"""\nimport os\n\'\\'
    named = PointTracks(tracks.tracks, tracks.visible, tracks.query_points, SIZE,
                        source=SourceFrames(SIZE, SOURCE, NUMBERS, 25.0, bad))
    export_tracks(tmp_path / "t.blender.py", named)
    tree = ast.parse((tmp_path / "t.blender.py").read_bytes())
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)}
    assert list(values) == ["VIDEO", "SIZE", "FRAMES", "TRACKS"] and values["VIDEO"] == bad
    imports = [node.names[0].name for node in ast.walk(tree) if isinstance(node, ast.Import)]
    assert imports == ["os", "sys", "bpy", "bpy"]


READ_BACK = """
import bpy, json, sys
bpy.ops.wm.open_mainfile(filepath=sys.argv[1])
[clip] = bpy.data.movieclips
print("CLIP", json.dumps([list(clip.size), clip.frame_duration, {
    track.name: [[marker.frame, list(marker.co), marker.mute] for marker in track.markers]
    for track in clip.tracking.tracks}]))
"""


def test_blender_runs_the_script(tracks, tmp_path):
    """In Blender's own Python: the clip beside the script is loaded, the tracks are added, saved, and read back."""
    blender = os.environ.get("BLENDER_PYTHON") or (sys.executable if importlib.util.find_spec("bpy") else None)
    if blender is None:
        pytest.skip("bpy is not installed (pip install bpy), and BLENDER_PYTHON names no Python that has it")
    write_video(tmp_path / CLIP.name, [np.full((*SOURCE, 3), 10 * t, np.uint8) for t in range(16)])
    export_tracks(tmp_path / "t.blender.py", tracks)
    run = subprocess.run([blender, tmp_path / "t.blender.py", "--", tmp_path / "out.blend"], capture_output=True,
                         text=True, timeout=120)
    assert run.returncode == 0 and "2 tracks added" in run.stdout, run.stderr
    read = subprocess.run([blender, "-c", READ_BACK, tmp_path / "out.blend"], capture_output=True, text=True,
                          timeout=120)
    [line] = [line for line in read.stdout.splitlines() if line.startswith("CLIP")]
    size, duration, made = json.loads(line[5:])
    assert size == [128, 96] and duration == 16
    check_markers(made, tracks)
    write_video(tmp_path / CLIP.name, [np.zeros((40, 60, 3), np.uint8)] * 3)
    run = subprocess.run([blender, tmp_path / "t.blender.py"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "60x40 pixels, the tracks are for 128x96" in run.stderr
    (tmp_path / CLIP.name).unlink()
    run = subprocess.run([blender, tmp_path / "t.blender.py"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "open the video the clip's é.mp4 of 128x96 pixels" in run.stderr
