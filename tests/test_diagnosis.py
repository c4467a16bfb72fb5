"""The detectors of wrong surface order and of doubled objects, on volumes that are built to have them or not."""

import json
import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.omnimotion import ModelConfig, OmniMotion
from training.failure_modes import (
    WARNING_SHARE,
    Shares,
    diagnose,
    diagnosis_at,
    diagnosis_due,
    examine,
    invertibility_findings,
    not_invertible,
    point_outcomes,
)
from training.monitoring import errors_logged

SIZE, T = (40, 60), 5
QUICK = ("--num_pairs 2 --num_pts 8 --num_samples_ray 4 --deform grid --field grid --grid_levels 2 --start_interval 10 "
         "--no_tensorboard --device cpu").split()
NEAR_Z, FAR_Z, HALF = 0.5, 1.5, 0.12


class Slides:
    """Frame maps in which every depth slides along x by its own speed: u = (x - speed(z) t, y, z)."""

    def __init__(self, ids, speed):
        self.t, self.speed = ids.float(), speed

    def _moved(self, x, sign):
        t = self.t.view(-1, *[1] * (x.dim() - 2))
        return torch.stack([x[..., 0] + sign * self.speed(x[..., 2]) * t, x[..., 1], x[..., 2]], dim=-1)

    def rays_to_canonical(self, x):
        return self._moved(x, -1)

    def to_local(self, u):
        return self._moved(u, 1)


class Built(OmniMotion):
    """A canonical volume of colored boxes (x range, z, color) instead of networks."""

    def __init__(self, boxes, speed):
        super().__init__(ModelConfig(T, *SIZE, num_samples_ray=21, coupling_width=16, affine_width=16, affine_layers=2,
                                     field_width=16))
        self.boxes, self.speed = boxes, speed

    def maps(self, ids):
        return Slides(ids, self.speed)

    def _field(self, u):
        sigma, rgb = torch.zeros(u.shape[:-1]), torch.zeros(*u.shape[:-1], 3)
        for (low, high), z, color in self.boxes:
            inside = (u[..., 0] >= low) & (u[..., 0] < high) & ((u[..., 2] - z).abs() < HALF)
            sigma = torch.where(inside, 20.0, sigma)
            rgb = torch.where(inside[..., None], torch.tensor(color), rgb)
        return rgb, sigma


RED, BLUE = (0.9, 0.1, 0.1), (0.1, 0.2, 0.9)
STEP = 0.25  # of the object's x, in a frame; the frame is 2 wide


def object_at(t):
    """A red object of width 0.4 that starts left of a wall (x > 0) and then passes in front of it."""
    return -0.9 + STEP * t, -0.5 + STEP * t


def points_of_the_object(i, j, n=30):
    """Its pixels in frames i and j, as a correspondence: it is visible everywhere."""
    x = torch.linspace(*object_at(i), n + 2)[1:-1]
    p = torch.stack([(x + 1) / 2 * (SIZE[1] - 1), torch.full((n,), 20.0)], dim=-1)
    return p, p + torch.tensor([STEP * (j - i) / 2 * (SIZE[1] - 1), 0.0])


def shares(model, pairs):
    out = torch.cat([point_outcomes(model, i, j, *points_of_the_object(i, j)) for i, j in pairs], dim=1)
    return dict(zip(("missed", "hidden", "twice"), out.mean(1).tolist(), strict=False))


FAR, NEAR = [(0, 3), (0, 4), (1, 4)], [(0, 1), (1, 2), (3, 4)]


def volume(object_z, wall_z):
    moving = lambda z: torch.where((z - object_z).abs() < 0.3, STEP, 0.0)  # noqa: E731
    return Built([(object_at(0), object_z, RED), ((0.0, 1.0), wall_z, BLUE)], moving)


def test_the_right_order_raises_no_alarm():
    found = shares(volume(NEAR_Z, FAR_Z), NEAR + FAR)
    assert found == {"missed": 0, "hidden": 0, "twice": 0}


def test_an_object_behind_what_it_hides_is_found():
    found = shares(volume(FAR_Z, NEAR_Z), FAR)
    assert found["hidden"] > 0.8 and found["twice"] == 0
    assert "wrong surface order" in Shares(0, 0, found["hidden"], found["twice"], 1).findings()[0].failure


