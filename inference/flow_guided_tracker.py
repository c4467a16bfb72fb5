"""Tracks that follow the correspondences' flow where it can be trusted, and the model elsewhere.

Flow between adjacent frames is more precise than a model that was fitted to it, but it loses a point that is hidden
once, and cannot tell. The model knows where the point comes out again. Each is used for what it is better at.

Notation
    M, F      query points, frames first, first + 1, ...
    a, b      a frame and the next one, away from the query's frame on either side
    y         (M, 2) where the flow leads, pixels; from a point's last confirmed position. Nothing once flow that looks
              worse than the model was left, or a pair of frames is missing
    fb        forward-backward error: where a point is after the flow from a to b and back, pixels
    look      mean distance of the WINDOW x WINDOW colors around a position from those around its query
    followed  (M, F) bool: the position is y, and the flow led there. Flow breaks where fb is more than MAX_FB, outside
              the frame, and where the model is APART from y and looks better. From there on the position is the
              model's, or y (adrift), until a stored correspondence ends there, in the frame, or at the other of the
              two: one of an earlier frame in which the point was followed. It is followed again then
    adrift    (M,) bool: flow broke inside the frame while the model was APART from it, and so knew no more of this
              point. The position is y all the same, until the model looks better: flow that does not lead back, as at
              the edge of something narrow, is often right
    trusted   (M, F) bool, where not followed: flow broke because the model looked better, or while the model was not
              APART from it. What was adrift is not trusted before it is confirmed
    visible   (M, F) bool: followed or trusted, and the model says so; or followed, and it looks LIKE before, in the
              frames between the query's and this one in which it was followed and the model said so
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.baselines import MAX_FB, check_adjacent_flow, corners, inside, sample
from inference.tracker import Tracker, Tracks
from loaders.correspondence_format import PairIndex
from loaders.correspondences import CorrespondenceStore
from models.omnimotion import OmniMotion

log = logging.getLogger(__name__)
APART = 2 / 256  # of the frame's longer side
BETTER = 0.6     # of the flow's look, at most, has the model's where it is believed instead
LIKE = 2         # times the look before, at most, has what is followed and visible though the model hides it
WINDOW = 5       # positions 1 / 256 of the frame's longer side apart
CHUNK = 4_096    # points whose windows are looked up at a time
CONFIRMED = 1 / 256  # of the longer side: farthest from a position that a correspondence may end
INTERVALS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # frames between a confirming correspondence's ends


class FlowTracker(Tracker):
    """A Tracker whose tracks go with the flow of `store` (or of a PublishedFolder) where that can be trusted. Depths
    and scores are the model's, at the model's position. `frames` are the sequence's `(T, H, W, 3)` uint8.

    UserError if the store has no flow between adjacent frames."""

    def __init__(self, model: OmniMotion, store: CorrespondenceStore, frames: np.ndarray, use_max_loc: bool = True,
                 occlusion_th: float = 0.99, chunk_size: int = 2_048):
        super().__init__(model, use_max_loc, occlusion_th, chunk_size)
        check_adjacent_flow(store)
        if np.abs(np.diff(store.pairs)).max() == 1:
            log.warning("%s has adjacent frames only: flow that has broken is not gone back to", store.root)
        self.store, self.frames = store, frames

    def track(self, query_points: np.ndarray, frames: Sequence[int] | None = None) -> Tracks:
        """As Tracker.track."""
        start, wanted = query_points[:, 0].astype(np.int64), range(self.num_frames) if frames is None else frames
        first, last = min([*start, *wanted], default=0), max([*start, *wanted], default=-1)
        out = super().track(query_points, range(first, last + 1))
        followed = follow(query_points, out.tracks, out.visible, self.store, self.frames, first)
        out.tracks, out.visible = followed.tracks, followed.visible
        return Tracks(*(value[:, np.array(wanted, np.int64) - first] for value in vars(out).values()))


@dataclass
class Followed:
    """Tracks of M query points through F frames."""
    tracks: np.ndarray    # (M, F, 2) float32 pixels
    visible: np.ndarray   # (M, F) bool
    followed: np.ndarray  # (M, F) bool
    trusted: np.ndarray   # (M, F) bool


def follow(query_points: np.ndarray, model: np.ndarray, shown: np.ndarray, store: CorrespondenceStore,
           frames: np.ndarray, first: int = 0) -> Followed:
    """Tracks of query points `(M, 3)` = (t, y, x), whose positions by the model in frames first, first + 1, ...,
    theirs among them, are `model` `(M, F, 2)`, and which it says are visible where `shown` `(M, F)` is."""
    start, every = query_points[:, 0].astype(np.int64) - first, np.arange(len(query_points))
    out = Followed(model.astype(np.float32), shown.copy(), *np.zeros((2, *shown.shape), bool))
    own = np.empty((len(start), WINDOW ** 2, 3), np.float32)  # the colors around each query
    for t in np.unique(start):
        own[start == t] = _colors(frames[first + t], query_points[start == t, :0:-1])
    out.tracks[every, start], out.followed[every, start] = query_points[:, :0:-1], True
    adjacent = {(a, b) for a, b in store.pairs.tolist() if abs(a - b) == 1}
    for step in (1, -1):
        _walk(out, start, step, own, model, shown, store, adjacent, frames, first)
    out.visible &= out.followed | out.trusted
    return out


def _walk(out: Followed, start: np.ndarray, step: int, own: np.ndarray, model: np.ndarray, shown: np.ndarray,
          store: CorrespondenceStore, adjacent: set, frames: np.ndarray, first: int) -> None:
    """Fill in `out` from the queries' frames `start` `(M,)` on, in steps of 1 or -1."""
    M, F = shown.shape
    near_by, tracks, followed, trusted = APART * max(store.size), out.tracks, out.followed, out.trusted
    y, adrift = tracks[np.arange(M), start], np.zeros(M, bool)
    sums, count = np.zeros((2, M))  # of the looks of what was followed and shown, their number
    hidden = np.logical_or.accumulate(~shown[:, ::-step], axis=1)[:, ::-step]  # in this frame or beyond
    for a in range(F - 1) if step > 0 else range(F - 1, 0, -1):
        b, rows = a + step, np.flatnonzero(start <= a if step > 0 else start >= a)
        if not len(rows):
            continue
        was, near = followed[rows, a], _distance(y[rows], model[rows, a]) <= near_by
        y[rows], closes, within = _ahead(store, adjacent, first + a, first + b, y[rows])
        of_model, better = model[rows, b], np.zeros(len(rows), bool)
        apart = np.flatnonzero((was | adrift[rows]) & (_distance(y[rows], of_model) > near_by))
        by_flow, by_model = (_look(frames[first + b], p[apart], own[rows[apart]]) for p in (y[rows], of_model))
        better[apart] = by_model < BETTER * by_flow
        trusted[rows, b] = np.where(was, better | near, trusted[rows, a])
        followed[rows, b] = was & closes & ~better
        adrift[rows] = ~better & (adrift[rows] | (was & within & ~closes & ~near)) & ~np.isnan(y[rows, 0])
        y[rows[better]] = np.nan
        goes_on = rows[followed[rows, b] | adrift[rows]]
        tracks[goes_on, b] = y[goes_on]
        lost = rows[~followed[rows, b]]
        ends = _confirmed(tracks, followed, np.stack([model[lost, b], y[lost]], axis=1), lost, start, b, step, store,
                          first)
        found = lost[~np.isnan(ends[:, 0])]
        tracks[found, b] = y[found] = ends[~np.isnan(ends[:, 0])]
        followed[found, b], adrift[found] = True, False
        rows = rows[followed[rows, b] & hidden[rows, b]]
        look = _look(frames[first + b], y[rows], own[rows])
        out.visible[rows, b] |= (count[rows] > 0) & (look * count[rows] <= LIKE * sums[rows])
        seen = shown[rows, b]
        sums[rows[seen]] += look[seen]
        count[rows[seen]] += 1


