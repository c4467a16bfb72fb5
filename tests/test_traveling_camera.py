"""configs/fast.txt on a rendered clip whose camera pans over four widths, zooms by 4 and turns by 180 degrees: the maps
stay one-to-one, and the layers start with the motion of the background and of the object."""

import numpy as np
import pytest
import torch

from configs.options import parse
from loaders.sequence import open_sequence
from models.coords import denormalize_pixels, normalize_pixels
from preprocessing.pipeline import Method, build_store
from preprocessing.synthetic.render import write_scene
from preprocessing.synthetic.scenes import build_layers
from training.failure_modes import (
    MAX_NOT_INVERTIBLE,
    MAX_ROUND_TRIP,
    ROUND_TRIP_SIDE,
    invertibility_findings,
    not_invertible,
)
from training.trainer import Trainer

SIZE, T, STEPS = (48, 48), 32, 60
OBJECT, GROUND = 0.5, 1.5  # depths of the two motion layers


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """After STEPS steps, which are all of its run."""
    folder = tmp_path_factory.mktemp("travel")
    write_scene(folder / "seq", "travel", SIZE, T, seed=0, num_points=16)
    build_store(open_sequence(folder / "seq"), Method(pairs="log"))
    out = Trainer(parse("train", ["--config", "configs/fast.txt", "--data_dir", str(folder / "seq"), "--save_dir",
                                  str(folder / "out"), "--device", "cpu", "--num_iters", str(STEPS),
                                  "--grid_layers", "2"]))
    out.start = [p.detach().clone() for p in out.model.deform.parameters()]
    for _ in range(STEPS):
        out.train_step()
    return out


def mapped(model, p, depth, i, j):
    """Pixels `(n, 2)` in frame j of pixels p `(n, 2)` of frame i at a depth."""
    x = normalize_pixels(torch.from_numpy(p).float(), SIZE)
    x = torch.cat([x, torch.full_like(x[:, :1], depth)], -1)[None]
    with torch.no_grad():
        there = model.maps(torch.tensor([j])).to_local(model.maps(torch.tensor([i])).to_canonical(x))
    return denormalize_pixels(there[0, :, :2], SIZE).numpy()


def test_every_position_comes_back_in_every_frame_and_layer(trainer):
    model = trainer.model
    moved = [(p - q).abs().max() for p, q in zip(model.deform.parameters(), trainer.start, strict=True)]
    assert max(moved) > 0  # the maps have been trained
    side = torch.linspace(-1, 1, ROUND_TRIP_SIDE)
    xy = torch.cartesian_prod(side, side)
    maps = model.maps(torch.arange(T))
    for depth in (OBJECT, GROUND):
        x = torch.cat([xy, torch.full_like(xy[:, :1], depth)], -1).expand(T, -1, -1)
        with torch.no_grad():
            back = maps.to_local(maps.to_canonical(x))
        error = (denormalize_pixels(back[..., :2], SIZE) - denormalize_pixels(x[..., :2], SIZE)).norm(dim=-1)
        shares = 1 - (error <= MAX_ROUND_TRIP).float().mean(1)
        assert shares.max() < MAX_NOT_INVERTIBLE
    assert not invertibility_findings(not_invertible(model))


def test_the_background_is_where_it_is(trainer):
    """Between adjacent frames, and over intervals after which half of it has left the frame."""
    ground = build_layers("travel", SIZE, T, 0)[0]
    p = np.stack(np.meshgrid(np.linspace(0, 47, 7), np.linspace(0, 47, 7)), -1).reshape(-1, 2)
    errors = []
    for i in range(T):
        for j in (i - 4, i + 1, i + 4):
            if 0 <= j < T:
                q = ground.project(ground.look_up(p, i)[0], j)[0]
                inside = ((q >= 0) & (q <= 47)).all(-1)
                errors += np.linalg.norm(mapped(trainer.model, p[inside], GROUND, i, j) - q[inside], axis=-1).tolist()
    assert len(errors) > 1_500 and np.median(errors) < 0.5 and np.max(errors) < 3


def test_the_object_is_where_it_is(trainer):
    """In the second half of the clip; before, it is only a few pixels wide."""
    surface = build_layers("travel", SIZE, T, 0)[1]
    m = np.array([[0.0, 0.0], [4, 0], [-4, 0], [0, 3], [0, -3]])
    errors = []
    for i in range(T // 2, T):
        for j in range(T // 2, T, 3):
            p, q = surface.project(m, i)[0], surface.project(m, j)[0]
            errors += np.linalg.norm(mapped(trainer.model, p, OBJECT, i, j) - q, axis=-1).tolist()
    assert np.median(errors) < 0.5 and np.max(errors) < 3
