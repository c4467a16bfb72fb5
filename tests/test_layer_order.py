"""Which motion layer hides which."""

from itertools import permutations

import numpy as np
import pytest

from common.geometry import inside
from training.layer_order import front_to_back, hidden_counts


def plain_counts(layer, tracks, visible, expected, size, spacing):
    """`hidden_counts` by its definition, one track and frame after the other."""
    S, T = expected.shape[:2]
    out = np.zeros((S, S), int)

    def cell(point):
        return np.maximum(point, 0) // spacing

    def is_covered(t, point, by):
        for other in np.flatnonzero((layer == by) & visible[:, t]):
            if np.abs(cell(point) - cell(tracks[other, t])).max() <= 1:
                return True
        return False

    for t in range(T):
        for n in np.flatnonzero((layer >= 0) & ~visible[:, t]):
            point = expected[layer[n], t, n]
            if inside(point, size) and not is_covered(t, point, layer[n]):
                for by in range(S):
                    out[layer[n], by] += is_covered(t, point, by)
    return out


@pytest.mark.parametrize("size,spacing", [((20, 30), 4), ((33, 17), 3), ((9, 9), 1)])
def test_hidden_tracks_are_counted_by_the_layer_that_covers_them(size, spacing):
    rng = np.random.default_rng(0)
    S, N, T = 3, 40, 5
    span = np.array(size[::-1]) - 1
    layer = rng.integers(-1, S, N)
    tracks = rng.uniform(0, span, (N, T, 2))
    visible = rng.random((N, T)) < 0.3
    expected = rng.uniform(-0.2 * span, 1.2 * span, (S, T, N, 2))
    counts = hidden_counts(layer, tracks, visible, expected, size, spacing)
    assert counts.sum() > 0
    assert np.array_equal(counts, plain_counts(layer, tracks, visible, expected, size, spacing))


@pytest.mark.parametrize("order", list(permutations((1, 2, 3))))
def test_a_layer_is_behind_those_that_hide_it(order):
    h = np.random.default_rng(1).integers(0, 5, (4, 4))  # the background's counts have no influence
    for k, near in enumerate(order):
        for far in order[k + 1:]:
            h[far, near] += 10
    assert front_to_back(h) == [*order, 0]


def test_without_evidence_the_layer_that_was_found_last_is_nearest():
    assert front_to_back(np.zeros((4, 4), int)) == [3, 2, 1, 0]
