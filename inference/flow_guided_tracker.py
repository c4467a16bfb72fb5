"""Tracks that combine stored optical flow with the model.

Points follow the stored flow over several intervals (inference/multi_interval_flow.py). The model's position is one
more candidate in every frame. Its error is the distance between model and track in earlier frames, so that a model
which agreed with the track is preferred. The model finds points that flow has lost, and decides where they are
occluded.

Notation
    M, T      query points, frames
    a, b      source and target frame of a flow
    e         forward-backward error of a flow at a point, pixels
    d         difference in color between the two ends of a flow, CIELAB units
    S         squared error of a path of flows, square pixels; the model's S is in `ModelProposal`

The squared error of one flow over several frames is e^2 + (COLOR_ERROR d)^2: flow that leads to another surface often
has a small e, but other colors.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from common.geometry import checkerboard_corners, corners
from inference.frame_colors import FrameColors
from inference.multi_interval_flow import MAX_ERROR, Candidates, Paths, follow_intervals
from inference.tracker import Tracker, Tracks
from loaders.correspondence_format import PairIndex
from loaders.correspondences import CorrespondenceStore, check_adjacent_flow
from loaders.scenes import Scenes
from models.omnimotion import OmniMotion

log = logging.getLogger(__name__)
MODEL_DISTANCE = 2 / 256      # share of the frame's longer side: prior of the distance between model and track
PRIOR_FRAMES = 2              # weight of the prior, as a number of frames
DECAY = 0.9                   # factor of a frame's weight for each later visible frame
COLOR_ERROR = 1 / 8 / 256     # share of the frame's longer side: error for each CIELAB unit of difference in color
MAX_DIFFERENCE = 16.0         # CIELAB units: larger ones count as this, so that one change of light hides nothing
MIN_STORED = 0.2              # smallest sum of the bilinear weights of stored pixels around a point


class StoredFlow:
    """Flow of a store at points between pixels, with its error. Frames are counted from `first`.

    colors: if given, tentative correspondences are followed, too, and flow over several frames costs the difference in
    color of its ends. None: neither."""

    def __init__(self, store: CorrespondenceStore, first: int = 0, colors: FrameColors | None = None):
        self.store = store
        self.first = first
        self.colors = colors
        # Adjacent frames without valid flow are a cut. Other pairs may have tentative correspondences only.
        self.pairs = {(int(a), int(b)) for a, b in store.pairs
                      if store.counts[a, b] or (colors is not None and abs(a - b) > 1)}

    def step(self, a: int, b: int, points: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Positions `(n, 2)` in frame b of points `(n, 2)` of frame a, and the squared error `(n,)` of the flow:
        infinite where it or the flow back is not stored. None if the store lacks the pair in one direction."""
        a += self.first
        b += self.first
        if not {(a, b), (b, a)} <= self.pairs:
            return None
        move, known = self._flow(a, b, points)
        ends = points + move
        back, known_back = self._flow(b, a, ends)
        error = move + back
        squared = np.where(known & known_back, error[:, 0] ** 2 + error[:, 1] ** 2, np.inf)
        if self.colors is not None and abs(a - b) > 1:
            rows = np.flatnonzero(known & known_back)
            difference = np.minimum(self.colors.difference(a, points[rows], b, ends[rows]), MAX_DIFFERENCE)
            squared[rows] += (COLOR_ERROR * max(self.store.size) * difference) ** 2
        return ends, squared

    def _flow(self, a: int, b: int, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Flow `(n, 2)` interpolated between the stored cycle-consistent pixels around points `(n, 2)`, and where there
        are some `(n,)` bool. Of adjacent frames, all pixels are used."""
        pair: PairIndex = self.store.index(a, b)
        if not pair.count:
            return np.zeros((len(points), 2), np.float32), np.zeros(len(points), bool)
        parity = pair.parity(self.store.size)
        around = corners if parity is None else partial(checkerboard_corners, parity=parity)
        pixels, weights = (x.T for x in around(points, self.store.size))  # (4, n)
        rows, stored = pair.find(pixels.ravel())
        if abs(a - b) > 1:
            cycle = pair.cycle_at(pixels.ravel())
            if self.colors is not None:
                cycle = cycle | pair.tentative_at(pixels.ravel())
            stored = stored & cycle
        weights = weights * stored.reshape(4, -1)
        total = weights.sum(axis=0)
        flow = pair.flow(rows).reshape(4, -1, 2)  # of pixels that are not stored: any finite value
        mean = np.einsum("kn,knc->nc", weights, flow) / np.maximum(total, 1e-9)[:, None]
        return mean.astype(np.float32), total > MIN_STORED


class ModelProposal:
    """The model's positions as candidates.

    model `(M, F, 2)`: positions in F frames from the first one of the flow, which include the query frames, pixels.
    visible `(M, F)` bool: visibility according to the model. longer_side: of the frames, pixels.

    Their S is the mean squared distance between model and track over the visible frames since the query, in which
    recent frames weigh more. Where it is at most MAX_ERROR, squared, the model decides that a point is occluded: flow
    would go on with the surface in front."""

    def __init__(self, model: np.ndarray, visible: np.ndarray, longer_side: int):
        self.model = model
        self.visible = visible
        self.prior = (MODEL_DISTANCE * longer_side) ** 2
        self.trusted = (MAX_ERROR * longer_side) ** 2
        # for each direction: sum of the weighted squared distances (M,), and of their weights (M,)
        weights = np.full(len(model), float(PRIOR_FRAMES))
        self.sums = {direction: weights * self.prior for direction in (1, -1)}
        self.weights = {direction: weights.copy() for direction in (1, -1)}

    def candidates(self, rows: np.ndarray, b: int, direction: int, paths: Paths) -> Candidates:
        """See `inference.multi_interval_flow.Proposal`."""
        total = self.sums[direction]
        weight = self.weights[direction]
        before = b - direction
        squared = ((paths.tracks[rows, before] - self.model[rows, before]) ** 2).sum(axis=-1)
        counts = paths.visible[rows, before] & (squared > 0)  # 0: query frame, or the model's own position
        decay = np.where(counts, DECAY, 1)
        total[rows] = decay * total[rows] + np.where(counts, squared, 0)
        weight[rows] = decay * weight[rows] + counts
        mean = total[rows] / weight[rows]
        visible = self.visible[rows, b]
        return Candidates(self.model[rows, b], mean, visible, ~visible & (mean <= self.trusted))


def guide(query_points: np.ndarray, flow: StoredFlow, proposal: ModelProposal) -> Paths:
    """Tracks of query points `(M, 3)` = (t, y, x) by stored flow, with the model as a candidate in every frame, through
    the frames of the proposal."""
    size = flow.store.size
    model = proposal.model
    queries = query_points - np.array([flow.first, 0, 0], query_points.dtype)
    out = follow_intervals(queries, model.shape[1], size, flow.step, proposal)
    lost = np.isnan(out.tracks[..., 0])
    out.tracks[lost] = model[lost]
    return out


class FlowGuidedTracker(Tracker):
    """A Tracker whose tracks follow the flow of `store` (or of a folder in OmniMotion's layout) where it is reliable.
    Depths and occlusion scores are the model's, at the model's position. `visible` depends on the flow, too: it is not
    a threshold of the scores.

    frame: t -> image `(H, W, 3)` uint8 RGB. Raises UserError if the store has no flow between adjacent frames."""

    def __init__(self, model: OmniMotion, store: CorrespondenceStore, frame: Callable[[int], np.ndarray],
                 use_max_loc: bool = True, occlusion_th: float = 0.99, chunk_size: int = 2_048,
                 scenes: Scenes | None = None):
        super().__init__(model, use_max_loc, occlusion_th, chunk_size, scenes)
        check_adjacent_flow(store)
        if store.num_frames > 2 and np.abs(np.diff(store.pairs)).max() == 1:
            log.warning("%s has flow between adjacent frames only: a track that left the flow does not return to it",
                        store.root)
        self.store = store
        self.colors = FrameColors(frame)

    def track(self, query_points: np.ndarray, frames: Sequence[int] | None = None) -> Tracks:
        """Arguments and result as `Tracker.track`."""
        start = query_points[:, 0].astype(np.int64)
        wanted = range(self.num_frames) if frames is None else frames
        first = min([*start, *wanted], default=0)
        last = max([*start, *wanted], default=-1)
        out = super().track(query_points, range(first, last + 1))
        proposal = ModelProposal(out.tracks, out.visible, max(self.size))
        paths = guide(query_points, StoredFlow(self.store, first, self.colors), proposal)
        out.tracks = paths.tracks
        out.visible = paths.visible & self.can_be_seen(start)[:, first:last + 1]
        return Tracks(*(value[:, np.array(wanted, np.int64) - first] for value in vars(out).values()))
