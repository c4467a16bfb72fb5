"""Tracks that follow the correspondences' flow where it can be trusted, and the model elsewhere.

Flow between adjacent frames is more precise than a model that was fitted to it, but it loses a point that is hidden
once, and cannot tell. The model knows where the point comes out again. Each is used for what it is better at.

Notation
    M, T      query points, frames
    x         position (x, y) in pixels
    a, b      a frame and the next one, away from the query's frame on either side
    fb        forward-backward error: where a point is after the flow from a to b and back, pixels
    followed  (M, T) bool: the position is that of the flow from the frame before, and fb was at most MAX_FB; or it is
              the model's, and a correspondence of an earlier frame in which the point was followed confirms it
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from models.omnimotion import OmniMotion
from models.tracker import Tracker, Tracks
from preprocessing.baselines import MAX_FB, sample

CONFIRMED = 1 / 256  # of the frame's longer side: farthest from the model's position that a correspondence may end
INTERVALS = (2, 3, 4, 6, 8, 12, 16, 24, 32)  # frames between a confirming correspondence's ends


class FlowTracker(Tracker):
    """A Tracker whose tracks go with the flow of `store` (loaders/store.py) until it breaks; then they are the model's,
    and hidden, until a stored correspondence confirms these: from there they go with the flow again. A point is
    visible where it is followed and the model does not hide it; depths and scores are the model's."""

    def __init__(self, model: OmniMotion, store, use_max_loc: bool = True, occlusion_th: float = 0.99,
                 chunk_size: int = 2_048):
        super().__init__(model, use_max_loc, occlusion_th, chunk_size)
        self.store = store

    def track(self, query_points: np.ndarray, frames: Sequence[int] | None = None) -> Tracks:
        """As Tracker.track."""
        tracks = super().track(query_points)
        tracks.tracks, followed = follow(query_points, tracks.tracks, self.store)
        tracks.visible &= followed
        return tracks if frames is None else Tracks(*(value[:, list(frames)] for value in vars(tracks).values()))


def follow(query_points: np.ndarray, model: np.ndarray, store) -> tuple[np.ndarray, np.ndarray]:
    """Positions `(M, T, 2)` float32 and `followed` `(M, T)` of query points `(M, 3)` = (t, y, x), whose positions by
    the model are `model` `(M, T, 2)`."""
    M, T = model.shape[:2]
    start = query_points[:, 0].astype(np.int64)
    tracks, followed = model.astype(np.float32), np.zeros((M, T), bool)
    tracks[np.arange(M), start], followed[np.arange(M), start] = query_points[:, :0:-1], True
    border = np.array(store.size[::-1]) - 0.5
    flow = lru_cache(2)(lambda a, b: store.dense(a, b).flow)
    for step, frames in ((1, range(T - 1)), (-1, range(T - 1, 0, -1))):
        for a in frames:
            b, begun = a + step, start <= a if step > 0 else start >= a
            rows = np.flatnonzero(begun & followed[:, a])
            if len(rows) and store.counts[a, b] and store.counts[b, a]:
                x = tracks[rows, a]
                move = sample(flow(a, b), x)
                fb = np.linalg.norm(move + sample(flow(b, a), x + move), axis=-1)
                good = (fb <= MAX_FB) & ((x + move >= -0.5) & (x + move <= border)).all(axis=-1)
                tracks[rows[good], b], followed[rows[good], b] = (x + move)[good], True
            lost = np.flatnonzero(begun & ~followed[:, b])
            followed[lost, b] = _confirmed(tracks[lost], followed[lost], start[lost], b, step, store)
    return tracks, followed


def _confirmed(tracks: np.ndarray, followed: np.ndarray, start: np.ndarray, b: int, step: int, store) -> np.ndarray:
    """Which of the positions in frame b of `tracks` `(m, T, 2)` a stored correspondence confirms, `(m,)` bool."""
    near, (H, W) = CONFIRMED * max(store.size), store.size
    out = np.zeros(len(tracks), bool)
    for interval in INTERVALS:
        a = b - step * interval
        if not 0 <= a < store.num_frames or not store.counts[a, b]:
            continue
        rows = np.flatnonzero(~out & followed[:, a] & ((start <= a) if step > 0 else (start >= a)))
        if not len(rows):
            continue
        x = tracks[rows, a]
        column, row = np.rint(x).astype(np.int64).T
        inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
        rows, x, pixels = rows[inside], x[inside], (row * W + column)[inside]
        pair = store.index(a, b)
        places, stored = pair.find(pixels)
        rows, x, places, pixels = rows[stored], x[stored], places[stored], pixels[stored]
        end = x + pair.flow(places)
        out[rows] = pair.cycle_at(pixels) & (np.linalg.norm(end - tracks[rows, b], axis=-1) <= near)
    return out
