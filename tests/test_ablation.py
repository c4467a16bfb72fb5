"""The ablation and convergence tables: real cells, one process each, on a small clip."""

import json
from pathlib import Path

import pytest

from benchmarks.ablation import BASE, PRESETS, difference, table
from benchmarks.convergence import time_to
from benchmarks.experiments import Cell, cell_options, file_options, means_of_seeds
from configs.options import parse
from tests.launch import fork_children, launch


def run(module, *arguments, prepare=fork_children):
    return launch(f"benchmarks.{module}", *arguments, prepare=prepare)


@pytest.fixture
def base(tmp_path):
    """A config file with very small networks."""
    path = tmp_path / "tiny.txt"
    path.write_text("num_iters = 4\nnum_pairs = 2\nnum_pts = 8\nnum_samples_ray = 4\ncoupling_width = 32\n"
                    "affine_width = 16\naffine_layers = 3\nfield_width = 32\nstart_interval = 250\n")
    return path


@pytest.mark.parametrize("folder,base", [(PRESETS, BASE), (PRESETS / "fast", Path("configs/fast.txt"))])
def test_every_preset_changes_one_thing_of_the_base(folder, base):
    paths = sorted(set(folder.glob("*.txt")) - {base})
    assert paths
    for path in paths:
        cell = Cell(str(path), str(base), "clip", 3)
        options, plain = vars(cell_options(cell)), vars(parse("train", ["--config", str(base)]))
        changed = {k for k in options if options[k] != plain[k]} - {"data_dir", "seed", "reload", "device", "config"}
        assert changed == set(file_options(str(path))), path
        assert len(changed) == 1 or path.stem == "error_map_random", path


def test_the_base_is_a_short_small():
    small, base = file_options("configs/small.txt"), file_options(str(BASE))
    assert {k for k in small.keys() | base.keys() if small.get(k) != base.get(k)} == {
        "expname", "num_iters", "num_pairs", "i_img"}


def test_ablation_runs_what_is_missing_and_writes_the_tables(base, small_sequence, tmp_path):
    arguments = ("--base", base, "--presets", "smoothness", "--scenes", "", "--clips", small_sequence,
                 "--seeds", 1, "--out", tmp_path / "out")
    first = run("ablation", *arguments)
    assert first.returncode == 0, first.stderr
    cells = sorted((tmp_path / "out" / "cells").iterdir())
    assert len(cells) == 2 and "| smoothness |" in first.stdout and "| tiny |" in first.stdout
    record = json.loads(cells[0].read_text())
    assert record["steps"] == 4 and 0 <= record["curve"][-1]["average_jaccard"] <= 1 and record["peak_bytes"] > 1 << 20
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 5_000
    before = [path.stat().st_mtime_ns for path in cells]
    cells[1].unlink()
    assert run("ablation", *arguments, prepare=None).returncode == 0  # a fresh process for the missing cell
    after = [path.stat().st_mtime_ns for path in cells]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]


def test_a_run_of_a_given_time_and_a_failing_one(base, small_sequence, tmp_path):
    broken = tmp_path / "broken.txt"
    broken.write_text("num_pairs = 0\n")
    result = run("convergence", base, broken, "--scenes", "", "--clips", small_sequence, "--seeds", 1, "--looks", 2,
                 "--steps", "tiny=2", "--target", "0.01", "--out", tmp_path / "out")
    assert result.returncode == 1 and "failed: broken-small-1" in result.stderr
    assert "| tiny | 2 |" in result.stdout
    cell = Cell(str(base), str(base), str(small_sequence), 1, 0, 0.5)
    path = tmp_path / "timed.json"
    done = run("experiments", json.dumps(vars(cell)), path)
    assert done.returncode == 0, done.stderr
    assert json.loads(path.read_text())["steps"] >= 1
    assert Path(tmp_path / "out" / "convergence.png").stat().st_size > 5_000


def records(values):
    return [{"cell": {"clip": clip, "seed": seed}, "steps": 10, "seconds": 2.0, "peak_bytes": 1 << 30,
             "curve": [{"step": 10, "seconds": 2.0, "average_pts_within_thresh": v, "average_jaccard": v,
                        "occlusion_accuracy": v}]} for (clip, seed), v in values.items()]


def test_means_differences_and_their_errors():
    one = {("a", 1): 0.2, ("b", 1): 0.4, ("a", 2): 0.4, ("b", 2): 0.6}
    assert means_of_seeds(one) == pytest.approx([0.3, 0.5])
    two = {key: v + d for (key, v), d in zip(one.items(), (0.1, 0.1, 0.3, 0.3), strict=True)}
    mean, error = difference(two, one)
    assert mean == pytest.approx(0.2) and error == pytest.approx((0.04 / 3 / 4) ** 0.5)
    assert difference({}, one) is None
    lines = table({"base": records(one), "two": records(two)}, "base").splitlines()
    assert "+0.200 ± 0.058" in lines[3] and "0.400 ± 0.141" in lines[2]


def test_time_to_a_target_is_between_two_looks():
    def runs(points):
        return [{"curve": [{"step": s, "seconds": t, "average_pts_within_thresh": v} for s, t, v in points]}]

    slow = runs([(1, 10.0, 0.2), (2, 20.0, 0.4)])
    assert time_to(0.3, slow) == pytest.approx(15.0) and time_to(0.1, slow) == 10.0
    assert time_to(0.5, slow) != time_to(0.5, slow), "NaN"
