"""Baselines on known flow from a stand-in for the correspondence store."""

from types import SimpleNamespace

import numpy as np

from common.geometry import sample
from evaluation.baselines import chained_flow_tracks, static_tracks


class Store:
    """Flow (dx, dy) a step for all pixels, negated backward; `spoiled` steps lead back to somewhere else."""
    size, num_frames, root, pairs = (30, 40), 6, "store", np.array([[0, 1], [1, 0]])

    def __init__(self, velocity, spoiled=()):
        self.velocity, self.spoiled = np.float32(velocity), spoiled

    def dense(self, i, j):
        flow = np.tile(self.velocity * (j - i), (*self.size, 1))
        if (i, j) in self.spoiled:
            flow[..., 0] += 5
        return SimpleNamespace(flow=flow)

    def index(self, i, j):
        return SimpleNamespace(count=self.size[0] * self.size[1])


def test_static_points_stay():
    out = static_tracks(np.array([[2, 7, 5], [0, 1, 3]], np.float32), 4, (30, 40))
    assert out.tracks.shape == (2, 4, 2) and (out.tracks[0] == (5, 7)).all() and (out.tracks[1] == (3, 1)).all()
    assert out.visible.all() and out.frame_size == (30, 40)


def test_chain_adds_up_in_both_directions():
    out = chained_flow_tracks(np.array([[0, 10, 8], [3, 12, 20]], np.float32), Store((2, 1)))
    steps = np.arange(6)[:, None]
    assert np.allclose(out.tracks[0], (8, 10) + steps * (2, 1))
    assert np.allclose(out.tracks[1], (20, 12) + (steps - 3) * (2, 1))
    assert out.visible.all()


def test_point_is_occluded_from_an_inconsistent_step_on():
    queries = np.array([[0, 10, 8], [4, 10, 8]], np.float32)
    out = chained_flow_tracks(queries, Store((1, 0), spoiled=[(3, 2)]))
    assert out.visible[0].tolist() == [True, True, True, False, False, False]  # the step 2 -> 3 does not lead back
    assert out.visible[1].tolist() == [False, False, False, True, True, True]  # nor does 3 -> 2
    assert np.allclose(out.tracks[0, :, 0], 8 + np.arange(6))                  # its position is chained on


def test_point_outside_the_frame_is_not_visible():
    out = chained_flow_tracks(np.array([[0, 10, 36], [2, 10, 39.4]], np.float32), Store((2, 0)))
    assert out.visible[0].tolist() == [True, True, False, False, False, False]
    assert out.visible[1].tolist() == [True, True, True, False, False, False]


def test_sampling_is_bilinear_and_holds_at_the_border():
    y, x = np.mgrid[:5, :7].astype(np.float32)
    ramp = np.stack([2 * x, 3 * y + x], -1)
    points = np.array([[1.25, 3.5], [6, 4], [0, 0]], np.float32)
    assert np.allclose(sample(ramp, points), np.stack([2 * points[:, 0], 3 * points[:, 1] + points[:, 0]], -1))
    assert np.allclose(sample(ramp, np.array([[-4, 9]], np.float32)), [[0, 12]])