def test_a_doubled_object_is_found():
    """One copy is followed in frames 0 and 1, at a depth that then stands still; the other, elsewhere, from frame 3 on:
    in adjacent frames of either kind all is well."""
    class TwoCopies(Slides):
        def _moved(self, x, sign):
            t = self.t.view(-1, *[1] * (x.dim() - 2))
            slide = torch.where(t < 2.5, STEP * t, 0.0) * ((x[..., 2] - NEAR_Z).abs() < 0.3)  # first copy stops
            slide = slide + STEP * (t - 3) * (t > 2.5) * ((x[..., 2] - 1.1).abs() < 0.3)       # second one begins
            gone = torch.where(t < 2.5, 0.0, -3.0) * ((x[..., 2] - NEAR_Z).abs() < 0.3)        # first one leaves
            gone = gone + torch.where(t < 2.5, -3.0, 0.0) * ((x[..., 2] - 1.1).abs() < 0.3)    # second one is away
            return torch.stack([x[..., 0] + sign * (slide + gone), x[..., 1], x[..., 2]], dim=-1)

    model = Built([(object_at(0), NEAR_Z, RED), (object_at(3), 1.1, RED), ((-5.0, 5.0), FAR_Z + 0.3, BLUE)], None)
    model.maps = lambda ids: TwoCopies(ids, None)
    near, far = shares(model, NEAR), shares(model, FAR)
    assert near == {"missed": 0, "hidden": 0, "twice": 0}
    assert far["twice"] > 0.8 and far["hidden"] == 0
    assert "twice" in Shares(near["missed"], far["missed"], 0, far["twice"], 1).findings()[0].failure


def test_an_untrained_model_is_not_reported_as_doubled():
    assert Shares(0.6, 0.9, 0.0, 0.9, 20).findings() == []
    assert Shares(0.0, WARNING_SHARE, WARNING_SHARE, WARNING_SHARE, 1).findings() == []


def test_examining_a_new_run_is_repeatable(small_sequence, tmp_path):
    """On a rendered sequence; shares are between 0 and 1."""
    from tests.test_training import GRIDS, options
    from training.trainer import Trainer

    trainer = Trainer(options(small_sequence, tmp_path, *GRIDS))
    found = examine(trainer.model, trainer.sampler.store, 0)
    assert all(0 <= share <= 1 for share in (found.near_missed, found.far_missed, found.hidden, found.twice))
    assert found.error > 0 and found == examine(trainer.model, trainer.sampler.store, 0)


@pytest.mark.parametrize("steps,times", [(200, [100, 125, 150, 175, 200]), (100, [50, 63, 75, 88, 100]), (99, [])])
def test_when_a_run_is_examined(steps, times):
    assert [step for step in range(steps + 1) if diagnosis_due(step, steps)] == times


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A trainer of 200 steps whose model hides half of the points and brings back all but 2% of a frame's positions."""
    monkeypatch.setattr("training.failure_modes.examine", lambda *_: Shares(0, 0, 0.5, 0, 1))
    shares = {"first": [0.0, 0.02], "middle": [0.0, 0.0], "last": [0.001, 0.0]}
    monkeypatch.setattr("training.failure_modes.not_invertible", lambda _: shares)
    return SimpleNamespace(options=SimpleNamespace(seed=0, num_iters=200), dir=tmp_path, model=None, step=0,
                           sampler=SimpleNamespace(store=None))


def test_findings_are_added_to_a_file(run, caplog):
    """A resumed run replaces those of the steps that it takes again; a damaged file is replaced."""
    caplog.set_level("INFO")
    path = run.dir / "diagnosis.json"
    path.write_text("[{")
    for run.step in [100, 125, 150, 125]:
        diagnose(run)
    found = json.loads(path.read_text())
    assert [entry["step"] for entry in found] == [100, 125] and all(len(e["warnings"]) == 2 for e in found)
    assert found[-1]["hidden"] == 0.5 and found[-1]["not_invertible"] == 0.02
    assert len(caplog.messages) == 2 * 4 and all("not the last" in line for line in caplog.messages)
    assert diagnosis_at(run.dir, 99) is None and diagnosis_at(run.dir, 124) == found[0]
    assert diagnosis_at(run.dir, 125) == diagnosis_at(run.dir, 200) == found[1]


