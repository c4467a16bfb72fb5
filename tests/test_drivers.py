"""train.py, eval.py and viz.py in separate processes, and their error messages."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from loaders.predicted_tracks import load_tracks
from loaders.track_files import load_annotations, sample_queries, save_annotations
from tests.launch import Launched, launch, wait_until

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("--num_iters 24 --num_pairs 2 --num_pts 32 --num_samples_ray 8 --coupling_width 32 --affine_width 16 "
         "--affine_layers 3 --field_width 24 --i_img 12 --i_print 4").split()


def driver(name, *arguments):
    """Run a driver as a user does."""
    return subprocess.run([sys.executable, f"{name}.py", *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)


@pytest.fixture(scope="module")
def trained(small_sequence, tmp_path_factory):
    """Arguments that name a trained run, and its folder."""
    out = tmp_path_factory.mktemp("out")
    arguments = ["--data_dir", small_sequence, "--save_dir", out]
    result = driver("train", *arguments, *QUICK)
    assert result.returncode == 0, result.stderr
    return arguments, out / "default_small"


def test_training_leaves_checkpoint_pictures_and_curves(trained):
    _, folder = trained
    assert (folder / "model_000024.pth").is_file() and "num_iters = 24" in (folder / "args.txt").read_text()
    pictures = {path.name for path in (folder / "vis").iterdir()}
    assert {"000012_matches.png", "000024_flow.png", "000024_frame_0.png", "000024_frame_4.png"} <= pictures
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"loss/flow", "loss/rgb", "flow_error_px", "lr/deform", "samples_per_second"} <= set(tags["scalars"])
    assert {"matches", "flow", "frame_0", "frame_4"} <= set(tags["images"])
    assert any(name.startswith("weights/deform") for name in tags["histograms"])


def test_a_finished_run_is_not_trained_again(trained):
    arguments, folder = trained
    before = (folder / "model_000024.pth").read_bytes()
    result = launch("train.py", *arguments, *QUICK)
    assert result.returncode == 0 and "going on from" in result.stderr
    assert (folder / "model_000024.pth").read_bytes() == before


def test_ctrl_c_saves_and_the_same_command_goes_on(small_sequence, tmp_path):
    arguments = ["--data_dir", str(small_sequence), "--save_dir", str(tmp_path), *QUICK, "--no_tensorboard",
                 "--num_iters", "100000"]
    process = Launched("train.py", *arguments)
    wait_until(lambda: (tmp_path / "default_small" / "vis").is_dir(), process)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the same command resumes the run" in errors
    (checkpoint,) = (tmp_path / "default_small").glob("model_*.pth")
    steps = int(checkpoint.stem[6:])
    assert steps >= 12
    result = launch("train.py", *arguments[:-1], steps + 2)
    assert result.returncode == 0 and f"at step {steps}" in result.stderr
    assert (tmp_path / "default_small" / f"model_{steps + 2:06d}.pth").is_file()


def test_scores_with_baselines(trained, small_sequence):
    arguments, folder = trained
    result = launch("eval.py", *arguments, "--annotations", small_sequence / "annotations.npz", "--baselines",
                    "static,chain", "--query_mode", "first")
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()[2:]] == ["static", "chain", "model"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["query_mode"] == "first" and metrics["baselines"].keys() == {"static", "chain"}
    for row in (metrics, *metrics["baselines"].values()):
        assert {"average_jaccard", "average_pts_within_thresh", "occlusion_accuracy", "temporal_coherence",
                "jaccard_1", "pts_within_16"} <= row.keys()
    assert metrics["baselines"]["chain"]["average_jaccard"] > metrics["baselines"]["static"]["average_jaccard"]


def test_queries_to_tracks_to_the_same_score(trained, small_sequence, tmp_path):
    """The three modes agree: tracks of a query file, scored as predictions, are what --annotations scores."""
    arguments, _ = trained
    truth = load_annotations(small_sequence / "annotations.npz")
    queries, _ = sample_queries(truth, "first")
    np.savetxt(tmp_path / "q.csv", queries, "%.6f", ",", header="t,y,x", comments="")
    result = launch("eval.py", *arguments, "--queries", tmp_path / "q.csv", "--out", tmp_path / "t.npz")
    assert result.returncode == 0, result.stderr
    tracks = load_tracks(tmp_path / "t.npz", 8)
    assert tracks.tracks.shape == (len(queries), 8, 2) and tracks.depth.shape == (len(queries), 8)
    frames = queries[:, 0].astype(int)
    assert np.allclose(tracks.tracks[np.arange(len(queries)), frames], queries[:, :0:-1], atol=1e-4)
    scores = []
    for more in (["--predictions", tmp_path / "t.npz"], arguments):
        result = launch("eval.py", *more, "--annotations", small_sequence / "annotations.npz", "--query_mode", "first",
                        "--out", tmp_path / "m.json")
        assert result.returncode == 0, result.stderr
        scores.append(json.loads((tmp_path / "m.json").read_text()))
    assert scores[1].pop("follow_flow") == 0
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_videos_show_every_frame(trained):
    arguments, folder = trained
    result = driver("viz", *arguments, "--query_frame_id", 3, "--use_mask", "--grid_interval", 5)
    assert result.returncode == 0, result.stderr
    for name in ("tracks_00003.mp4", "depth.mp4"):
        with av.open(str(folder / name)) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert len(frames) == 8 and frames[0].shape == (546, 512, 3) and frames[4].std() > 5


def bad(kind, trained, small_sequence, tmp_path):
    """Driver and arguments of a user's mistake."""
    run, annotations = trained[0], tmp_path / "annotations.npz"
    truth = load_annotations(small_sequence / "annotations.npz")
    if kind == "annotation of another length":
        save_annotations(annotations, type(truth)(truth.points[:, :5], truth.occluded[:, :5], truth.frame_size))
    if kind == "query after the last frame":
        (tmp_path / "q.csv").write_text("t,y,x\n8,3,3\n")
    if kind == "unknown option in the config":
        (tmp_path / "c.txt").write_text("num_itres = 5\n")
    if kind == "a checkpoint of something else":
        torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    if kind == "store for other frames":
        shutil.copytree(small_sequence, tmp_path / "seq")
        shutil.copy(tmp_path / "seq/color/00002.png", tmp_path / "seq/color/00001.png")
    if kind == "damaged checkpoint":
        (tmp_path / "model.pth").write_bytes(b"PK\x03\x04 nothing")
    return {
        "annotation of another length": ("eval", *run, "--annotations", annotations),
        "query after the last frame": ("eval", *run, "--queries", tmp_path / "q.csv"),
        "unknown option in the config": ("train", "--config", tmp_path / "c.txt", "--data_dir", small_sequence),
        "unknown option": ("viz", *run, "--color", "red"),
        "value of a wrong type": ("train", "--num_pairs", "many"),
        "checkpoint of another length": ("eval", *run, "--num_imgs", 5, "--annotations", annotations),
        "training on a checkpoint of another length": ("train", *run, *QUICK, "--num_imgs", 5),
        "a checkpoint of something else": ("viz", *run, "--ckpt_path", tmp_path / "other.pth"),
        "store for other frames": ("train", "--data_dir", tmp_path / "seq", "--save_dir", tmp_path),
        "number out of range": ("train", *run, "--i_print", 0),
        "damaged checkpoint": ("viz", *run, "--ckpt_path", tmp_path / "model.pth"),
        "no checkpoint": ("viz", "--data_dir", small_sequence, "--save_dir", tmp_path),
        "no data_dir": ("train",),
        "no such folder": ("train", "--data_dir", tmp_path / "nowhere"),
        "no such config": ("train", "--config", tmp_path / "nowhere.txt"),
        "nothing to do": ("eval", *run),
        "unknown picture": ("viz", *run, "--what", "tracks,sound"),
        "unknown baseline": ("eval", *run, "--annotations", annotations, "--baselines", "best"),
        "frame outside the clip": ("viz", *run, "--query_frame_id", 8),
        "no such mask": ("viz", *run, "--foreground_mask_path", tmp_path / "mask.png"),
    }[kind]