def _ahead(store: CorrespondenceStore, adjacent: set, a: int, b: int,
           x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the flow takes points `(n, 2)` of frame a in frame b, NaN without flow there and back; whether it leads
    back, inside the frame; and whether it ends inside it."""
    nowhere, y = np.zeros(len(x), bool), np.full_like(x, np.nan)
    if not {(a, b), (b, a)} <= adjacent:
        return y, nowhere, nowhere
    there, back, has = store.index(a, b), store.index(b, a), ~np.isnan(x[:, 0])
    move = _flow(there, x[has], store.size)
    y[has] = x[has] + move
    within, closes = inside(y, store.size), nowhere
    closes[has] = _distance(move, -_flow(back, y[has], store.size)) <= MAX_FB
    return y, closes & within, within


def _confirmed(tracks: np.ndarray, followed: np.ndarray, places: np.ndarray, rows: np.ndarray, start: np.ndarray,
               b: int, step: int, store: CorrespondenceStore, first: int) -> np.ndarray:
    """Which of the `places` `(n, 2, 2)` in frame b of points `rows` `(n,)`, the first one before the second, a stored
    correspondence confirms: one that starts where the point was `followed` in a frame since its query's. `(n, 2)`; NaN:
    none."""
    near, out = CONFIRMED * max(store.size), np.full((len(rows), 2, 2), np.nan, np.float32)
    half = store.meta.get("method", {}).get("keep") == "half"
    within = inside(places, store.size)  # (n, 2); not NaN
    for interval in INTERVALS:
        a = b - step * interval
        if not 0 <= a < tracks.shape[1] or not store.counts[first + a, first + b]:
            continue
        since = start[rows] <= a if step > 0 else start[rows] >= a
        some = np.flatnonzero(since & followed[rows, a] & np.isnan(out[:, 0, 0]))
        if len(some):
            x = tracks[rows[some], a]
            flow, found = _correspondence(store.index(first + a, first + b), x, store.size, half)
            reached = found[:, None] & within[some] & (_distance((x + flow)[:, None], places[some]) <= near)
            out[some] = np.where(reached[..., None], places[some], out[some])
    return np.where(np.isnan(out[:, :1, 0]), out[:, 1], out[:, 0])


def _distance(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.linalg.norm(p - q, axis=-1)


def _look(frame: np.ndarray, points: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The look `(n,)` of points `(n, 2)` of a frame `(H, W, 3)`; `own` `(n, WINDOW^2, 3)`: the colors of their
    queries."""
    return np.linalg.norm(_colors(frame, points) - own, axis=-1).mean(axis=-1)


def _colors(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The colors `(n, WINDOW^2, 3)` around points `(n, 2)` of a frame `(H, W, 3)`."""
    offset = (np.arange(WINDOW) - WINDOW // 2) * max(frame.shape[:2]) / 256
    window, out = np.stack(np.meshgrid(offset, offset), axis=-1).reshape(-1, 2), np.empty(
        (len(points), WINDOW ** 2, 3), np.float32)
    for k in range(0, len(points), CHUNK):
        around = points[k:k + CHUNK, None] + window  # (n, WINDOW^2, 2)
        out[k:k + CHUNK] = sample(frame, around.reshape(-1, 2)).reshape(-1, WINDOW ** 2, 3)
    return out


def _flow(pair: PairIndex, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The flow of a pair that has every pixel, at points `(n, 2)`, as evaluation.baselines.sample, `(n, 2)`."""
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