@pytest.mark.parametrize("content", ["[{", "[3]", '[{"step": 1}]', "{}"])
def test_a_damaged_file_has_no_entries(content, tmp_path):
    (tmp_path / "diagnosis.json").write_text(content)
    assert diagnosis_at(tmp_path, 10) is None


def test_a_store_without_visible_points_still_says_what_is_not_invertible(run, monkeypatch):
    monkeypatch.setattr("training.failure_modes.examine", lambda *_: None)
    diagnose(run)
    (entry,) = json.loads((run.dir / "diagnosis.json").read_text())
    assert entry["not_invertible"] == 0.02 and "hidden" not in entry and len(entry["warnings"]) == 1


def test_failures_are_reported_at_the_end_and_in_the_metrics(small_sequence, tmp_path, monkeypatch, caplog, capsys):
    """Training says them after everything else, and so does the same command again; eval.py writes them."""
    import eval
    import train

    monkeypatch.setattr("training.failure_modes.examine", lambda *_: Shares(0, 0, 0.5, 0, 1))
    common = ["--data_dir", str(small_sequence), "--save_dir", str(tmp_path), *QUICK]
    command = ["train.py", *common, "--num_iters", "100", "--i_img", "0"]
    for _ in range(2):
        caplog.clear()
        monkeypatch.setattr(sys, "argv", command)
        with caplog.at_level(logging.INFO):
            train.main()
        lines = [line for line in caplog.messages if "surface order" in line]
        assert lines[-1] == caplog.messages[-1] and "this run ended" in lines[-1] and "--mask_near" in lines[-1]
    assert len(lines) == 1  # nothing was trained the second time
    monkeypatch.setattr(sys, "argv", ["eval.py", *common, "--annotations", str(small_sequence / "annotations.npz"),
                                      "--query_mode", "first"])
    eval.main()
    found = json.loads((tmp_path / "default_small" / "metrics.json").read_text())["diagnosis"]
    assert found["step"] == 100 and found["hidden"] == 0.5 and found["not_invertible"] <= 0.001
    assert len(found["warnings"]) == 1 and found["warnings"][0] in caplog.messages[-2]


def test_an_error_is_one_warning_and_its_traceback_is_for_debugging(caplog):
    with caplog.at_level(logging.DEBUG), errors_logged("step 7: the diagnosis"):
        raise ValueError("of\ntwo lines")
    warning, debug = caplog.records
    assert warning.levelno == logging.WARNING and warning.exc_info is None
    assert warning.getMessage() == "step 7: the diagnosis failed, training goes on (ValueError: of two lines)"
    assert debug.levelno == logging.DEBUG and debug.exc_info


def broken(*_):
    raise IndexError("no such row")


@pytest.mark.parametrize("name", ["training.monitoring.diagnose", "training.monitoring.pictures_of"])
def test_errors_in_what_looks_at_a_run_do_not_end_it(name, small_sequence, tmp_path, monkeypatch, caplog):
    """The checkpoint is saved before the diagnosis, and training reaches its last step."""
    import train
    from loaders.checkpoint import checkpoints

    saved = []

    def fail(*_):
        saved.append(len(checkpoints(tmp_path / "default_small")))
        broken()

    monkeypatch.setattr(name, fail)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data_dir", str(small_sequence), "--save_dir", str(tmp_path),
                                      *QUICK, "--num_iters", "100", "--i_img", "50", "--keep", "0"])
    with caplog.at_level(logging.WARNING):
        train.main()
    warnings = [line for line in caplog.messages if "no such row" in line]
    assert len(warnings) == len(saved) == (5 if "diagnose" in name else 2)
    assert all("failed, training goes on (IndexError" in line for line in warnings)
    steps = [100, 88, 75, 63, 50]
    assert [path.name for path in checkpoints(tmp_path / "default_small")] == [f"model_{n:06d}.pth" for n in steps]
    if "diagnose" in name:
        assert saved == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["hidden", "twice"])
def test_findings_say_what_to_try(kind):
    (finding,) = Shares(0, 0, 0.5 * (kind == "hidden"), 0.5 * (kind == "twice"), 1).findings()
    assert "--seed" in finding.remedy and "\n" not in str(finding)


