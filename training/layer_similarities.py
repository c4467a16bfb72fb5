"""The motion of background and foreground as one similarity a frame, from point tracks.

A grid of points of a frame, the seed, is followed by the stored flow over several intervals. The motion that most
tracks share is the background's; the motion that most of the other tracks share is the foreground's. Frames in which
too few of a layer's tracks are seen are reached from another seed, so that the camera may travel.

Notation
    T, m     frames, middle frame
    k        seed frame; p_i,t is the position of its track i in frame t, seen where the flow was consistent
    G_t      similarity of a layer from frame t to the seed, fitted to its tracks                      (3, 3)
    F_t      similarity of a layer from frame t to the middle frame, F_k G_t                           (3, 3)
    w_i      weight of track i in the fit: near 1 if G_t p_i,t = p_i,k in the frames in which it is seen, near 0 if not
"""

from dataclasses import dataclass

import numpy as np

from common.geometry import regular_grid
from inference.flow_guided_tracker import StoredFlow
from inference.multi_interval_flow import follow_intervals

TRACK_SIDE = 64       # tracks of a seed along the longer side
TOLERANCE = 3 / 256   # share of the longer side: distance from a layer's motion at which a track's weight is 1/4
CAP = 8               # times TOLERANCE: larger distances from a layer's own motion count as this
FAR = 12              # times TOLERANCE: larger distances from the background's motion count as this
REWEIGHTINGS = 4
MIN_WEIGHT = 0.01     # tracks of smaller weights take no part in a fit
MIN_TRACKS = 8        # seen tracks that agree with a similarity, at least
MIN_SUPPORT = 0.25    # the same, as a share of the layer's tracks

MIN_REACH = 4         # frames from one seed of the foreground to the next, at least; otherwise it is lost
MAX_GAP = 3           # frames in a row without a fit, as blank ones, after which a seed is given up
MAX_SCALE = 8.0       # zoom between a seed and a frame, at most
MIN_POINTS = 6        # minimum number of points for a similarity
ITERATIONS = 10       # of iteratively reweighted least squares


@dataclass
class SeedTracks:
    """Tracks of a grid of points of frame k."""
    k: int
    points: np.ndarray   # (N, 2)
    tracks: np.ndarray   # (N, T, 2)
    visible: np.ndarray  # (N, T) bool


