"""Point tracks from optical flow over several intervals, without a model (MFT, Neoral et al., WACV 2024).

Notation
    M, T       points, frames
    a, b       source and target frame of one flow; its interval is |a - b|
    e          forward-backward error of one flow at a point, pixels: distance of the point from itself after going from
               a to b and back
    S          squared error of a path: sum of e^2 over its flows, square pixels; a FlowStep may add to e^2
    direction  1: frames after the query; -1: frames before it

A point in frame b is reached by one flow from each of the frames b - 1, b - 2, b - 4, ... in which its position is
known, and from its query frame. Of these candidates, the visible one with the smallest S is taken. Long intervals pass
over occlusions, and a path of few flows drifts little.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.geometry import inside

INTERVALS = (1, 2, 4, 8, 16, 32, 64, 128)
MAX_ERROR = 3 / 256    # share of the frame's longer side: a point is hidden where sqrt(S) is larger
HIDDEN_COST = 1e12     # square pixels, added to S: a hidden candidate is taken only if there is no visible one

# (a, b, points (n, 2)) -> (positions in b (n, 2), squared error (n,)), or None if there is no flow between a and b. The
# error is infinite where a point has no flow.
FlowStep = Callable[[int, int, np.ndarray], tuple[np.ndarray, np.ndarray] | None]


class Proposal(Protocol):
    """Another source of positions, such as a model."""

    def candidates(self, rows: np.ndarray, b: int, direction: int, paths: "Paths") -> "Candidates":
        """Candidates for points `rows` `(n,)` in frame b. `paths` is filled in from the queries to the frame before.
        Called once for each frame, in order of the direction."""


@dataclass
class Candidates:
    """Positions of n points in a frame."""
    positions: np.ndarray  # (n, 2) pixels
    squared: np.ndarray    # (n,): S
    visible: np.ndarray    # (n,) bool
    certain: np.ndarray    # (n,) bool: replaces the candidates of flow


@dataclass
class Paths:
    """Tracks of M points through T frames."""
    tracks: np.ndarray         # (M, T, 2) float32 pixels; NaN where no flow leads to the frame
    squared_error: np.ndarray  # (M, T) float32: S; infinite where no flow leads to the frame
    visible: np.ndarray        # (M, T) bool: sqrt(S) is small, and the point was inside all frames of its path


def follow_intervals(query_points: np.ndarray, num_frames: int, size: tuple[int, int], step: FlowStep,
                     proposal: Proposal | None = None) -> Paths:
    """Follow query points `(M, 3)` = (t, y, x) through all frames of `size` (H, W), forward and backward in time.

    `proposal`: one more candidate in each frame."""
    M = len(query_points)
    start = np.round(query_points[:, 0]).astype(np.int64)
    # All points of a frame are adjacent in memory, because `_reach` works on one frame at a time.
    out = Paths(np.full((num_frames, M, 2), np.nan, np.float32).swapaxes(0, 1),
                np.full((num_frames, M), np.inf, np.float32).T, np.zeros((num_frames, M), bool).T)
    every = np.arange(M)
    out.tracks[every, start] = query_points[:, :0:-1]
    out.squared_error[every, start] = 0
    out.visible[every, start] = True
    if M:
        queried = {int(t): np.flatnonzero(start == t) for t in np.unique(start)}
        for b in range(start.min() + 1, num_frames):
            _reach(out, start, queried, b, 1, size, step, proposal)
        for b in range(start.max() - 1, -1, -1):
            _reach(out, start, queried, b, -1, size, step, proposal)
    return out


def _reach(out: Paths, start: np.ndarray, queried: dict[int, np.ndarray], b: int, direction: int,
           size: tuple[int, int], step: FlowStep, proposal: Proposal | None) -> None:
    """Fill in frame b for all points whose query frame `start` `(M,)` comes before it in the direction.

    `queried`: query frame -> its points."""
    max_squared = (MAX_ERROR * max(size)) ** 2
    lowest = np.full(len(start), np.inf)  # cost of the best candidate so far

    def offer(rows: np.ndarray, positions: np.ndarray, squared: np.ndarray, seen: np.ndarray) -> None:
        """Take positions `(n, 2)` for points `rows` `(n,)` where they cost less than the best candidate so far.

        `squared` `(n,)`: S. `seen` `(n,)` bool: whether the point is visible in the frame that the flow starts from; of
        the proposal, whether it is visible in b."""
        visible = seen & (squared <= max_squared) & inside(positions, size)
        cost = squared + HIDDEN_COST * ~visible
        better = cost < lowest[rows]
        chosen = rows[better]
        lowest[chosen] = cost[better]
        out.tracks[chosen, b] = positions[better]
        out.squared_error[chosen, b] = squared[better]
        out.visible[chosen, b] = visible[better]

    if proposal is not None:
        rows = np.flatnonzero((b - start) * direction > 0)
        found = proposal.candidates(rows, b, direction, out)
        offer(rows, found.positions, found.squared, found.visible)
        # Nothing replaces a certain candidate; at equal cost, flow replaces the others.
        lowest[rows] = np.where(found.certain, -np.inf, np.nextafter(lowest[rows], np.inf))
    frames_before = b if direction > 0 else out.tracks.shape[1] - 1 - b
    candidates = {*INTERVALS, *(direction * (b - t) for t in queried)}
    for interval in sorted(d for d in candidates if 0 < d <= frames_before):
        a = b - direction * interval
        rows = np.flatnonzero((start - a) * direction <= 0) if interval in INTERVALS else queried[a]
        # A path costs at least as much as its part up to frame a.
        rows = rows[out.squared_error[rows, a] + HIDDEN_COST * ~out.visible[rows, a] < lowest[rows]]
        moved = step(a, b, out.tracks[rows, a]) if len(rows) else None
        if moved is not None:
            offer(rows, moved[0], out.squared_error[rows, a] + moved[1], out.visible[rows, a])
