"""Tracks that follow the correspondences' flow where it can be trusted, and the model elsewhere.

Flow between adjacent frames is more precise than a model that was fitted to it, but it loses a point that is hidden
once, and cannot tell. The model knows where the point comes out again. Each is used for what it is better at.

Notation
    M, F      query points, frames first, first + 1, ...
    x, y      positions in pixels: in frame a, and where the flow takes x in frame b
    a, b      a frame and the next one, away from the query's frame on either side
    fb        forward-backward error: where a point is after the flow from a to b and back, pixels
    look      mean distance of the WINDOW x WINDOW colours around a position from those around its query
    followed  (M, F) bool: the position is the flow's, from the query's frame on without a break. Flow breaks where fb
              is more than MAX_FB, outside the frame, and where the model is APART from y and looks better
"""

from collections.abc import Sequence

import numpy as np

from loaders.store import CorrespondenceStore
from loaders.store_format import PairIndex
from models.omnimotion import OmniMotion
from models.tracker import Tracker, Tracks
from preprocessing.baselines import MAX_FB, check_adjacent_flow, corners, sample

APART = 2 / 256  # of the frame's longer side
BETTER = 0.8     # of the flow's look, at most, has the model's where it is believed instead
WINDOW = 5       # positions 1 / 256 of the frame's longer side apart


class FlowTracker(Tracker):
    """A Tracker whose tracks go with the flow of `store` (or of a PublishedFolder) until it breaks, and from there on
    with the model. Whether a point is visible, its depth and its score are the model's. `frames` are the sequence's
    `(T, H, W, 3)` uint8.

    UserError if the store has no flow between adjacent frames."""

    def __init__(self, model: OmniMotion, store: CorrespondenceStore, frames: np.ndarray, use_max_loc: bool = True,
                 occlusion_th: float = 0.99, chunk_size: int = 2_048):
        super().__init__(model, use_max_loc, occlusion_th, chunk_size)
        check_adjacent_flow(store)
        self.store, self.frames = store, frames

    def track(self, query_points: np.ndarray, frames: Sequence[int] | None = None) -> Tracks:
        """As Tracker.track."""
        start, wanted = query_points[:, 0].astype(np.int64), range(self.num_frames) if frames is None else frames
        first, last = min([*start, *wanted], default=0), max([*start, *wanted], default=-1)
        out = super().track(query_points, range(first, last + 1))
        out.tracks = follow(query_points, out.tracks, self.store, self.frames, first)[0]
        return Tracks(*(value[:, np.array(wanted, np.int64) - first] for value in vars(out).values()))


def follow(query_points: np.ndarray, model: np.ndarray, store: CorrespondenceStore, frames: np.ndarray,
           first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positions `(M, F, 2)` float32 and `followed` `(M, F)` of query points `(M, 3)` = (t, y, x), whose positions by
    the model in frames first, first + 1, ..., theirs among them, are `model` `(M, F, 2)`."""
    M, F = model.shape[:2]
    start, side = query_points[:, 0].astype(np.int64) - first, max(store.size)
    tracks, followed = model.astype(np.float32), np.zeros((M, F), bool)
    tracks[np.arange(M), start], followed[np.arange(M), start] = query_points[:, :0:-1], True
    border, own = np.array(store.size[::-1]) - 0.5, np.empty((M, WINDOW ** 2, 3), np.float32)
    for t in np.unique(start):
        own[start == t] = _colours(frames[first + t], query_points[start == t, :0:-1], side)
    for step, there_from in ((1, range(F - 1)), (-1, range(F - 1, 0, -1))):
        for a in there_from:
            b = a + step
            rows = np.flatnonzero(followed[:, a] & (start <= a if step > 0 else start >= a))
            if not len(rows):
                continue
            there, back = (store.index(first + i, first + j) for i, j in ((a, b), (b, a)))
            move = _flow(there, tracks[rows, a], store.size)
            y = tracks[rows, a] + move
            good = np.linalg.norm(move + _flow(back, y, store.size), axis=-1) <= MAX_FB
            good &= ((y >= -0.5) & (y <= border)).all(axis=-1)
            apart = np.flatnonzero(good & (np.linalg.norm(y - model[rows, b], axis=-1) > APART * side))
            look, models = (_look(own[rows[apart]], _colours(frames[first + b], p[apart], side))
                            for p in (y, model[rows, b]))
            good[apart] = models >= BETTER * look
            tracks[rows[good], b], followed[rows[good], b] = y[good], True
    return tracks, followed


def _look(own: np.ndarray, colours: np.ndarray) -> np.ndarray:
    return np.linalg.norm(colours - own, axis=-1).mean(axis=-1)


def _colours(frame: np.ndarray, points: np.ndarray, side: int) -> np.ndarray:
    """The colours `(n, WINDOW^2, 3)` around points `(n, 2)` of a frame `(H, W, 3)`."""
    offset = (np.arange(WINDOW) - WINDOW // 2) * side / 256
    around = points[:, None] + np.stack(np.meshgrid(offset, offset), axis=-1).reshape(-1, 2)  # (n, WINDOW^2, 2)
    return sample(frame, around.reshape(-1, 2)).reshape(-1, WINDOW ** 2, 3)


def _flow(pair: PairIndex, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The flow of a pair that has every pixel, at points `(n, 2)`, as preprocessing.baselines.sample, `(n, 2)`."""
    pixels, weights = corners(points, size)
    flow = pair.flow(pair.find(pixels.ravel())[0]).reshape(-1, 4, 2)
    return (weights[..., None] * flow).sum(axis=1).astype(np.float32)
