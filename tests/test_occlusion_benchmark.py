"""benchmarks.occlusion: calibration of when tracks are called occluded."""

import json
import sys

import numpy as np
import pytest

from benchmarks import occlusion
from common.cli import run


def random_scene(seed: int, entries: int) -> occlusion.Scene:
    rng = np.random.default_rng(seed)
    return {"score": rng.uniform(0, 1, entries), "hidden": rng.uniform(size=entries) < 0.3,
            "occluded": rng.uniform(size=entries) < 0.3}


def test_quality_is_that_of_all_scenes_with_the_same_weight():
    scenes = [random_scene(seed, entries) for seed, entries in ((0, 500), (1, 100))]
    predicted, occluded = ([scene[key] for scene in scenes] for key in ("hidden", "occluded"))
    wrong, precision, recall = occlusion.quality(predicted[:1], occluded[:1])
    assert np.isclose(wrong, np.mean(predicted[0] != occluded[0]))
    assert np.isclose(precision, occluded[0][predicted[0]].mean())
    assert np.isclose(recall, predicted[0][occluded[0]].mean())

    twice = [np.tile(predicted[0], 2), predicted[1]], [np.tile(occluded[0], 2), occluded[1]]
    assert np.allclose(occlusion.quality(*twice), occlusion.quality(predicted, occluded))
    assert occlusion.quality([np.zeros(9, bool)], [np.zeros(9, bool)]) == [0, 0, 0]


def test_a_row_of_the_table_has_the_quality_of_its_decision():
    scenes = [random_scene(seed, 300) for seed in (0, 1)]
    occluded = [scene["occluded"] for scene in scenes]
    columns, rows = occlusion.table(scenes, (0.3, 0.9), True)
    assert [row[0] for row in rows] == ["model, score above 0.3", "model, score above 0.9", "tracks"]
    decisions = ([scene["score"] > 0.3 for scene in scenes], [scene["score"] > 0.9 for scene in scenes],
                 [scene["hidden"] for scene in scenes])
    for row, predicted in zip(rows, decisions, strict=True):
        assert row[1:] == [f"{value:.2%}" for value in occlusion.quality(predicted, occluded)]
    assert len(columns) == len(rows[0])


def test_the_command_measures_each_scene_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(occlusion, "SCENES", ("easy",))
    arguments = ["--size", "48", "--num_frames", "6", "--seeds", "2", "--num_iters", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["occlusion", *arguments])
    run(occlusion.main)
    printed = capsys.readouterr().out
    table = json.loads((tmp_path / "occlusion_errors.json").read_text())
    assert len(table["rows"]) == len(occlusion.THRESHOLDS) and table["rows"][0][1] in printed
    files = sorted(tmp_path.glob("easy*.npz"))
    assert len(files) == 2
    with np.load(files[0]) as scene:
        assert len({scene[key].shape for key in ("score", "hidden", "occluded")}) == 1
        assert len(scene["score"]) > 100

    monkeypatch.setattr(occlusion, "measure", lambda *args: pytest.fail("measured again"))
    run(occlusion.main)
    assert capsys.readouterr().out == printed


def test_one_seed_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["occlusion", "--seeds", "1"])
    with pytest.raises(SystemExit) as stop:
        run(occlusion.main)
    assert stop.value.code == 2 and "--seeds" in capsys.readouterr().err
