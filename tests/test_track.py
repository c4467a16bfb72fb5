"""track.py and track_video: from a clip to tracks, video and page. A second call only tracks."""

import csv
import io
import json
import shutil
import signal
from pathlib import Path

import av
import numpy as np
import pytest

from common.errors import UserError
from common.progress import Part, WholeProgress
from inference import track_video
from inference.clip_run import ClipRun
from loaders.images import write_png
from loaders.track_files import load_query_file, save_queries
from loaders.video import clip_header, read_video, write_video
from preprocessing.synthetic.render import render_scene
from tests.launch import Launched, fork_children, launch, wait_until

T, H, W = 5, 280, 300  # larger than the 256 pixels at which clips are processed
PRESET = """deform = grid
field = grid
grid_levels = 2
num_iters = 12
num_pairs = 2
num_pts = 32
num_samples_ray = 4
start_interval = 250
follow_flow = 1
i_weight = 5
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a clip as images (clip/) and as a video, another clip, and a quick preset; clip/ is tracked."""
    root = tmp_path_factory.mktemp("track")
    frames, _, _ = render_scene("easy", (H, W), T, 0, 8)
    for t, frame in enumerate(frames):
        write_png(root / "clip" / f"{t:05d}.png", frame)
    write_video(root / "clip.mp4", frames, 12)
    write_video(root / "other" / "clip.mp4", frames[::-1], 12)
    (root / "quick.txt").write_text(PRESET)
    result = track(root, "clip", "--query", "0,150.5,100", "--query", "4,20,270", "--out", root / "first.npz")
    assert result.returncode == 0, result.stderr
    return root


def words(root: Path, clip: str, *more) -> list:
    return ["track.py", root / clip, "--config", root / "quick.txt", *more]


def track(root: Path, clip: str, *more):
    return launch(*words(root, clip, *more), prepare=fork_children)


def state(folder: Path) -> dict[str, int]:
    """When each kept file was written."""
    return {str(path): path.stat().st_mtime_ns for path in (folder / "clip_work").rglob("*") if path.is_file()}


def test_tracks_are_in_the_clips_pixels_and_video_and_page_beside_them(folder):
    found = np.load(folder / "first.npz")
    assert found["tracks"].shape == (2, T, 2) and found["frame_size"].tolist() == [H, W]
    assert np.allclose(found["query_points"], [[0, 100, 150.5], [4, 270, 20]], atol=1e-4)
    assert np.allclose(found["tracks"][[0, 1], [0, 4]], [[150.5, 100], [20, 270]], atol=1e-3)
    assert found["visible"][[0, 1], [0, 4]].all()
    with av.open(str(folder / "first.mp4")) as video:
        assert len(list(video.decode(video=0))) == T
    assert "<title>clip" in (folder / "first.html").read_text()


def test_the_same_clip_with_other_points_is_only_tracked(folder):
    before = state(folder)
    (folder / "q.csv").write_text("t,y,x\n0,100,150.5\n2,10,290\n")
    result = track(folder, "clip", "--queries", folder / "q.csv", "--out", folder / "second.csv")
    assert result.returncode == 0, result.stderr
    assert state(folder) == before
    rows = list(csv.DictReader(io.StringIO((folder / "second.csv").read_text())))
    assert len(rows) == 2 * T and float(rows[T + 2]["x"]) == pytest.approx(290, abs=0.01)
    first = np.load(folder / "first.npz")["tracks"][0]
    again = [[float(row["x"]), float(row["y"])] for row in rows[:T]]
    assert np.allclose(first, again, atol=1e-3)
    assert result.stderr.splitlines()[-1].startswith("2 tracks through 5 frames")


@pytest.mark.parametrize("option, count", [(["--grid", "50"], 36), (["--every_pixel", "3"], 256 * 274), ([], 26 * 27)])
def test_grids(folder, option, count, tmp_path):
    result = track(folder, "clip", *option, "--out", tmp_path / "grid.npz", "--keep_work", folder / "clip_work")
    assert result.returncode == 0, result.stderr
    queries, size = load_query_file(tmp_path / "grid.npz")
    assert len(queries) == count and size == (H, W)
    assert set(queries[:, 0]) == {3 if "--every_pixel" in option else 0}


