"""Tracks that follow the correspondences' flow where it can be trusted, and the model elsewhere.

Flow between adjacent frames is more precise than a model that was fitted to it, but it loses a point that is hidden
once, and cannot tell. The model knows where the point comes out again. Each is used for what it is better at.

Notation
    M, F      query points, frames first, first + 1, ...
    x         position (x, y) in pixels
    a, b      a frame and the next one, away from the query's frame on either side
    fb        forward-backward error: where a point is after the flow from a to b and back, pixels
    followed  (M, F) bool: the position is that of the flow from the frame before, and fb was at most MAX_FB; or it is
              the model's, and a correspondence of an earlier frame in which the point was followed confirms it
"""

import logging
from collections.abc import Sequence

import numpy as np

from loaders.store import CorrespondenceStore
from loaders.store_format import PairIndex
from models.omnimotion import OmniMotion
from models.tracker import Tracker, Tracks
from preprocessing.baselines import MAX_FB, check_adjacent_flow, corners

log = logging.getLogger(__name__)
CONFIRMED = 1 / 256  # of the frame's longer side: farthest from the model's position that a correspondence may end
INTERVALS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # frames between a confirming correspondence's ends


class FlowTracker(Tracker):
    """A Tracker whose tracks go with the flow of `store` (or of a PublishedFolder) until it breaks; then they are the
    model's, and hidden, until a stored correspondence confirms these: from there they go with the flow again. A point
    is visible where it is followed and the model does not hide it; depths and scores are the model's.

    UserError if the store has no flow between adjacent frames."""

    def __init__(self, model: OmniMotion, store: CorrespondenceStore, use_max_loc: bool = True,
                 occlusion_th: float = 0.99, chunk_size: int = 2_048):
        super().__init__(model, use_max_loc, occlusion_th, chunk_size)
        check_adjacent_flow(store)
        if np.abs(np.diff(store.pairs)).max() == 1:
            log.warning("%s has adjacent frames only: points whose flow breaks stay hidden", store.root)
        self.store = store

    def track(self, query_points: np.ndarray, frames: Sequence[int] | None = None) -> Tracks:
        """As Tracker.track."""
        start, wanted = query_points[:, 0].astype(np.int64), range(self.num_frames) if frames is None else frames
        first, last = min([*start, *wanted], default=0), max([*start, *wanted], default=-1)
        out = super().track(query_points, range(first, last + 1))
        out.tracks, followed = follow(query_points, out.tracks, self.store, first)
        own = start[:, None] == np.arange(first, last + 1)
        out.visible = followed & ((out.occlusion_score <= self.occlusion_th) | own)
        return Tracks(*(value[:, np.array(wanted, np.int64) - first] for value in vars(out).values()))


def follow(query_points: np.ndarray, model: np.ndarray, store: CorrespondenceStore,
           first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positions `(M, F, 2)` float32 and `followed` `(M, F)` of query points `(M, 3)` = (t, y, x), whose positions by
    the model in frames first, first + 1, ..., theirs among them, are `model` `(M, F, 2)`."""
    M, F = model.shape[:2]
    start = query_points[:, 0].astype(np.int64) - first
    tracks, followed = model.astype(np.float32), np.zeros((M, F), bool)
    tracks[np.arange(M), start], followed[np.arange(M), start] = query_points[:, :0:-1], True
    border = np.array(store.size[::-1]) - 0.5
    for step, frames in ((1, range(F - 1)), (-1, range(F - 1, 0, -1))):
        for a in frames:
            b, begun = a + step, start <= a if step > 0 else start >= a
            rows = np.flatnonzero(begun & followed[:, a])
            if len(rows):
                there, back = (store.index(first + i, first + j) for i, j in ((a, b), (b, a)))
                x = tracks[rows, a]
                move = _flow(there, x, store.size)
                fb = np.linalg.norm(move + _flow(back, x + move, store.size), axis=-1)
                good = (fb <= MAX_FB) & ((x + move >= -0.5) & (x + move <= border)).all(axis=-1)
                tracks[rows[good], b], followed[rows[good], b] = (x + move)[good], True
            lost = np.flatnonzero(begun & ~followed[:, b])
            known = followed[lost] & ((np.arange(F) - start[lost, None]) * step >= 0)  # not beyond the query's frame
            followed[lost, b] = _confirmed(tracks[lost], known, b, step, store, first)
    return tracks, followed


def _confirmed(tracks: np.ndarray, known: np.ndarray, b: int, step: int, store: CorrespondenceStore,
               first: int) -> np.ndarray:
    """Which of the positions in frame b of `tracks` `(m, F, 2)` a stored correspondence confirms, `(m,)` bool, that
    starts where a position is `known` `(m, F)`."""
    near, out = CONFIRMED * max(store.size), np.zeros(len(tracks), bool)
    half = store.meta.get("method", {}).get("keep") == "half"
    for interval in INTERVALS:
        a = b - step * interval
        if not 0 <= a < known.shape[1] or not store.counts[first + a, first + b]:
            continue
        rows = np.flatnonzero(~out & known[:, a])
        if len(rows):
            flow, found = _correspondence(store.index(first + a, first + b), tracks[rows, a], store.size, half)
            out[rows] = found & (np.linalg.norm(tracks[rows, a] + flow - tracks[rows, b], axis=-1) <= near)
    return out


def _flow(pair: PairIndex, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The flow of a pair that has every pixel, at points `(n, 2)`, as preprocessing.baselines.sample, `(n, 2)`."""
    pixels, weights = corners(points, size)
    flow = pair.flow(pair.find(pixels.ravel())[0]).reshape(-1, 4, 2)
    return (weights[..., None] * flow).sum(axis=1).astype(np.float32)


def _correspondence(pair: PairIndex, points: np.ndarray, size: tuple[int, int],
                    half: bool) -> tuple[np.ndarray, np.ndarray]:
    """The cycle-consistent flow `(n, 2)` of the pixel next to each of the points `(n, 2)`, and where there is one
    `(n,)`. `half`: the store keeps half of the pixels, either this one or the next one along x."""
    H, W = size
    nearest = np.rint(points).astype(np.int64)
    inside = ((nearest >= 0) & (nearest < (W, H))).all(axis=-1)
    beside = nearest[:, 0] + np.where(points[:, 0] >= nearest[:, 0], 1, -1)
    flow, found = np.zeros((len(points), 2), np.float32), np.zeros(len(points), bool)
    for column in (nearest[:, 0], beside.clip(0, W - 1))[:1 + half]:
        rows = np.flatnonzero(inside & ~found)
        pixels = nearest[rows, 1] * W + column[rows]
        places, stored = pair.find(pixels)
        rows, places, pixels = rows[stored], places[stored], pixels[stored]
        flow[rows], found[rows] = pair.flow(places), pair.cycle_at(pixels)
    return flow, found
