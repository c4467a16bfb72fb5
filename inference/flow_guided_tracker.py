"""Tracks that combine optical flow with the model: flow while it is reliable, the model elsewhere.

Flow between adjacent frames is more precise than the model that was fitted to it, but chained flow loses a point at its
first occlusion and does not notice. The model finds the point again after an occlusion.

Notation
    M, F      query points; frames first, first + 1, ..., first + F - 1
    a, b      a frame and the next one, going away from the query's frame (both directions are processed)
    y         flow position: the point's last confirmed position, moved along by flow (M, 2), pixels. NaN after the
              tracker switched from flow to the model, or where the store has no valid flow between two frames (a cut)
    fb        forward-backward error: distance between a point and its position after flow a -> b -> a, pixels
    color error  mean distance between the colors of the patch at a position and the patch at the query point
    apart     the model's position is more than MAX_MODEL_DISTANCE away from y; otherwise the model is near

State of a point in a frame
    followed  (M, F) bool. The position is y. Following ends where fb > MAX_FB, where y leaves the frame, and where the
              model is apart from y and its color error is lower (MODEL_ERROR_RATIO). It starts again where a stored
              correspondence confirms the model's position or y: one that starts at an earlier frame in which the
              point was followed, and ends near that position
    drifting  (M,) bool. The forward-backward check failed inside the frame while the model was apart. The position is
              still y, marked occluded, until the model's color error is lower or a correspondence confirms the point:
              flow that fails the check, as at the edge of a narrow object, is often right
    trusted   (M, F) bool, where not followed. Following ended because the model's color error was lower, or while the
              model was near. A drifting point is not trusted again before it is confirmed
    visible   (M, F) bool. Followed or trusted, and visible according to the model; or followed, and its color error is
              at most VISIBLE_ERROR_RATIO times the mean error in the frames between the query's and this one in which
              the point was followed and visible according to the model
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.geometry import corners, inside, sample
from inference.tracker import Tracker, Tracks
from loaders.correspondence_format import PairIndex
from loaders.correspondences import MAX_FB, CorrespondenceStore, check_adjacent_flow
from loaders.scenes import Scenes
from models.omnimotion import OmniMotion

log = logging.getLogger(__name__)
MAX_MODEL_DISTANCE = 2 / 256      # share of the frame's longer side: the model is near flow up to this distance
MAX_CONFIRMATION_ERROR = 1 / 256  # share of the frame's longer side: how close a confirming correspondence must end
MODEL_ERROR_RATIO = 0.6           # the model replaces flow if its color error is below this share of the flow's
VISIBLE_ERROR_RATIO = 2           # largest color error of a visible point, in units of its mean error while visible
PATCH_SIDE = 5                    # samples along each side of a patch, 1/256 of the frame's longer side apart
PATCHES_PER_CHUNK = 4_096         # patches interpolated at a time
CONFIRMATION_INTERVALS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # frames a correspondence may span


class FlowGuidedTracker(Tracker):
    """A Tracker whose tracks follow the flow of `store` (or of a folder in OmniMotion's layout) where it is reliable.
    Depths and occlusion scores are the model's, at the model's position. `frames`: `(T, H, W, 3)` uint8.

    Raises UserError if the store has no flow between adjacent frames."""

    def __init__(self, model: OmniMotion, store: CorrespondenceStore, frames: np.ndarray, use_max_loc: bool = True,
                 occlusion_th: float = 0.99, chunk_size: int = 2_048, scenes: Scenes | None = None):
        super().__init__(model, use_max_loc, occlusion_th, chunk_size, scenes)
        check_adjacent_flow(store)
        if np.abs(np.diff(store.pairs)).max() == 1:
            log.warning("%s has flow between adjacent frames only: a track that left the flow cannot be confirmed "
                        "and does not return to it", store.root)
        self.store = store
        self.frames = frames

    def track(self, query_points: np.ndarray, frames: Sequence[int] | None = None) -> Tracks:
        """Arguments and result as `Tracker.track`."""
        start = query_points[:, 0].astype(np.int64)
        wanted = range(self.num_frames) if frames is None else frames
        first = min([*start, *wanted], default=0)
        last = max([*start, *wanted], default=-1)
        out = super().track(query_points, range(first, last + 1))
        result = follow(query_points, out.tracks, out.visible, self.store, self.frames, first)
        out.tracks = result.tracks
        out.visible = result.visible & self.can_be_seen(start)[:, first:last + 1]
        return Tracks(*(value[:, np.array(wanted, np.int64) - first] for value in vars(out).values()))


@dataclass
class Followed:
    """Tracks of M query points through F frames; notation of the module."""
    tracks: np.ndarray    # (M, F, 2) float32 pixels
    visible: np.ndarray   # (M, F) bool
    followed: np.ndarray  # (M, F) bool
    trusted: np.ndarray   # (M, F) bool


def follow(query_points: np.ndarray, model: np.ndarray, model_visible: np.ndarray, store: CorrespondenceStore,
           frames: np.ndarray, first: int = 0) -> Followed:
    """Combine the model's tracks with flow.

    `query_points` `(M, 3)`: (t, y, x). `model` `(M, F, 2)`: the model's positions in frames first, first + 1, ...,
    which include the query frames, pixels. `model_visible` `(M, F)` bool: visibility according to the model.
    `frames` `(T, H, W, 3)`: all frames of the video."""
    follower = _Follower(query_points, model, model_visible, store, frames, first)
    follower.walk(1)
    follower.walk(-1)
    out = follower.out
    out.visible &= out.followed | out.trusted
    return out


class _Follower:
    """Fills in `out` frame by frame. Arguments as `follow`; attributes in the notation of the module."""

    def __init__(self, query_points: np.ndarray, model: np.ndarray, model_visible: np.ndarray,
                 store: CorrespondenceStore, frames: np.ndarray, first: int):
        self.model = model
        self.model_visible = model_visible
        self.store = store
        self.frames = frames
        self.first = first
        self.start = query_points[:, 0].astype(np.int64) - first
        self.adjacent = {(a, b) for a, b in store.pairs.tolist() if abs(a - b) == 1 and store.counts[a, b]}
        self.max_model_distance = MAX_MODEL_DISTANCE * max(store.size)  # pixels
        self.half = store.meta.get("method", {}).get("keep") == "half"

        xy = query_points[:, :0:-1]
        self.query_patches = np.empty((len(xy), PATCH_SIDE ** 2, 3), np.float32)
        for t in np.unique(self.start):
            self.query_patches[self.start == t] = _patches(frames[first + t], xy[self.start == t])

        followed, trusted = np.zeros((2, *model_visible.shape), bool)
        self.out = Followed(model.astype(np.float32), model_visible.copy(), followed, trusted)
        every = np.arange(len(xy))
        self.out.tracks[every, self.start] = xy
        self.out.followed[every, self.start] = True

    def walk(self, step: int) -> None:
        """Process all frames after (`step` 1) or before (-1) the query frames."""
        M, F = self.model_visible.shape
        self.step = step
        self.y = self.out.tracks[np.arange(M), self.start]
        self.drifting = np.zeros(M, bool)
        self.error_sum = np.zeros(M)  # of color errors in frames where the point was followed and model-visible
        self.error_count = np.zeros(M)
        # (M, F): the model hides the point in this frame or in a later one of this direction
        self.hidden_from_here = np.logical_or.accumulate(~self.model_visible[:, ::-step], axis=1)[:, ::-step]
        for a in range(F - 1) if step > 0 else range(F - 1, 0, -1):
            rows = np.flatnonzero(self._started(self.start, a))
            if len(rows):
                self._follow_flow(rows, a, a + step)
                self._return_to_flow(rows, a + step)
                self._compare_colors(rows, a + step)

    def _started(self, start: np.ndarray, a: int) -> np.ndarray:
        """Whether frame a is the query frame `start` `(n,)` or beyond it in the current direction, `(n,)` bool."""
        return start <= a if self.step > 0 else start >= a

    def _follow_flow(self, rows: np.ndarray, a: int, b: int) -> None:
        """Move y of points `rows` `(n,)` from frame a to b; decide between flow and the model in b."""
        out = self.out
        was_followed = out.followed[rows, a]
        near = _distance(self.y[rows], self.model[rows, a]) <= self.max_model_distance
        y, consistent, within = self._advance(self.first + a, self.first + b, self.y[rows])
        better = self._model_is_better(rows, b, y, was_followed | self.drifting[rows])
        out.trusted[rows, b] = np.where(was_followed, better | near, out.trusted[rows, a])
        out.followed[rows, b] = was_followed & consistent & ~better
        starts_drifting = was_followed & within & ~consistent & ~near
        self.drifting[rows] = ~better & (self.drifting[rows] | starts_drifting) & ~np.isnan(y[:, 0])
        y[better] = np.nan
        self.y[rows] = y
        on_flow = rows[out.followed[rows, b] | self.drifting[rows]]
        out.tracks[on_flow, b] = self.y[on_flow]

    def _advance(self, a: int, b: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Move points `x` `(n, 2)` from frame a of the video to b by flow.

        Returns positions `(n, 2)`, NaN where x is NaN or the store has no valid flow in one of both directions; whether
        fb <= MAX_FB inside the frame `(n,)`; whether the position is inside the frame `(n,)`."""
        y = np.full_like(x, np.nan)
        consistent = np.zeros(len(x), bool)
        if not {(a, b), (b, a)} <= self.adjacent:
            return y, consistent, consistent
        size = self.store.size
        forward = self.store.index(a, b)
        backward = self.store.index(b, a)
        known = ~np.isnan(x[:, 0])
        flow = _flow(forward, x[known], size)
        y[known] = x[known] + flow
        within = inside(y, size)
        consistent[known] = _distance(flow, -_flow(backward, y[known], size)) <= MAX_FB
        return y, consistent & within, within

    def _model_is_better(self, rows: np.ndarray, b: int, y: np.ndarray, on_flow: np.ndarray) -> np.ndarray:
        """Where points that are `on_flow` `(n,)`, at y `(n, 2)`, are apart from the model and its color error is lower
        by MODEL_ERROR_RATIO, `(n,)` bool."""
        model = self.model[rows, b]
        better = np.zeros(len(rows), bool)
        apart = np.flatnonzero(on_flow & (_distance(y, model) > self.max_model_distance))
        flow_error = self._color_error(rows[apart], b, y[apart])
        model_error = self._color_error(rows[apart], b, model[apart])
        better[apart] = model_error < MODEL_ERROR_RATIO * flow_error
        return better

    def _return_to_flow(self, rows: np.ndarray, b: int) -> None:
        """Follow flow again from confirmed positions of points `rows` that are not followed in frame b."""
        out = self.out
        lost = rows[~out.followed[rows, b]]
        candidates = np.stack([self.model[lost, b], self.y[lost]], axis=1)  # (n, 2, 2)
        confirmed = self._confirmed(candidates, lost, b)
        is_confirmed = ~np.isnan(confirmed[:, 0])
        found = lost[is_confirmed]
        self.y[found] = confirmed[is_confirmed]
        out.tracks[found, b] = confirmed[is_confirmed]
        out.followed[found, b] = True
        self.drifting[found] = False

    def _confirmed(self, candidates: np.ndarray, rows: np.ndarray, b: int) -> np.ndarray:
        """Positions `(n, 2)` of points `rows` `(n,)` in frame b that a stored correspondence confirms, NaN for none.
        `candidates` `(n, 2, 2)`: two positions a point; the first is preferred. The correspondence must start in a
        frame at or after the query in which the point was followed."""
        max_error = MAX_CONFIRMATION_ERROR * max(self.store.size)  # pixels
        confirmed = np.full((len(rows), 2, 2), np.nan, np.float32)
        within = inside(candidates, self.store.size)  # (n, 2), False for NaN
        for interval in CONFIRMATION_INTERVALS:
            a = b - self.step * interval
            if not 0 <= a < self.out.tracks.shape[1] or not self.store.counts[self.first + a, self.first + b]:
                continue
            unconfirmed = np.isnan(confirmed[:, 0, 0])
            some = np.flatnonzero(self._started(self.start[rows], a) & self.out.followed[rows, a] & unconfirmed)
            if len(some):
                x = self.out.tracks[rows[some], a]
                pair = self.store.index(self.first + a, self.first + b)
                flow, found = _correspondence(pair, x, self.store.size, self.half)
                close = _distance((x + flow)[:, None], candidates[some]) <= max_error  # (n', 2)
                reached = found[:, None] & within[some] & close
                confirmed[some] = np.where(reached[..., None], candidates[some], confirmed[some])
        return np.where(np.isnan(confirmed[:, :1, 0]), confirmed[:, 1], confirmed[:, 0])

    def _compare_colors(self, rows: np.ndarray, b: int) -> None:
        """Mark followed points visible if their color error is at most VISIBLE_ERROR_RATIO times its mean while
        visible, and update the mean. Only points that the model hides in this or a later frame need it."""
        rows = rows[self.out.followed[rows, b] & self.hidden_from_here[rows, b]]
        error = self._color_error(rows, b, self.y[rows])
        count = self.error_count[rows]
        similar = error * count <= VISIBLE_ERROR_RATIO * self.error_sum[rows]
        self.out.visible[rows, b] |= (count > 0) & similar
        seen = self.model_visible[rows, b]
        self.error_sum[rows[seen]] += error[seen]
        self.error_count[rows[seen]] += 1

    def _color_error(self, rows: np.ndarray, b: int, positions: np.ndarray) -> np.ndarray:
        """Color errors `(n,)` of points `rows` `(n,)` at positions `(n, 2)` of frame b."""
        patches = _patches(self.frames[self.first + b], positions)
        return np.linalg.norm(patches - self.query_patches[rows], axis=-1).mean(axis=-1)


def _distance(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Euclidean distance of points `(..., 2)`."""
    return np.linalg.norm(p - q, axis=-1)


def _patches(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Colors `(n, PATCH_SIDE^2, 3)` around points `(n, 2)` of a frame `(H, W, 3)`, interpolated."""
    offset = (np.arange(PATCH_SIDE) - PATCH_SIDE // 2) * max(frame.shape[:2]) / 256
    window = np.stack(np.meshgrid(offset, offset), axis=-1).reshape(-1, 2)
    out = np.empty((len(points), PATCH_SIDE ** 2, 3), np.float32)
    for k in range(0, len(points), PATCHES_PER_CHUNK):
        around = points[k:k + PATCHES_PER_CHUNK, None] + window  # (n', PATCH_SIDE^2, 2)
        out[k:k + PATCHES_PER_CHUNK] = sample(frame, around.reshape(-1, 2)).reshape(-1, PATCH_SIDE ** 2, 3)
    return out


def _flow(pair: PairIndex, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear flow `(n, 2)` at points `(n, 2)` of a pair that stores every pixel."""
    pixels, weights = corners(points, size)
    flow = pair.flow(pair.find(pixels.ravel())[0]).reshape(-1, 4, 2)
    return (weights[..., None] * flow).sum(axis=1).astype(np.float32)


def _correspondence(pair: PairIndex, points: np.ndarray, size: tuple[int, int],
                    half: bool) -> tuple[np.ndarray, np.ndarray]:
    """Cycle-consistent flow `(n, 2)` of the pixel nearest to each of the points `(n, 2)`, and whether the pair
    stores one `(n,)`. `half`: the store keeps every second pixel (checkerboard), so the second nearest along x is
    tried too."""
    H, W = size
    nearest = np.rint(points).astype(np.int64)
    in_frame = ((nearest >= 0) & (nearest < (W, H))).all(axis=-1)
    beside = nearest[:, 0] + np.where(points[:, 0] >= nearest[:, 0], 1, -1)
    flow = np.zeros((len(points), 2), np.float32)
    found = np.zeros(len(points), bool)
    columns = [nearest[:, 0], beside.clip(0, W - 1)] if half else [nearest[:, 0]]
    for column in columns:
        rows = np.flatnonzero(in_frame & ~found)
        pixels = nearest[rows, 1] * W + column[rows]
        places, stored = pair.find(pixels)
        rows = rows[stored]
        flow[rows] = pair.flow(places[stored])
        found[rows] = pair.cycle_at(pixels[stored])
    return flow, found
