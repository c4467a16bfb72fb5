"""Order of motion layers from near to far, by which of them hides which.

A layer whose tracks disappear where another layer's tracks are seen is behind the other one.

Notation
    S, N, T  layers, the background first; tracks; frames
    h        h[a, b]: number of times that a track of layer a is not seen in a frame although its motion takes it into
             the frame, to a place where tracks of layer b are seen and none of its own  (S, S)
"""

from itertools import permutations

import cv2
import numpy as np

from common.geometry import inside


def hidden_counts(layer: np.ndarray, tracks: np.ndarray, visible: np.ndarray, expected: np.ndarray,
                  size: tuple[int, int], spacing: int) -> np.ndarray:
    """h of the tracks of a grid of points.

    layer:    (N,) index of each track's layer, -1: of none
    tracks:   (N, T, 2) pixels
    visible:  (N, T) bool
    expected: (S, T, N, 2): where the motion of each layer takes every track
    size:     (H, W) of the frames
    spacing:  of the grid, pixels"""
    S, T = expected.shape[:2]
    cells = -(-size[0] // spacing), -(-size[1] // spacing)
    out = np.zeros((S, S), np.int64)
    for t in range(T):
        covered = np.stack([_covered(tracks[(layer == a) & visible[:, t], t], cells, spacing) for a in range(S)])
        for a in range(S):
            hidden = expected[a, t, (layer == a) & ~visible[:, t]]
            y, x = _cell(hidden[inside(hidden, size)], cells, spacing)
            out[a] += (covered[:, y, x] & ~covered[a, y, x]).sum(axis=1)
    return out


def _covered(points: np.ndarray, cells: tuple[int, int], spacing: int) -> np.ndarray:
    """The cells of a grid that have one of the points `(n, 2)` in them or in a neighbor, `cells` bool."""
    out = np.zeros(cells, np.uint8)
    out[_cell(points, cells, spacing)] = 1
    return cv2.dilate(out, np.ones((3, 3), np.uint8)) > 0


def _cell(points: np.ndarray, cells: tuple[int, int], spacing: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the cell of each point `(n, 2)`."""
    x, y = np.clip(points // spacing, 0, (cells[1] - 1, cells[0] - 1)).astype(np.int64).T
    return y, x


def front_to_back(h: np.ndarray) -> list[int]:
    """Indices of the layers, nearest first, the background (0) last: the order that fewest hidden tracks contradict.

    Without a difference, a layer that was found later is nearer."""
    foreground = range(len(h) - 1, 0, -1)
    orders = permutations(foreground)  # the first one is `foreground` itself
    return [*min(orders, key=lambda order: _contradictions(h, order)), 0]


def _contradictions(h: np.ndarray, order: tuple[int, ...]) -> int:
    """Number of times that a layer is hidden by one that is behind it in the order."""
    return sum(h[near, far] for k, near in enumerate(order) for far in order[k + 1:])
