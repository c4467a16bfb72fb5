"""eval.py --tapvid: the whole benchmark, what a second run does, failures, shards, predictions, reports."""

import csv
import json
import pickle
import shutil
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from common.errors import UserError
from configs.options import parse
from evaluation.benchmark import check_settings, run_benchmark
from evaluation.metrics import THRESHOLDS
from evaluation.plots import draw_videos
from evaluation.report import PAPER_RESULTS, Table, paper_rows
from loaders.predicted_tracks import load_tracks
from loaders.tapvid import TapVideo, read_pickle, save_tapvid
from loaders.track_files import save_tracks
from preprocessing.synthetic.render import render_scene
from tests.launch import start_command, start_server
from tests.robustness import check_benchmark

QUICK = ("--num_iters 24 --num_pairs 2 --num_pts 32 --num_samples_ray 8 --coupling_width 32 --affine_width 16 "
         "--affine_layers 3 --field_width 24 --i_img 0 --no_tensorboard --tapvid_size 64 --query_mode first").split()
STATIC = ("--no-score_model", "--baselines", "static")


def benchmark(*arguments):
    """Run in this process (the videos in their own); returns the exit code."""
    start_server()
    try:
        run_benchmark(parse("eval", list(map(str, arguments))))
    except SystemExit as stop:
        return stop.code
    return 0


def metrics(results, tracker):
    """Metrics by video, as results.json has them."""
    videos = json.loads((results / "results.json").read_text())["trackers"][tracker]["videos"]
    return {name: record["metrics"] for name, record in videos.items()}


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """Two scenes of 8 frames of 64x64 as a TAP-Vid file."""
    path = tmp_path_factory.mktemp("tapvid") / "small_davis.pkl"
    scenes = {scene: render_scene(scene, (64, 64), 8, 0, 24)[:2] for scene in ("easy", "demo")}
    save_tapvid(path, {name: TapVideo(*scene) for name, scene in scenes.items()})
    return path


@pytest.fixture(scope="module")
def done(small_file):
    """Exit code and results folder of a finished benchmark of these scenes and three bad videos."""
    good = read_pickle(small_file)
    bad = {"outside": {**good["easy"], "points": good["easy"]["points"] + 1},
           "invisible": {**good["easy"], "occluded": np.ones_like(good["easy"]["occluded"])},
           "keyless": {"video": good["easy"]["video"]}}
    path = small_file.with_name("mixed_davis.pkl")
    path.write_bytes(pickle.dumps({"outside": bad["outside"], **good, **bad}))
    code = benchmark("--tapvid", path, "--save_dir", path.parent / "out", *QUICK, "--baselines", "static,chain")
    return code, path, path.parent / "out" / "default_mixed_davis" / "first"


def test_bad_videos_are_reported_and_the_others_are_scored(done):
    code, _, results = done
    assert code == 1
    trackers = json.loads((results / "results.json").read_text())["trackers"]
    assert list(trackers) == ["model", "chain", "static"]
    for tracker in trackers.values():
        assert set(tracker["videos"]) == {"easy", "demo"} and set(tracker["failed"]) == {"outside", "invisible",
                                                                                         "keyless"}
        words = {"outside": "in [0, 1]", "invisible": "no visible point", "keyless": "has no `points`"}
        assert all(words[name] in line and "\n" not in line for name, line in tracker["failed"].items())
    assert trackers["chain"]["mean"]["average_jaccard"] > 0.5 > trackers["static"]["mean"]["average_jaccard"]


def test_reports_say_what_was_done(done):
    _, _, results = done
    report = json.loads((results / "results.json").read_text())
    model = report["trackers"]["model"]
    for key, mean in model["mean"].items():
        defined = [video["metrics"][key] for video in model["videos"].values() if key in video["metrics"]]
        assert mean == pytest.approx(np.mean(defined))
    assert model["settings"]["num_iters"] == report["config"]["num_iters"] == 24 and report["seed"] == 1234
    assert report["versions"]["torch"] and set(model["videos"]["easy"]["seconds"]) == {"frames", "preprocess", "train",
                                                                                     "track"}
    with open(results / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["video"] for row in rows if row["tracker"] == "static"] == ["easy", "demo", "outside", "invisible",
                                                                            "keyless", "mean of 2"]
    assert float(rows[0]["average_jaccard"]) == model["videos"]["easy"]["metrics"]["average_jaccard"]
    text = (results / "results.md").read_text()
    assert "| model | 2 of 5 |" in text and "cannot be compared" in text
    assert "| OmniMotion | optimized | 52.8 | 66.9 | 87.1 |" in text
    for name in ("curves", "videos", "since_query"):
        with Image.open(results / f"{name}.png") as image:
            assert image.width > 800 and np.asarray(image.convert("L")).std() > 10


