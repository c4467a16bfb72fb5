"""Motion layers of a video: for each, one similarity a frame, from point tracks.

A grid of points of a frame, the seed, is followed by the stored flow over several intervals. The motion that most
tracks share is the background's. Every further layer is the motion that explains most of what the layers so far leave
unexplained. Frames in which too few of a layer's tracks are seen are reached from another seed, so that the camera may
travel. A layer that is not seen any more goes on at its last velocity.

Notation
    T, m     frames, middle frame
    k        seed frame; p_i,t is the position of its track i in frame t, seen where the flow was consistent
    G_t      similarity of a layer from frame t to the seed, fitted to its tracks                      (3, 3)
    F_t      similarity of a layer from frame t to the middle frame, F_k G_t                           (3, 3)
    w_i      weight of track i in the fit: near 1 if G_t p_i,t = p_i,k in the frames in which it is seen, near 0 if not
    prior    factor of w_i: near 0 if another layer explains the track
    gain     of a new layer: share of the sum of all tracks' distances from the nearest layer so far, each at most CAP,
             that it takes away
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from common.geometry import inside, regular_grid
from inference.flow_guided_tracker import StoredFlow
from inference.multi_interval_flow import follow_intervals
from training.layer_order import front_to_back, hidden_counts
from training.similarity import apply, similarity

TRACK_SIDE = 64       # tracks of a seed along the longer side
TOLERANCE = 3 / 256   # share of the longer side: distance from a layer's motion at which a track's weight is 1/4
CAP = 8               # times TOLERANCE: larger distances from a layer's motion count as this
REWEIGHTINGS = 4
MEMBER = 0.25         # weight from which on a track belongs to a layer
MIN_WEIGHT = 0.01     # tracks of smaller weights take no part in a fit
MIN_TRACKS = 8        # seen tracks that agree with a similarity, at least
MIN_SUPPORT = 0.25    # the same, as a share of the sum of the priors of the layer's tracks

MAX_LAYERS = 4
MIN_GAIN = 0.12       # of the second foreground layer and further ones
START_FRAMES = (1 / 4, 1 / 2, 3 / 4)  # shares of the clip: seeds in which a foreground is looked for
WINDOWS = 5           # windows along each side of the frame in which it is looked for
WINDOW_SIZE = 1 / 10  # standard deviation of a window, as a share of the longer side
SAMPLED_FRAMES = 8    # frames in which windows are compared

MAX_REACH = 96        # frames before and after a seed through which its tracks are followed
KEPT_SEEDS = 8        # whose tracks are kept in memory, 6 to 12 MB each for 300 frames
MIN_REACH = 4         # frames from one seed of the foreground to the next, at least; otherwise it is lost
MAX_GAP = 3           # frames in a row without a fit, as blank ones, after which a seed is given up
VELOCITY_FRAMES = 4   # last fitted frames of a foreground, which tell where it goes on
MAX_JUMP = 0.1        # share of the longer side: deviation of a foreground's center from where it goes on, at most
MAX_SCALE = 8.0       # zoom between a seed and a frame, at most


@dataclass
class SeedTracks:
    """Tracks of a grid of points of frame k."""
    k: int
    spacing: int         # pixels between the points
    points: np.ndarray   # (N, 2)
    tracks: np.ndarray   # (N, T, 2)
    visible: np.ndarray  # (N, T) bool
    followed: int        # number of frames through which they were followed


@dataclass
class Start:
    """Where the fit of a layer begins."""
    k: int               # seed frame
    weights: np.ndarray  # (N,) w_i
    gain: float


@dataclass
class Course:
    """Where a layer has been in one direction from its seed, relative to the background."""
    k: int                     # seed frame
    points: np.ndarray         # (n, 2) of its tracks in frame k
    frames: list[int]          # in which it was fitted
    centers: list[np.ndarray]  # of its tracks in these frames, (2,) each, in pixels of frame k

    def add(self, t: int, center: np.ndarray) -> None:
        """Add a frame."""
        self.frames.append(t)
        self.centers.append(center)

    def velocity(self) -> np.ndarray:
        """Median velocity in the last VELOCITY_FRAMES frames `(2,)`, in pixels a frame; 0 for a single frame."""
        if len(self.frames) == 1:
            return np.zeros(2)
        steps = np.diff(self.centers[-VELOCITY_FRAMES:], axis=0)
        return np.median(steps / np.diff(self.frames[-VELOCITY_FRAMES:])[:, None], axis=0)

    def expected(self, t: int) -> np.ndarray:
        """Center `(2,)` in frame t, at that velocity."""
        return self.centers[-1] + self.velocity() * (t - self.frames[-1])


def find_layers(store, count: int = 0) -> np.ndarray:
    """F_t of all layers `(S, T, 2, 3)` in pixels, nearest first, the background last.

    count: number of layers S; 0: the background, one foreground layer, and further ones whose gain is at least
    MIN_GAIN. A layer for which nothing is found moves with the background."""
    found = LayerSimilarities(store)
    while len(found.layers) < (count or MAX_LAYERS):
        start = found.best_start()
        if not count and len(found.layers) > 1 and (start is None or start.gain < MIN_GAIN):
            break
        found.add_foreground(start)
    found.continue_lost_layers()
    return found.nearest_first()[:, :, :2]


class LayerSimilarities:
    """`layers`: F_t `(T, 3, 3)` of each layer found so far, in pixels, the background first."""

    def __init__(self, store):
        self.store = store
        self.T = store.num_frames
        self.tolerance = TOLERANCE * max(store.size)
        self._seed = lru_cache(KEPT_SEEDS)(self._follow)
        self._median_distance = cache(self._median_distance_of)
        self.start_frames = sorted({int(share * self.T) for share in START_FRAMES})
        self._restarts: set[int] = set()  # frames in which the background was looked for again
        self.lost: list[tuple[int, Course, range]] = []  # layer, where it was before, frames in which it is lost
        self.layers: list[np.ndarray] = []
        m = self.T // 2
        self.layers.append(self._fit_layer(Start(m, np.ones(len(self._seed(m).points)), 1.0)))

    def add_foreground(self, start: Start | None) -> None:
        """Add a layer that begins with `start`; one that moves with the background if that is None."""
        self.layers.append(self.layers[0].copy() if start is None else self._fit_layer(start))

    def best_start(self) -> Start | None:
        """The start of the largest gain; None if no tracks have a motion of their own."""
        if self.T == 1:
            return None
        starts = [start for k in self.start_frames for start in self._starts(self._seed(k))]
        return max(starts, key=lambda start: start.gain, default=None)

    def continue_lost_layers(self) -> None:
        """Let layers go on in the frames in which they are lost. Until all layers are found, they rest there, because
        the wrong tracks that stay where an object left the frame would make a layer of their own."""
        for layer, course, frames in self.lost:
            self._continue(course, frames, self.layers[layer])
            self.layers[layer] = np.linalg.inv(self.layers[layer][self.T // 2]) @ self.layers[layer]

    def nearest_first(self) -> np.ndarray:
        """F_t of all layers `(S, T, 3, 3)`, ordered by which of them hides which (training/layer_order.py)."""
        if len(self.layers) < 3 or self.T == 1:
            return np.stack(self.layers[::-1])
        hidden = sum(self._hidden(self._seed(k)) for k in self.start_frames)
        return np.stack([self.layers[k] for k in front_to_back(hidden)])

    def _fit_layer(self, start: Start) -> np.ndarray:
        """F_t `(T, 3, 3)` of a layer. Those in `layers` are behind it; without any, it is the background."""
        out = np.tile(np.eye(3), (self.T, 1, 1))
        for end in (0, self.T - 1):
            self._fit_towards(end, out, start)
        return np.linalg.inv(out[self.T // 2]) @ out

    def _fit_towards(self, end: int, out: np.ndarray, start: Start | None) -> None:
        """Fill in `out` `(T, 3, 3)` from the start's seed to the first or the last frame, `end`."""
        direction = 1 if end else -1
        course = None  # of the layer since it was found
        while start is not None and start.k != end:
            seed = self._seed(start.k)
            course = self._fit_from(seed, start.weights, range(seed.k + direction, end + direction, direction), course,
                                    out)
            reached = course.frames[-1]
            if reached == end:
                return
            if abs(reached - seed.k) >= (MIN_REACH if self.layers else 1):
                start = Start(reached, self._members(self._seed(reached), out, seed.k), start.gain)
                continue
            start = self._restart(range(reached + direction, end + direction, direction))
            last = end if start is None else start.k
            lost = range(reached + direction, last + direction, direction)
            for t in lost:
                out[t] = out[reached] @ self._at_rest(reached, t)
            if self.layers:  # the background rests
                self.lost.append((len(self.layers), course, lost if start is None else lost[:-1]))
            course = None

    def _fit_from(self, seed: SeedTracks, weights: np.ndarray, frames: range, previous: Course | None,
                  out: np.ndarray) -> Course:
        """Fill in those of `frames`, which begin beside the seed, in which enough tracks support a fit that is near
        the expected position, up to the first MAX_GAP frames in a row without, and the frames between them. Far from
        it, the layer has left, and other tracks support the fit.

        previous: the course that has reached the seed. Returns the course from this seed, or `previous` if there is no
        such frame."""
        fits, members, center = self._fit_tracks(seed, weights, frames)
        course = Course(seed.k, seed.points[members], [], [])
        for t in previous.frames[-VELOCITY_FRAMES:] if previous else [seed.k]:
            course.add(t, self._against_background(np.linalg.inv(out[seed.k]) @ out[t], seed.k, t, center))
        for t in frames:
            last = course.frames[-1]
            if abs(t - last) > MAX_GAP:
                break
            if t in fits:
                place = self._against_background(fits[t], seed.k, t, center)
                off = np.linalg.norm(place - course.expected(t))
                if len(course.frames) == 1 or off < MAX_JUMP * max(self.store.size):
                    self._continue(course, range(last + frames.step, t, frames.step), out)
                    out[t] = out[seed.k] @ fits[t]
                    course.add(t, place)
        return previous if previous and course.frames[-1] == seed.k else course

    def _fit_tracks(self, seed: SeedTracks, weights: np.ndarray,
                    frames: range) -> tuple[dict[int, np.ndarray], np.ndarray, np.ndarray]:
        """{t: G_t} of those of `frames` in which enough tracks support the fit; the layer's tracks `(N,)` bool; and
        their center `(2,)` in the seed. weights `(N,)`: w_i to begin with."""
        prior = self._prior(seed)
        for _ in range(REWEIGHTINGS):
            distances, found = self._fitted_distances(seed, weights, frames)
            agreement = self._agreement(distances)
            weights = prior * agreement
        members = (agreement > MEMBER) & (self._unexplained(seed) > MEMBER)
        enough = max(MIN_TRACKS, MIN_SUPPORT * prior[members].sum())
        support = (distances[members] < 2 * self.tolerance).sum(axis=0)
        fits = {t: found[t] for t, count in zip(frames, support, strict=True) if t in found and count >= enough}
        return fits, members, weights @ seed.points / max(weights.sum(), 1e-9)

    def _continue(self, course: Course, frames: range, out: np.ndarray) -> None:
        """Fill in `frames`, in which a layer is not seen, after the last one of its course: against the background it
        goes on at constant velocity until it has left the frame, and rests there."""
        k, last = course.k, course.frames[-1]
        shift = np.eye(3)
        inside_frame = True
        for t in frames:
            if inside_frame:
                shift[:2, 2] -= course.velocity() * frames.step
            out[t] = out[last] @ self._at_rest(last, k) @ shift @ self._at_rest(k, t)
            inside_frame = inside(apply(np.linalg.inv(out[t]) @ out[k], course.points), self.store.size).any()

    def _restart(self, frames: range) -> Start | None:
        """Where a layer that is lost is looked for again, in the order of `frames`: the background in the first of
        them that has flow, the foreground where the background was lost too, as at a cut; None if there is no such
        frame."""
        if self.layers:
            k = next((k for k in frames if k in self._restarts), None)
            return None if k is None else max(self._starts(self._seed(k)), key=lambda start: start.gain, default=None)
        k = next((k for k in frames if self._has_flow(k, frames.step)), None)
        if k is None:
            return None
        self._restarts |= {frames[0] - frames.step, k}  # the last frame of one scene, the first of the next
        return Start(k, np.ones(len(self._seed(k).points)), 1.0)

    def _has_flow(self, k: int, direction: int) -> bool:
        """Whether any flow is stored from frame k to the next MAX_GAP frames in a direction."""
        nearest = np.arange(k + direction, k + direction * (MAX_GAP + 1), direction)
        return bool(self.store.counts[k, nearest[(nearest >= 0) & (nearest < self.T)]].any())

    def _at_rest(self, k: int, t: int) -> np.ndarray:
        """G_t of something that does not move against the background."""
        return np.linalg.inv(self.layers[0][k]) @ self.layers[0][t] if self.layers else np.eye(3)

    def _follow(self, k: int) -> SeedTracks:
        """The tracks of frame k, through at most MAX_REACH frames before and after it."""
        store = self.store
        spacing = -(-max(store.size) // TRACK_SIDE)
        points = regular_grid(store.size, spacing, spacing // 2).reshape(-1, 2)
        first = max(k - MAX_REACH, 0)
        last = min(k + MAX_REACH, self.T - 1)
        queries = np.insert(points[:, ::-1], 0, k - first, axis=1)
        flow = StoredFlow(store)
        paths = follow_intervals(queries, last - first + 1, store.size,
                                 lambda a, b, p: flow.step(first + a, first + b, p))
        missing = ((0, 0), (first, self.T - 1 - last))  # frames through which they are not followed
        return SeedTracks(k, spacing, points, np.pad(paths.tracks, (*missing, (0, 0)), constant_values=np.nan),
                          np.pad(paths.visible, missing), last - first + 1)

    def _distances(self, seed: SeedTracks, F: np.ndarray, frames) -> np.ndarray:
        """Distance of every track from the motion F `(T, 3, 3)` in `frames`, in pixels of the seed; NaN where it is not
        seen, `(N, len(frames))`."""
        back = np.linalg.inv(F[seed.k])
        out = np.stack([np.linalg.norm(apply(back @ F[t], seed.tracks[:, t]) - seed.points, axis=-1) for t in frames],
                       axis=1)
        out[~seed.visible[:, list(frames)]] = np.nan
        return out

    def _median_distance_of(self, k: int, layer: int) -> np.ndarray:
        """Median over the frames of the distance of each track of seed k from a layer's motion `(N,)`; 0 of a track
        that is seen in frame k only."""
        seed = self._seed(k)
        others = np.delete(np.arange(self.T), k)
        seen = seed.visible[:, others].any(axis=1)
        out = np.zeros(len(seen), np.float32)
        out[seen] = np.nanmedian(self._distances(seed, self.layers[layer], others)[seen], axis=1)
        return out

    def _unexplained(self, seed: SeedTracks) -> np.ndarray:
        """1 minus the weight of each track in the layer whose motion is nearest `(N,)`; 1 without layers."""
        if not self.layers:
            return np.ones(len(seed.points))
        distance = np.min([self._median_distance(seed.k, layer) for layer in range(len(self.layers))], axis=0)
        return 1 - self._weight(distance ** 2)

    def _prior(self, seed: SeedTracks) -> np.ndarray:
        """The prior of each track `(N,)`. Of a foreground, tracks that are seen for longer count more."""
        if not self.layers:
            return np.ones(len(seed.points))
        return self._unexplained(seed) * seed.visible.sum(axis=1) / seed.followed

    def _members(self, seed: SeedTracks, F: np.ndarray, before: int) -> np.ndarray:
        """Weights `(N,)` to begin with in a later seed: agreement with F from the seed `before` it."""
        frames = range(before, seed.k, 1 if seed.k > before else -1)
        return self._prior(seed) * self._agreement(self._distances(seed, F, frames))

    def _starts(self, seed: SeedTracks) -> list[Start]:
        """Starts of a foreground layer in a seed: the motions of the windows of a regular grid."""
        first, last = max(seed.k - MAX_REACH, 0), min(seed.k + MAX_REACH, self.T - 1)
        frames = np.unique(np.linspace(first, last, SAMPLED_FRAMES).round().astype(int))
        prior = self._prior(seed)
        remaining = np.min([self._capped(self._distances(seed, F, frames)) for F in self.layers], axis=0)
        out = []
        for center in (np.indices((WINDOWS, WINDOWS)).reshape(2, -1).T + 0.5) / WINDOWS * self.store.size[::-1]:
            squared = ((seed.points - center) ** 2).sum(axis=1) / (WINDOW_SIZE * max(self.store.size)) ** 2
            weights = prior * np.exp(-squared / 2)
            for _ in range(2):
                distances = self._fitted_distances(seed, weights, frames)[0]
                weights = prior * self._agreement(distances)
            reduction = np.where(np.isfinite(distances), remaining - self._capped(distances), 0).sum(axis=1)
            gain = np.maximum(reduction, 0).sum() / max(remaining.sum(), 1e-9)
            if gain > 0:
                out.append(Start(seed.k, weights, gain))
        return out

    def _capped(self, distances: np.ndarray) -> np.ndarray:
        """Distances of at most CAP; 0 for NaN."""
        return np.nan_to_num(np.minimum(distances, CAP * self.tolerance))

    def _weight(self, squared: np.ndarray) -> np.ndarray:
        """w of a squared distance, in square pixels."""
        return (1 + squared / self.tolerance ** 2) ** -2

    def _agreement(self, distances: np.ndarray) -> np.ndarray:
        """w_i `(N,)` of distances `(N, frames)` with NaN."""
        squared = self._capped(distances) ** 2
        count = np.isfinite(distances).sum(axis=1)
        return np.where(count > 0, self._weight(squared.sum(axis=1) / np.maximum(count, 1)), 0)

    def _fitted_distances(self, seed: SeedTracks, weights: np.ndarray,
                          frames) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Distances `(N, frames)` of all tracks from the similarities that fit the tracks of these weights `(N,)`, NaN
        where a track is not seen or nothing fits; and {t: G_t}."""
        found = {}
        distances = np.full((len(weights), len(frames)), np.nan)
        chosen = weights > MIN_WEIGHT * weights.max()
        for column, t in enumerate(frames):
            if t == seed.k:
                continue
            seen = seed.visible[:, t]
            rows = np.flatnonzero(chosen & seen)
            fit = similarity(seed.tracks[rows, t], seed.points[rows], self.tolerance, weights=weights[rows])
            if fit is None or not 1 / MAX_SCALE < np.linalg.det(fit[:, :2]) ** 0.5 < MAX_SCALE:
                continue  # a blank frame, or one after the tracks' end
            found[t] = np.vstack([fit, [0, 0, 1]])
            distances[seen, column] = np.linalg.norm(apply(fit, seed.tracks[seen, t]) - seed.points[seen], axis=-1)
        return distances, found

    def _against_background(self, G: np.ndarray, k: int, t: int, center: np.ndarray) -> np.ndarray:
        """Position relative to the background, in pixels of frame k, that a point `center` of frame k has moved to in
        frame t by G. The background itself does not move."""
        return apply(self._at_rest(k, t) @ np.linalg.inv(G), center) if self.layers else center

    def _hidden(self, seed: SeedTracks) -> np.ndarray:
        """How often each layer hides each other one, as `layer_order.hidden_counts`."""
        frames = np.delete(np.arange(self.T), seed.k)
        agreement = np.stack([self._agreement(self._distances(seed, F, frames)) for F in self.layers])  # (S, N)
        layer = np.where(agreement.max(axis=0) > MEMBER, agreement.argmax(axis=0), -1)
        expected = np.stack([[apply(G, seed.points) for G in np.linalg.inv(F) @ F[seed.k]] for F in self.layers])
        return hidden_counts(layer, seed.tracks, seed.visible, expected, self.store.size, seed.spacing)