# Positions that do not come back

class Folded(Slides):
    """Moves x by `off` pixels on the way back in frame 2, at the depths of the near half, left of the center."""
    off = 0.0

    def to_canonical(self, x):
        return x

    def to_local(self, u):
        here = (self.t == 2) & (u[..., 2] < 1) & (u[..., 0] < 0)
        step = torch.where(here, self.off * 2 / (SIZE[1] - 1), 0.0)
        return torch.stack([u[..., 0] + step, u[..., 1], u[..., 2]], dim=-1)


@pytest.mark.parametrize("off,share", [(0, 0), (0.9, 0), (1.1, 32 / 65), (float("nan"), 32 / 65)])
def test_positions_that_do_not_come_back_are_counted(off, share):
    """Of the middle frame's nearer layer, those of the 32 columns left of the center, in all 65 rows."""
    model = Built([], None)
    model.maps = lambda ids: Folded(ids, torch.zeros_like)
    Folded.off = off
    found = not_invertible(model)
    assert found == {"first": [0, 0], "middle": [pytest.approx(share), 0], "last": [0, 0]}
    findings = invertibility_findings(found)
    assert len(findings) == (share > 0)
    assert all("49.2%" in finding.failure and "middle frame" in finding.failure for finding in findings)


def test_a_few_positions_raise_no_alarm():
    assert invertibility_findings({"first": [0.001], "middle": [0.0], "last": [0.0005]}) == []


@pytest.mark.parametrize("config,layers", [
    ({"deform": "grid", "field": "grid", "grid_levels": 3, "grid_layers": 3}, 3),
    ({"coupling_width": 16, "affine_width": 16, "affine_layers": 2, "field_width": 16}, 2)], ids=["grid", "mlp"])
def test_new_models_are_invertible(config, layers):
    torch.manual_seed(0)
    found = not_invertible(OmniMotion(ModelConfig(T, *SIZE, **config)))
    assert found == {name: [0] * layers for name in ("first", "middle", "last")}


# Stores with little in them

def store_of(pairs, cycle=lambda i, j: True, points=60):
    """A store of `pairs`, each with correspondences that do not move, cycle-consistent where `cycle` says so."""
    counts = np.zeros((T, T), int)
    for i, j in pairs:
        counts[i, j] = points

    def stored(i, j):
        return SimpleNamespace(pixels=np.arange(points), cycle=np.full(points, cycle(i, j)),
                               flow=lambda rows: np.zeros((len(rows), 2)))
    return SimpleNamespace(pairs=np.array(pairs).reshape(-1, 2), counts=counts, stored=stored)


@pytest.fixture
def model():
    return OmniMotion(ModelConfig(T, *SIZE, deform="grid", field="grid", grid_levels=2))


def test_pairs_without_cycle_consistent_points_are_passed_over(model):
    """Across a scene cut a pair can have stored correspondences of which none is cycle-consistent."""
    store = store_of([(0, 1), (1, 0), (0, 4), (4, 0)], cycle=lambda i, j: abs(i - j) == 1)
    assert examine(model, store, seed=0) is None
    store = store_of([(0, 1), (1, 0), (0, 3), (0, 4)], cycle=lambda i, j: (i, j) != (0, 4))
    assert examine(model, store, seed=0).error >= 0


@pytest.mark.parametrize("store", [
    store_of([]), store_of([(0, 1), (1, 2)], points=0), store_of([(0, 1), (1, 0)], cycle=lambda i, j: False),
], ids=["no pairs", "no valid points", "all points occluded"])
def test_a_store_without_visible_points_is_not_examined(store, model):
    assert examine(model, store, seed=0) is None


@pytest.mark.parametrize("pairs,points", [([(2, 3)], 60), ([(2, 3)], 1), ([(0, 1), (1, 2), (2, 1)], 60)],
                         ids=["one pair", "one point", "frames without correspondences"])
def test_a_store_with_few_points_is_examined(pairs, points, model):
    found = examine(model, store_of(pairs, points=points), seed=0)
    assert all(0 <= share <= 1 for share in (found.near_missed, found.far_missed, found.hidden, found.twice))