def test_a_second_run_does_only_what_is_missing(done):
    _, path, results = done
    checkpoint = results.parent / "runs" / "default_easy" / "model_000024.pth"
    before, kept = metrics(results, "model"), [checkpoint, results / "model" / "demo.json", results / "chain/easy.json"]
    times = [file.stat().st_mtime_ns for file in kept]
    (results / "model" / "easy.json").unlink()
    assert benchmark("--tapvid", path, "--save_dir", path.parent / "out", *QUICK) == 1
    assert metrics(results, "model") == before and [file.stat().st_mtime_ns for file in kept] == times


def test_other_settings_need_another_name(done, tmp_path):
    _, path, _ = done
    again = ("--tapvid", path, "--save_dir", path.parent / "out", *QUICK)
    with pytest.raises(UserError, match="num_iters 24, now it is 25: give another --expname"):
        benchmark(*again, "--num_iters", 25)
    shutil.copy(path, tmp_path / "mixed_davis.pkl")
    data = read_pickle(path)
    data["easy"]["video"][0] = 0
    (tmp_path / "mixed_davis.pkl").write_bytes(pickle.dumps(data))
    assert benchmark("--tapvid", tmp_path / "mixed_davis.pkl", "--save_dir", tmp_path, *QUICK, *STATIC,
                     "--sequences", path.parent / "out/sequences/mixed_davis", "--videos", "easy") == 1
    failed = json.loads((tmp_path / "default_mixed_davis/first/static/easy.failed.json").read_text())["error"]
    assert "made from another video" in failed


def test_a_benchmark_that_is_killed_and_run_again_gives_the_same_numbers(done, small_file, tmp_path, monkeypatch):
    """SIGKILL to all processes while the second video is trained (tests/robustness/check_benchmark.py)."""
    monkeypatch.setattr(check_benchmark, "start", start_command)
    check_benchmark.killed(small_file, tmp_path, list(QUICK), done=1)
    results = tmp_path / "default_small_davis" / "first"
    assert not (results / "demo.running").exists() and metrics(results, "model") == metrics(done[2], "model")


def test_predictions_of_any_tracker(done, tmp_path):
    """Tracks of the model, at twice the frames' size, as somebody else's: the same scores."""
    _, path, results = done
    predictions = tmp_path / "cotracker"
    save_tracks(predictions / "easy.npz", load_tracks(results / "model" / "easy.npz").resized((128, 128)))
    arguments = ("--tapvid", path, "--save_dir", tmp_path, *QUICK, "--predictions", predictions, "--videos",
                 "easy,demo", "--compare", results)
    assert benchmark(*arguments) == 1
    mine = tmp_path / "default_mixed_davis" / "first"
    assert metrics(mine, "cotracker")["easy"] == pytest.approx(metrics(results, "model")["easy"], abs=1e-3)
    failed = json.loads((mine / "cotracker" / "demo.failed.json").read_text())["error"]
    assert "cotracker/demo.npz: track the query points of" in failed and "queries_first.npz" in failed
    assert "| default_mixed_davis/chain | 2 of 5 |" in (mine / "results.md").read_text()
    save_tracks(predictions / "demo" / "tracks.npz", load_tracks(results / "model" / "demo.npz"))
    assert benchmark(*arguments) == 0


@pytest.mark.parametrize("mode", ["first", "strided"])
def test_numbers_by_hand_from_the_file_to_the_report(mode, tmp_path):
    """11 frames; one point stands, one moves by 1 px a frame at 256x256. Points that do not move are wrong by as many
    pixels as there are frames between."""
    positions = np.array([[[100, 50]] * 11, [[20 + t, 30] for t in range(11)]], np.float64)
    (tmp_path / "hand.pkl").write_bytes(pickle.dumps([{
        "video": np.zeros((11, 32, 48, 3), np.uint8), "points": ((positions + 0.5) / 256).astype(np.float32),
        "occluded": np.zeros((2, 11), bool)}]))
    assert benchmark("--tapvid", tmp_path / "hand.pkl", "--save_dir", tmp_path, *STATIC, "--query_mode",
                     mode) == 0
    found = metrics(tmp_path / "default_hand" / mode, "static")["0000"]
    queries = [0] if mode == "first" else [0, 5, 10]
    errors = [0] * 10 * len(queries) + [abs(t - q) for q in queries for t in range(11) if t != q]
    for threshold in THRESHOLDS:
        within = sum(error < threshold for error in errors)
        assert found[f"pts_within_{threshold}"] == within / len(errors)
        assert found[f"jaccard_{threshold}"] == within / (2 * len(errors) - within)
    assert found["occlusion_accuracy"] == 1 and found["temporal_coherence"] == 0