def test_an_array_is_the_same_clip_as_its_images(folder):
    frames = np.stack(list(read_video(folder / "clip")))
    before = state(folder)
    queries = [[0, 100, 150.5], [4, 270, 20]]
    (folder / "work").symlink_to(folder / "clip_work")
    found = track_video(frames, queries, keep_work=folder / "work", config=str(folder / "quick.txt"), progress=False)
    changed = {path for path, when in state(folder).items() if before.get(path) != when}
    assert all("/frames/" in path for path in changed)
    first = np.load(folder / "first.npz")
    assert np.allclose(found.tracks, first["tracks"], atol=1e-3) and (found.visible == first["visible"]).all()


@pytest.mark.parametrize("frames, queries, message", [
    (np.zeros((4, 32, 32, 3), np.float32), [[0, 1, 1]], "give uint8 RGB"),
    (np.zeros((4, 32, 32, 3), np.uint8), [[4, 1, 1]], "of 4 frames of 32x32"),
    (np.zeros((4, 32, 32, 3), np.uint8), [[0, 1, 32]], "of 4 frames of 32x32"),
    (np.zeros((4, 32, 32, 3), np.uint8), [[0, 1]], r"must be \(N, 3\)"),
    ("nothing.mp4", [[0, 1, 1]], "no video nothing.mp4")])
def test_arrays_and_points_that_are_refused(frames, queries, message):
    with pytest.raises(UserError, match=message):
        track_video(frames, queries, progress=False)


def test_another_clip_is_refused_in_the_same_folder(folder):
    before = state(folder)
    result = track(folder, "other/clip.mp4", "--keep_work", folder / "clip_work", "--out", folder / "third.npz")
    assert result.returncode == 2 and "results of another clip" in error(result)
    assert state(folder) == before


def error(result) -> str:
    """The only line of the output, without the bar."""
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("more, message", [
    (["--query", "0,1"], "not FRAME,X,Y"), (["--query", "0,1,nan"], "not FRAME,X,Y"),
    (["--query", "5,1,1"], "of 5 frames of 300x280"), (["--query", "0,300,1"], "of 5 frames of 300x280"),
    (["--every_pixel", "5"], "there are the frames 0, 1, ..., 4"), (["--queries", "none.csv"], "no file none.csv"),
    (["--grid", "5", "--every_pixel", "0"], "not allowed with"), (["--out", "tracks.txt"], "no format for tracks"),
    (["--config", "none.txt"], "none.txt")])
def test_mistakes_are_one_line(folder, more, message):
    result = track(folder, "clip", "--keep_work", folder / "clip_work", *([] if "--out" in more else
                   ["--out", folder / "x.npz"]), *more)
    assert result.returncode == 2 and message in error(result)


def test_points_outside_the_clip_are_refused_before_training(folder, tmp_path):
    result = track(folder, "clip", "--keep_work", tmp_path / "work", "--out", tmp_path / "x.npz", "--query", "99,10,10")
    assert result.returncode == 2 and "99" in error(result)
    with pytest.raises(UserError, match="query_points"):
        track_video(folder / "clip", np.array([[99, 10, 10]]), keep_work=tmp_path / "work", progress=False,
                    config=str(folder / "quick.txt"))
    assert not list((tmp_path / "work").glob("quick_*"))


