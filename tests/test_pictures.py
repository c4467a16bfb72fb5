"""benchmarks.pictures --real_clips: a picture from a result folder, and errors in one line."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.pictures import GRAY, GREEN, RED, TRACKERS, border, draw_ends, sequences_of
from loaders.track_files import Annotations, PointTracks, save_annotations, save_tracks
from tests.launch import launch

SIZE = (256, 256)
TRUE = np.array([[50, 60], [120, 130], [200, 40], [90, 90], [70, 200]], np.float32)  # the last one is truly hidden
ENDS = np.array([[55, 60], [120, 150], [300, 40], [90, 91], [80, 200]], np.float32)
HIDDEN = np.array([False, False, True, True, False])


def ends() -> tuple[PointTracks, Annotations]:
    """Five points that end 5 px from the truth, 20 px from it, outside, called hidden, and truly hidden."""
    points = np.stack([TRUE, TRUE], axis=1)  # (5, 2, 2)
    occluded = np.zeros((5, 2), bool)
    occluded[4, 1] = True
    visible = np.stack([np.ones(5, bool), ~HIDDEN], axis=1)
    queries = np.concatenate([np.zeros((5, 1)), TRUE[:, ::-1]], axis=1).astype(np.float32)
    return PointTracks(np.stack([TRUE, ENDS], axis=1), visible, queries, SIZE), Annotations(points, occluded, SIZE)


@pytest.fixture
def results(tmp_path):
    """Results of one clip in the layout of benchmarks.real_clips; the benchmark's name has an underscore."""
    tracks, truth = ends()
    folder = tmp_path / "fast_my_clips"
    for path in (tmp_path / "sequences/my_clips/ball", *(folder / name for name in TRACKERS)):
        path.mkdir(parents=True)
    save_annotations(tmp_path / "sequences/my_clips/ball/annotations.npz", truth)
    for name in TRACKERS:
        save_tracks(folder / name / "ball.npz", tracks)
    return folder


def picture(results, out, clips="ball"):
    return launch("benchmarks.pictures", "--real_clips", results, "--clips", clips, "--out", out)


def test_the_picture_is_written(results, tmp_path):
    process = picture(results, tmp_path, "ball,ball")
    assert process.returncode == 0, process.stderr
    image = Image.open(tmp_path / "real_clips.png")
    assert image.width == 900 and image.getpixel((1, 1))[:3] == (255, 255, 255)
    assert 5_000 < (tmp_path / "real_clips.png").stat().st_size < 200_000


@pytest.mark.parametrize("missing", ["fast_my_clips", "sequences/my_clips", "alone/other.npz", "annotations.npz"])
def test_what_is_missing_is_named_in_one_line(missing, results, tmp_path):
    (results.parent / "sequences/other").mkdir()
    if missing == "fast_my_clips":
        results.rename(tmp_path / "elsewhere")
    elif missing == "sequences/my_clips":
        (tmp_path / missing).rename(tmp_path / "sequences/elsewhere")
    elif missing == "alone/other.npz":
        (results / "alone/ball.npz").rename(results / missing)
    else:
        (tmp_path / "sequences/my_clips/ball" / missing).unlink()
    process = picture(results, tmp_path)
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
    assert process.stderr.startswith("error: ") and not (tmp_path / "real_clips.png").exists()


def test_the_sequences_are_those_of_the_longest_matching_name(results):
    (results.parent / "sequences/clips").mkdir()
    assert sequences_of(results).name == "my_clips"


def test_colors_markers_and_arrows():
    axes: Axes = Figure().subplots()
    tracks, truth = ends()
    draw_ends(axes, tracks, truth, np.arange(5))
    lines = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert [line.get_color() for line in lines] == [GREEN, RED, GREEN]  # none where the true position is unknown
    discs = [(line.get_color(), line.get_markerfacecolor()) for line in axes.lines if line.get_marker() == "o"]
    assert discs == [(GREEN, GREEN), (RED, RED), (GREEN, "white"), (GRAY, GRAY)]
    assert sum(line.get_marker() == "." for line in axes.lines) == 4
    arrow, = axes.texts
    assert np.allclose(arrow.xy, [255.5, 40]) and np.allclose(arrow.xyann, TRUE[2])
    assert axes.get_ylim() == (255.5, -0.5)  # y down


@pytest.mark.parametrize("end,expected", [((-41, 60), (-0.5, 60)), ((50, 300), (50, 255.5)),
                                          ((350, 360), (245.5, 255.5))])
def test_arrows_end_at_the_border(end, expected):
    assert np.allclose(border(np.array([50.0, 60.0]), np.array(end, float)), expected)