@pytest.mark.parametrize("kind,words", [
    ("annotation of another length", "has 5 frames, the sequence 8"), ("query after the last frame", "row 0"),
    ("unknown option in the config", "num_itres"), ("unknown option", "--color"),
    ("value of a wrong type", "many"), ("checkpoint of another length", "trained on 8 frames, the sequence has 5"),
    ("training on a checkpoint of another length", "trained on 8 frames, the sequence has 5"),
    ("a checkpoint of something else", "not a checkpoint"), ("store for other frames", "other frames: 1 changed"),
    ("number out of range", "at least 1"), ("damaged checkpoint", "cannot be read as a checkpoint"),
    ("no checkpoint", "no checkpoint"),
    ("no data_dir", "--data_dir"), ("no such folder", "no folder"), ("no such config", "nowhere.txt"),
    ("nothing to do", "nothing to do"), ("unknown picture", "sound"), ("unknown baseline", "best"),
    ("frame outside the clip", "frames 0 to 7"), ("no such mask", "cannot be read")])
def test_a_users_mistake_is_one_line_and_exit_code_2(kind, words, trained, small_sequence, tmp_path):
    name, *arguments = bad(kind, trained, small_sequence, tmp_path)
    result = launch(f"{name}.py", *arguments)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and words in lines[-1], result.stderr
    assert len([line for line in lines if not line.startswith("model: ") and "(--num_imgs 5)" not in line]) == 1


@pytest.mark.parametrize("own,expected", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"),
                                          ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")])
@pytest.mark.parametrize("module", ["train", "eval", "viz", "preprocessing.__main__"])
def test_waiting_threads_spin_briefly_unless_the_user_says_otherwise(module, own, expected):
    """OpenMP reads the variables when PyTorch loads it."""
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    code = f"import sys; sys.modules['torch'] = None\ntry: import {module}\nexcept ImportError: pass\n" \
           "import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    out = subprocess.run([sys.executable, "-c", code], env=environment | own, cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.split() == [expected], out.stderr