def test_shards_make_up_the_whole(small_file, tmp_path):
    whole = ("--tapvid", small_file, "--tapvid_size", 64, "--query_mode", "strided", *STATIC)
    assert benchmark(*whole, "--save_dir", tmp_path / "whole") == 0
    for shard in ("0/2", "1/2"):
        assert benchmark(*whole, "--save_dir", tmp_path / "shards", "--shard", shard) == 0
        report = json.loads((tmp_path / "shards/default_small_davis/strided/results.json").read_text())
        assert report["trackers"]["static"]["missing"] == (["demo"] if shard == "0/2" else [])
    folders = [tmp_path / name / "default_small_davis" / "strided" for name in ("whole", "shards")]
    assert metrics(folders[0], "static") == metrics(folders[1], "static")


@pytest.mark.parametrize("arguments,words", [
    (["--shard", "2/2"], "I from 0 to N-1"), (["--videos", "bear"], "has no video 'bear': it has easy, demo"),
    (["--baselines", "best"], "no baseline 'best'"), (["--predictions", "nowhere"], "no folder nowhere"),
    (["--ckpt_path", "a.pth"], "--ckpt_path is one video's"), (["--compare", "nowhere"], "no folder nowhere"),
    (["--preprocessing", "--chain --stride 2"], "leave out --stride")])
def test_mistakes_are_one_line(arguments, words, small_file, tmp_path):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        benchmark("--tapvid", small_file, "--save_dir", tmp_path, *QUICK, *arguments)


def test_a_ray_cluster_that_is_not_there(small_file, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.raises(UserError, match=r"no Ray cluster at .*refused.*ray start --head"):
        benchmark("--tapvid", small_file, "--save_dir", tmp_path, *QUICK, *STATIC,
                  "--ray", "127.0.0.1:1")


def test_ray_is_optional(small_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="--ray needs Ray: pip install"):
        benchmark("--tapvid", small_file, "--save_dir", tmp_path, *QUICK, *STATIC, "--ray")


def test_paper_rows_are_figures_with_a_source():
    with open(PAPER_RESULTS, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({tuple(row.values()) for row in rows}) > 50
    for row in rows:
        assert row["benchmark"] in ("davis", "rgb_stacking", "kinetics", "robotap")
        assert row["query_mode"] in ("first", "strided") and row["kind"] in ("optimized", "feed-forward")
        assert row["source"] and row["AJ"] + row["delta_avg"]
        assert all(0 < float(row[key]) < 100 for key in ("AJ", "delta_avg", "OA", "TC") if row[key])
    (best,) = [row for row in paper_rows("tapvid_davis", "strided") if row["tracker"] == "OmniMotion (RAFT input)"]
    assert (best["AJ"], best["delta_avg"], best["OA"], best["TC"]) == ("51.7", "67.5", "85.3", "0.74")


@pytest.mark.parametrize("name", ["model", "an_experiment_with_a_long_name_tapvid_davis/model"])
def test_legends_are_inside_the_picture(name):
    videos = {"bear": {"metrics": {"average_jaccard": 0.5}}}
    figure = Figure((6, 4.2), layout="constrained")
    draw_videos(figure, [Table(f"{name}{k}", videos) for k in range(5)])
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, room = legend.get_window_extent(), figure.bbox
    assert room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and len(legend.get_texts()) == 5


def test_results_are_resumed_if_missing_settings_have_their_default(tmp_path):
    """An option that is missing in settings.json had its default value."""
    (tmp_path / "a.npz").touch()
    settings = {"chain": False, "seed": 3, "deform_start": 0.0, "find_scenes": True}
    (tmp_path / "settings.json").write_text(json.dumps({"chain": False, "seed": 3}))
    check_settings(tmp_path, "*.npz", settings)
    for changed in ({"deform_start": 8000.0}, {"chain": "trusted"}, {"seed": 4}, {"find_scenes": False}):
        with pytest.raises(UserError, match=next(iter(changed))):
            check_settings(tmp_path, "*.npz", settings | changed)