class LayerSimilarities:
    """`background` and `foreground` `(T, 2, 3)`: F_t of both layers, in pixels, for a correspondence store."""

    def __init__(self, store):
        self.store = store
        self.T = store.num_frames
        self.tolerance = TOLERANCE * max(store.size)
        self._seeds: dict[int, SeedTracks] = {}
        self._restarts: set[int] = set()  # frames in which the background was looked for again
        self.background = np.tile(np.eye(3), (self.T, 1, 1))
        self._fit_layer(self.background, None)
        self.foreground = self.background.copy()
        self._fit_layer(self.foreground, self.background)
        self.background = self.background[:, :2]
        self.foreground = self.foreground[:, :2]

    def _fit_layer(self, out: np.ndarray, background: np.ndarray | None) -> None:
        """Fill in F_t `(T, 3, 3)` of a layer. background: that of the layer behind it, None for the background."""
        m = self.T // 2
        out[m] = np.eye(3)
        for direction in (-1, 1):
            k = m
            before = m
            while 0 <= k + direction < self.T:
                seed = self._seed(k)
                prior = self._prior(seed, background)
                weights = self._members(seed, prior, out, before)
                ahead = range(k + direction, self.T if direction > 0 else -1, direction)
                reached = k
                for t, G in self._fits(seed, prior, weights, ahead):
                    out[t] = out[k] @ G
                    for gap in range(t - direction, reached, -direction):  # blank frames
                        out[gap] = out[reached] @ self._at_rest(background, reached, gap)
                    reached = t
                if abs(reached - k) >= (1 if background is None else MIN_REACH) or reached + direction == ahead.stop:
                    before, k = k, reached
                    continue
                again = self._next_start(reached + direction, ahead.stop, direction, background)
                for t in range(reached + direction, ahead.stop if again is None else again + direction, direction):
                    out[t] = out[reached] @ self._at_rest(background, reached, t)
                if again is None:
                    break
                before = k = again

    def _next_start(self, t: int, stop: int, direction: int, background: np.ndarray | None) -> int | None:
        """The frame from t on in which a layer that is lost is looked for again: the background in t, the foreground
        where the background was lost too, as at a cut; None if there is no such frame."""
        if background is None:
            self._restarts.add(t)
            return t
        return next((s for s in range(t, stop, direction) if s in self._restarts), None)

    def _at_rest(self, background: np.ndarray | None, k: int, t: int) -> np.ndarray:
        """G_t of something that does not move against the background."""
        return np.eye(3) if background is None else np.linalg.inv(background[k]) @ background[t]

    def _seed(self, k: int) -> SeedTracks:
        if k not in self._seeds:
            store = self.store
            stride = -(-max(store.size) // TRACK_SIDE)
            points = regular_grid(store.size, stride, stride // 2).reshape(-1, 2)
            queries = np.insert(points[:, ::-1], 0, k, axis=1)
            paths = follow_intervals(queries, self.T, store.size, StoredFlow(store).step)
            self._seeds[k] = SeedTracks(k, points, paths.tracks, paths.visible)
        return self._seeds[k]

    def _distances(self, seed: SeedTracks, F: np.ndarray, frames) -> np.ndarray:
        """Distance of every track from the motion F `(T, 3, 3)` in `frames`, in pixels of the seed; NaN where it is not
        seen, `(N, len(frames))`."""
        back = np.linalg.inv(F[seed.k])
        out = np.stack([np.linalg.norm(apply(back @ F[t], seed.tracks[:, t]) - seed.points, axis=-1) for t in frames],
                       axis=1)
        out[~seed.visible[:, list(frames)]] = np.nan
        return out

    def _prior(self, seed: SeedTracks, background: np.ndarray | None) -> np.ndarray:
        """Factor of each track's weight `(N,)`: 1 for the background; for the foreground, the cube of the median
        distance from the background's motion, so that a few tracks that move far are preferred to many that it fits
        badly; capped at FAR, because wrong tracks are the farthest."""
        if background is None:
            return np.ones(len(seed.points))
        distance = self._distances(seed, background, range(self.T))  # 0 in the seed's own frame
        return np.minimum(np.nanmedian(distance, axis=1) / self.tolerance, FAR) ** 3 * seed.visible.mean(axis=1)

    def _members(self, seed: SeedTracks, prior: np.ndarray, F: np.ndarray, before: int) -> np.ndarray:
        """Weights `(N,)` to begin with: of the first seed, the prior; of a later one, also the agreement with F from
        the seed `before` it."""
        if before == seed.k:
            return prior
        frames = range(min(before, seed.k), max(before, seed.k) + 1)
        return prior * self._agreement(self._distances(seed, F, frames))

    def _agreement(self, distances: np.ndarray) -> np.ndarray:
        """w_i `(N,)` of distances `(N, frames)` with NaN."""
        squared = np.minimum(distances, CAP * self.tolerance) ** 2
        count = np.isfinite(squared).sum(axis=1)
        mean = np.nansum(squared, axis=1) / np.maximum(count, 1)
        return np.where(count > 1, (1 + mean / self.tolerance ** 2) ** -2, 0)  # the seed's own frame is one

    def _fits(self, seed: SeedTracks, prior: np.ndarray, weights: np.ndarray,
              ahead: range) -> list[tuple[int, np.ndarray]]:
        """(t, G_t) of the frames `ahead` of the seed in which enough tracks support a fit, up to the first MAX_GAP
        frames in a row without."""
        found: dict[int, np.ndarray] = {}
        for _ in range(REWEIGHTINGS):
            distances = np.full((len(weights), len(ahead)), np.nan)
            chosen = weights > MIN_WEIGHT * weights.max()
            for column, t in enumerate(ahead):
                rows = np.flatnonzero(chosen & seed.visible[:, t])
                fit = similarity(seed.tracks[rows, t], seed.points[rows], self.tolerance, weights=weights[rows])
                if fit is None or not 1 / MAX_SCALE < np.linalg.det(fit[:, :2]) ** 0.5 < MAX_SCALE:
                    found.pop(t, None)
                    continue  # a blank frame, or one after the tracks' end
                found[t] = np.vstack([fit, [0, 0, 1]])
                distances[:, column] = np.linalg.norm(apply(fit, seed.tracks[:, t]) - seed.points, axis=-1)
                distances[~seed.visible[:, t], column] = np.nan
            agreement = self._agreement(np.column_stack([np.zeros(len(weights)), distances]))
            weights = prior * agreement
        members = (agreement > 0.25) & (prior > 0.25)
        enough = max(MIN_TRACKS, MIN_SUPPORT * members.sum())
        out = []
        gap = 0
        for column, t in enumerate(ahead):
            support = (members & (distances[:, column] < 2 * self.tolerance)).sum()
            gap = 0 if t in found and support >= enough else gap + 1
            if gap == MAX_GAP:
                break
            if not gap:
                out.append((t, found[t]))
        return out


def similarity(p: np.ndarray, q: np.ndarray, scale: float,
               weights: np.ndarray | float = 1.0) -> np.ndarray | None:
    """Robust fit of the similarity `(2, 3)` that maps positions p to q, both `(n, 2)`; None for fewer than MIN_POINTS.

    Iteratively reweighted least squares with Geman-McClure weights, from the fit of the smallest mean distance.
    `scale`: distance in pixels at which the weight of a point is 1/4. `weights` `(n,)`: factors."""
    if len(p) < MIN_POINTS:
        return None
    center = p.mean(axis=0, dtype=np.float64)
    x, y = (p - center).T.astype(np.float64)
    one, zero = np.ones(len(p)), np.zeros(len(p))
    A = np.concatenate([np.stack([x, -y, one, zero], axis=-1), np.stack([y, x, zero, one], axis=-1)])  # (2 n, 4)
    target = (q - center).T.astype(np.float64).ravel()  # (2 n,)
    S = None
    for k in range(ITERATIONS):
        r = np.linalg.norm(apply(S, p) - q, axis=-1) if S is not None else one
        if k < ITERATIONS / 2:
            w = weights / np.maximum(r, 0.01)
        else:
            w = weights * (1 + (r / scale) ** 2) ** -2
        WA = (A * np.concatenate([w, w])[:, None]).T
        a, b, *shift = np.linalg.solve(WA @ A + 1e-9 * np.eye(4), WA @ target)
        R = np.array([[a, -b], [b, a]])
        S = np.concatenate([R, (shift + center - R @ center)[:, None]], axis=1)
    return S


def apply(S: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Positions `(..., 2)` after the affine map `(2, 3)` or `(3, 3)`."""
    return (p @ S[:2, :2].T + S[:2, 2]).astype(np.float32)
