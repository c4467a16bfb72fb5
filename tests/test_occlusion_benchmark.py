"""benchmarks.occlusion: calibration of the decision about occlusion."""

import json
import sys

import numpy as np
import pytest

from benchmarks import occlusion
from common.cli import run

THRESHOLD = 0.9


@pytest.fixture
def scene() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"score": rng.uniform(0, 1, 500), "difference": rng.uniform(0, 20, 500),
            "occluded": rng.uniform(size=500) < 0.3}


def test_a_decision_is_the_threshold_or_a_lower_score_and_another_color(scene):
    for s, d in ((0.5, 6), (0.7, 0), (0.7, 100)):
        expected = [score > THRESHOLD or (score > s and difference > d)
                    for score, difference in zip(scene["score"], scene["difference"], strict=True)]
        assert np.array_equal(occlusion.decision(scene, THRESHOLD, s, d), expected)


def test_quality_is_that_of_all_scenes_with_the_same_weight(scene):
    """A scene that is counted twice with twice the entries changes nothing."""
    twice = {key: np.tile(value, 2) for key, value in scene.items()}
    half = {key: value[:100] for key, value in scene.items()}
    found = occlusion.quality([twice, half], THRESHOLD, 0.5, 6)
    assert np.allclose(found, occlusion.quality([scene, half], THRESHOLD, 0.5, 6))

    said = occlusion.decision(scene, THRESHOLD, 0.5, 6)
    wrong, precision, recall = occlusion.quality([scene], THRESHOLD, 0.5, 6)
    assert np.isclose(wrong, np.mean(said != scene["occluded"]))
    assert np.isclose(precision, scene["occluded"][said].mean()) and np.isclose(recall, said[scene["occluded"]].mean())


def test_the_command_measures_a_scene_and_keeps_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(occlusion, "SCENES", ("easy",))
    arguments = ["--size", "48", "--num_frames", "6", "--seeds", "1", "--num_iters", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["occlusion", *arguments])
    run(occlusion.main)
    printed = capsys.readouterr().out
    table = json.loads((tmp_path / "occlusion_errors.json").read_text())
    assert len(table["rows"]) == len(occlusion.SCORES) and table["rows"][0][1] in printed
    with np.load(next(tmp_path.glob("easy*.npz"))) as scene:
        assert len(scene["score"]) == len(scene["difference"]) == len(scene["occluded"]) > 100
        assert (scene["difference"] > 0).any() and (scene["score"] >= 0).all()

    monkeypatch.setattr(occlusion, "_measured", lambda *args: pytest.fail("measured again"))
    run(occlusion.main)
    assert capsys.readouterr().out == printed
