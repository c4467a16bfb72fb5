"""The start from two layers of motion: of a background and of what moves against it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configs.options import parse
from errors import UserError
from loaders.store_format import DensePair
from models.grids import GridNetwork
from trainer import Trainer
from training.motion_layers import two_layers

H, W, T = 96, 128, 9


class Moving:
    """Correspondences of a background that follows similarities and a square that moves against it."""

    def __init__(self, background, square, size=(H, W), num_frames=T):
        self.num_frames, self.size, self.background, self.square = num_frames, size, background, square
        self.counts = np.ones((num_frames, num_frames), int)

    def place(self, t, p):
        """Where background points, and the square's, of the frame before all motion are in frame t."""
        a, s, shift = (value * t for value in self.background)
        R = (1 + s) * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
        return p @ R.T + shift, p + np.asarray(self.square) * t

    def back(self, t, p):
        a, s, shift = (value * t for value in self.background)
        R = (1 + s) * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
        return (p - shift) @ np.linalg.inv(R).T

    def dense(self, i, j):
        H, W = self.size
        p = np.stack(np.meshgrid(np.arange(W), np.arange(H)), -1).astype(float)
        home = p - np.asarray(self.square) * i
        inside = (np.abs(home - [60, 50]) < 16).all(-1)
        to = np.where(inside[..., None], home + np.asarray(self.square) * j, self.place(j, self.back(i, p))[0])
        believed = ((to >= 0) & (to <= [W - 1, H - 1])).all(-1)
        return DensePair((to - p).astype(np.float32), believed, believed, ~believed)


@pytest.fixture
def scene():
    return Moving((0.004, 0.003, np.array([1.5, -0.5])), [-2.0, 1.0])


def vertices(sides=9, size=(H, W)):
    return np.stack(np.meshgrid(np.linspace(-12, size[1] + 12, sides), np.linspace(-9, size[0] + 9, sides)), -1)


@pytest.mark.parametrize("size", [(301, 533), (533, 301), (130, 130)])
@pytest.mark.parametrize("num_frames", [2, 5])
def test_the_background_of_frames_larger_than_the_raster(size, num_frames):
    scene, p = Moving((0.004, 0.003, np.array([1.5, -0.5])), [-3.0, 1.0], size, num_frames), vertices(9, size)
    far, m = two_layers(scene, p)[1], num_frames // 2
    for t in range(num_frames):
        assert np.abs(far[t] - (scene.place(m, scene.back(t, p))[0] - p)).max() < 0.5, t


def test_the_background_is_found_everywhere_and_what_moves_where_it_is(scene):
    p = vertices()
    near, far = two_layers(scene, p)
    for t in range(T):
        expected = scene.place(T // 2, scene.back(t, p))[0] - p
        assert np.abs(far[t] - expected).max() < 0.3, t
        centre = np.array([60, 50]) + np.array(scene.square) * t  # of the square
        vertex = np.unravel_index(np.linalg.norm(p - centre, axis=-1).argmin(), p.shape[:2])
        moved = np.array(scene.square) * (T // 2 - t)
        if abs(t - T // 2) >= 2:  # it is apart from the background by more than 3/256 of the frame
            assert np.abs(near[t][vertex] - moved).max() < 0.5, t
    assert np.allclose(near[T // 2], 0) and np.allclose(far[T // 2], 0)


def test_nothing_moves_in_a_still_clip():
    near, far = two_layers(Moving((0.0, 0.0, np.zeros(2)), [0.0, 0.0]), vertices())
    assert np.allclose(near, 0, atol=1e-3) and np.allclose(far, 0, atol=1e-3)


def test_frames_without_adjacent_flow_take_the_background_of_the_next(scene):
    scene.counts[1] = scene.counts[:, 1] = 0
    near, far = two_layers(scene, vertices())
    assert np.isfinite(near).all() and np.allclose(far[1], far[2]) and np.allclose(near[0], far[0])


def test_a_network_starts_at_the_displacements(scene):
    network = GridNetwork(T, num_levels=3)
    near, far = (torch.randn(T, 9, 9, 2) * 0.02 for _ in range(2))
    network.start_at(near, far)
    maps, flat = network.bind(torch.arange(T)), network.vertices().reshape(1, 81, 2).expand(T, -1, -1)
    for depth, displacement in ((-0.1, near), (0.3, near), (0.6, near), (1.4, far), (2.1, far)):
        x = torch.cat([flat, torch.full((T, 81, 1), depth)], -1)
        assert torch.allclose(maps.to_canonical(x), x + torch.nn.functional.pad(displacement.flatten(1, 2), (0, 1)),
                              atol=1e-5)


def test_a_run_starts_so_and_mlps_refuse(small_sequence, tmp_path):
    arguments = ["--data_dir", str(small_sequence), "--save_dir", str(tmp_path), "--num_pairs", "2", "--num_pts", "8",
                 "--num_samples_ray", "4", "--no_reload", "--device", "cpu", "--init_layers", "1"]
    trainer = Trainer(parse("train", [*arguments, "--deform", "grid", "--field", "grid", "--grid_levels", "3"]))
    T, p = len(trainer.sequence), torch.tensor([[[20.0, 30.0], [40, 20]]])
    stored = trainer.sampler.store.dense(0, T // 2)
    moved = trainer.model.correspond(p, torch.tensor([0]), torch.tensor([T // 2]))[0]
    plain = SimpleNamespace(**vars(trainer.options) | {"init_layers": 0})
    still = Trainer(plain).model.correspond(p, torch.tensor([0]), torch.tensor([T // 2]))[0]
    truth = p + torch.from_numpy(stored.flow[[30, 20], [20, 40]])
    assert (moved - truth).norm(dim=-1).mean() < (still - truth).norm(dim=-1).mean()
    with pytest.raises(UserError, match="--init_layers 1 has no grids"):
        Trainer(parse("train", arguments))