def test_what_is_no_video_is_one_line_and_leaves_nothing(folder, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    result = launch("track.py", tmp_path / "text.mp4", "--out", tmp_path / "x.npz", prepare=fork_children)
    assert result.returncode == 2 and "cannot be opened as a video" in error(result)
    assert [path.name for path in tmp_path.iterdir()] == ["text.mp4"]


def test_an_empty_file_and_a_folder_that_cannot_be_made_are_named(folder, tmp_path):
    (tmp_path / "empty.mp4").touch()
    result = launch("track.py", tmp_path / "empty.mp4", "--out", tmp_path / "x.npz", prepare=fork_children)
    assert result.returncode == 2 and "is empty" in error(result)
    result = track(folder, "clip", "--out", tmp_path / "x.npz", "--keep_work", tmp_path / "empty.mp4" / "work")
    assert result.returncode == 2 and "--keep_work" in error(result)


def test_a_failure_of_the_trained_run_is_said_in_every_call(folder, tmp_path):
    shutil.copytree(folder / "clip_work", tmp_path / "work")
    run = next((tmp_path / "work").glob("quick_*"))
    entry = {"step": 12, "warnings": ["wrong surface order: 20%"]}
    (run / "diagnosis.json").write_text(json.dumps([entry]))
    result = track(folder, "clip", "--keep_work", tmp_path / "work", "--out", tmp_path / "x.npz", "--query", "0,20,20")
    assert result.returncode == 0 and "wrong surface order: 20%" in result.stderr


def test_a_mistake_that_preprocessing_finds_is_its_one_line(folder, tmp_path):
    write_png(tmp_path / "one" / "0.png", np.zeros((40, 40, 3), np.uint8))
    result = launch("track.py", tmp_path / "one", "--out", tmp_path / "x.npz", prepare=fork_children)
    assert result.returncode == 2 and "gives one frame" in error(result)


def test_the_clip_is_not_replaced_by_the_video(folder):
    result = launch("track.py", folder / "clip.mp4", "--out", folder / "clip.npz")
    assert result.returncode == 2 and "would replace" in error(result)


def newest_step(folder: Path) -> int:
    """Of the newest checkpoint of the run in folder/work; 0 without one."""
    return max((int(path.stem[6:]) for path in folder.glob("work/quick_*/model_*.pth")), default=0)


def test_ctrl_c_is_one_line_and_the_same_command_continues(folder, tmp_path):
    work = ["--keep_work", tmp_path / "work", "--out", tmp_path / "x.npz", "--num_iters", "1000000"]
    for _ in range(2):
        before = newest_step(tmp_path)
        process = Launched(*words(folder, "clip.mp4", *work), prepare=fork_children)
        wait_until(lambda before=before: newest_step(tmp_path) > before, process)
        process.send_signal(signal.SIGINT)
        said = process.communicate(60)[1]
        assert process.returncode == 130 and newest_step(tmp_path) > before
        lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
        assert lines == ["stopped: the same command continues from here"]


def test_settings_name_the_run_and_the_frames_do_not(folder):
    job = ClipRun(folder / "clip", folder / "clip_work", str(folder / "quick.txt"))
    assert job.is_trained and job.has_page() and job.parts() == []
    other = ClipRun(folder / "clip", folder / "clip_work", str(folder / "quick.txt"), num_iters=13)
    assert not other.is_trained and [part.label for part in other.parts()] == ["training"]
    new = ClipRun(folder / "clip.mp4", folder / "new", str(folder / "quick.txt"))
    assert new.options().expname == job.options().expname and len(new.parts()) == 4


def test_header_of_a_clip(folder):
    assert clip_header(folder / "clip.mp4") == clip_header(folder / "clip") == (T, (H, W))


def test_the_bar_tells_the_time_left_for_all_parts(capsys):
    progress = WholeProgress("clip", [Part("flow", "flow", 10.0), Part("training", "run", 30.0)])
    now = progress.begun
    progress.current, progress.share = 0, 0.0
    assert progress.seconds_left(now) == pytest.approx(40)
    progress.share = 0.5
    assert progress.seconds_left(now + 10) == pytest.approx(10 + 30 * 20 / 15)  # slower than estimated
    progress.write("run:  40%|####      | 40/100 [00:01<00:02, 1it/s]")
    assert (progress.current, progress.share, progress.expected) == (1, 0.4, 10.0)  # resumed at 40 of 100
    progress.write("\rrun:  70%|####  | 70/100 [00:01<00:02, 1it/s]")
    progress.part_begun = now + 10
    assert progress.seconds_left(now + 20) == pytest.approx(10)
    progress.write("\rother:  90%|####      | 9/10 [00:01<00:02, 1it/s]\rrun:  80%|####  | 80/1")
    assert progress.share == 0.7
    progress.write("00 [00:01<00:02, 1it/s]\nsomething is odd\nerror: one line\n")
    assert progress.share == 0.8
    progress.close()
    said = capsys.readouterr().err
    assert "something is odd" in said and "one line" not in said and "clip: training, about 00:" in said


def test_queries_of_an_npz_in_another_size_are_scaled(folder, tmp_path):
    save_queries(tmp_path / "q.npz", np.array([[0, 50, 75.25]], np.float32), (H // 2, W // 2))
    result = track(folder, "clip", "--keep_work", folder / "clip_work", "--queries", tmp_path / "q.npz", "--out",
                   tmp_path / "x.npz")
    assert result.returncode == 0, result.stderr
    assert np.allclose(np.load(tmp_path / "x.npz")["query_points"], [[0, 100.5, 151]], atol=1e-3)
