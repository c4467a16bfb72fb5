"""Motion layers, from correspondences: the motion that each layer starts with, and where each layer is empty.

If everything starts at one depth, occluding surfaces stay at the same depth instead of separating. Therefore the
deformation is initialized from segmented motion: the background in the farthest part of each ray, the foreground in
front of it, and, if there is one, a fast occluder in front of both. At each position of the canonical volume, votes of
the correspondences decide before the first step which layers are empty. Without them, the few samples of the first
steps would decide, and results would differ between seeds.

Notation (motion)
    T, H, W  frames, height, width
    S, R     layers, vertices per side
    m        middle frame, in which all maps start as the identity
    p, q     positions of a coarse grid, every `stride` pixels, and where adjacent flow takes them    (h, w, 2)
    D_t      displacement from frame t to frame m: adjacent flows added up                            (h, w, 2)
    B_t      similarity, the background's motion from frame t to frame m                              (2, 3)
    F_t      similarity, the foreground's motion from frame t to frame m      (2, 3)
    M_t      similarity from frame t to t + 1 of the fast occluder                                    (3, 3)

Notation (votes)
    p, q     pixels of a coarse grid of frame t, and where correspondences take them in frame j       (n, 2)
    e_s      |M_t,s(p) - M_j,s(q)|, M_t,s the map from frame t to canonical space in layer s, in units of
             VOTE_SCALE: how much the correspondence contradicts the motion of layer s
    vote     margin by which layer s beats every layer behind it, clipped to [-1, 1]; negative: layer s is empty at p.
             0 if a layer in front of s is better than s and all layers behind s: that layer hides s
    v        sum of the votes around a vertex / (sum of their absolute values + PRIOR_VOTE * their number), in (-1, 1)
"""

from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from common.geometry import corners
from models.coords import denormalize_pixels, normalize_pixels
from models.omnimotion import OmniMotion
from training.layer_similarities import LayerSimilarities, apply, similarity

GRID_SIDE = 128             # positions of a coarse grid along the longer side

# shares of the frame's longer side
MIN_MOTION = 3 / 256        # smallest motion relative to the background that is a foreground's
MAX_MOTION = 0.3            # distance to the middle frame beyond which a rigid object counts as a fast occluder
OWN_MOTION = 12 / 256       # distance from the foreground's similarity at which motion counts a quarter
MIN_CROSSING = 0.5          # distance that a fast occluder covers against the background, at least
RADII = (0.06, 0.12, 0.24)  # standard deviations of the windows over which foreground motion is averaged
VOTE_SCALE = 2 / 256        # error that counts 1 in a vote

# shares of other things
OCCLUDER_AREA = 5e-3        # of the frame, at least
OCCLUDER_RIGID = 0.5        # of the fast positions that follow one rigid motion, at least
FULL_WINDOW = (0.2, 0.2, 1e-3)  # of moving positions under the window of each radius; below it, the next one takes part
MIN_CELL_AREA = 0.2         # of a cell's original area that remains after the displacement

TARGETS = 8                 # frames j of each frame t that vote, evenly among those with correspondences
PRIOR_VOTE = 0.1            # mean size of the votes at which v reaches half of what it can be
VOTE_BLUR = 1.0             # standard deviation in vertices


class LayerMotion(NamedTuple):
    """Motion of every layer and frame to the middle frame."""
    similarity: np.ndarray    # (T, S, 2, 3): the part of it that is a similarity
    displacement: np.ndarray  # (T, S, R, R, 2) float32: all of it, at given positions, pixels


class FastPart(NamedTuple):
    """Something rigid that moves fast against the background from frame t to frame t + 1."""
    t: int
    similarity: np.ndarray  # (2, 3)
    velocity: np.ndarray    # against the background, pixels per frame  (2,)
    center: np.ndarray      # in frame t  (2,)


def layers_of_motion(store, vertices: np.ndarray, crossing: np.ndarray | None = None) -> LayerMotion:
    """Motion in pixels to the middle frame, at positions `vertices` `(R, R, 2)` (x, y) of every frame, also outside it:
    of foreground and background, S = 2; with `crossing` (see `crossing_motion`) of the fast occluder in front of them,
    S = 3.

    store: a correspondence store. Where flow does not tell the foreground's motion, it is that of its similarity; a
    layer that is lost is at rest against the background (training/layer_similarities.py)."""
    T = store.num_frames
    m = T // 2
    p, _ = _coarse_grid(store.size)
    fitted = LayerSimilarities(store)
    front, behind = fitted.foreground, fitted.background
    foreground = np.empty((T, *vertices.shape), np.float32)
    for frames in (range(m, -1, -1), range(m, T)):
        D, known = np.zeros_like(p), np.ones(p.shape[:2], bool)
        for t in frames:
            if t != m:
                D, known = _extend_by_a_frame(store, t, t + (1 if t < m else -1), D, known)
            foreground[t] = apply(front[t], vertices) - vertices + _foreground_motion(
                D, known, behind[t], front[t], store.size, vertices)
    background = np.stack([apply(B, vertices) - vertices for B in behind]).astype(np.float32)
    layers = [(front, foreground), (behind, background)]
    if crossing is not None:
        to_middle = _occluder_similarity(crossing)
        layers.insert(0, (to_middle, np.stack([apply(M, vertices) - vertices for M in to_middle]).astype(np.float32)))
    similarities, displacements = zip(*layers, strict=True)
    return LayerMotion(np.stack(similarities, axis=1), np.stack(displacements, axis=1))


def _occluder_similarity(crossing: np.ndarray) -> np.ndarray:
    """Similarities of the fast occluder from every frame to the middle frame `(T, 2, 3)`."""
    T = len(crossing) + 1
    m = T // 2
    to_middle = np.tile(np.eye(3), (T, 1, 1))
    for t in range(m - 1, -1, -1):
        to_middle[t] = to_middle[t + 1] @ crossing[t]
    for t in range(m + 1, T):
        to_middle[t] = to_middle[t - 1] @ np.linalg.inv(crossing[t - 1])
    return to_middle[:, :2]


def crossing_motion(store) -> np.ndarray | None:
    """M_t of all adjacent frames `(T - 1, 3, 3)`, or None if there is no fast occluder: something rigid that moves so
    fast against the background that half the clip would take it farther than MAX_MOTION, and that covers MIN_CROSSING.

    Before and after the frames in which it is seen, its center keeps its first and last velocity."""
    T = store.num_frames
    side = max(store.size)
    run: list[FastPart] = []  # of adjacent frames
    best: list[FastPart] = []
    longest = 0.0  # distance that `best` covers
    for t in range(T - 1):
        part = _fast_part(store, t, 2 * MAX_MOTION / T * side)
        run = [*run, part] if part else []
        covered = np.linalg.norm(sum((part.velocity for part in run), np.zeros(2)))
        if covered > longest:
            longest = covered
            best = run
    if longest < MIN_CROSSING * side:
        return None
    out = np.tile(np.eye(3), (T - 1, 1, 1))
    for part in best:
        out[part.t, :2] = part.similarity
    first, last = best[0], best[-1]
    out[:first.t, :2, 2] = apply(first.similarity, first.center) - first.center
    out[last.t + 1:, :2, 2] = apply(last.similarity, last.center) - last.center
    return out


def _fast_part(store, t: int, speed: float) -> FastPart | None:
    """What moves faster than `speed` (pixels) against the background from frame t to the next, if it is rigid and large
    enough."""
    if not store.counts[t, t + 1]:
        return None
    p, flow, consistent = _coarse_flow(store, t, t + 1)
    q = p + flow
    background = similarity(p[consistent], q[consistent], 0.5)
    if background is None:
        return None
    against = q - apply(background, p)
    fast = consistent & (np.linalg.norm(against, axis=-1) > speed)
    tolerance = min(MIN_MOTION * max(store.size), speed / 2)
    M = similarity(p[fast], q[fast], tolerance / 2)
    if M is None:
        return None
    rigid = np.linalg.norm(apply(M, p[fast]) - q[fast], axis=-1) < tolerance
    if rigid.mean() < OCCLUDER_RIGID or rigid.sum() < OCCLUDER_AREA * fast.size:
        return None
    return FastPart(t, M, np.median(against[fast][rigid], axis=0), p[fast][rigid].mean(axis=0))


def _coarse_grid(size: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Positions of the coarse grid `(h, w, 2)`, and its stride in pixels."""
    H, W = size
    stride = -(-max(size) // GRID_SIDE)
    x, y = np.meshgrid(np.arange(0, W, stride), np.arange(0, H, stride))
    return np.stack([x, y], axis=-1).astype(np.float32), stride


def _coarse_flow(store, i: int, j: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions p of the coarse grid `(h, w, 2)`, the flow there from frame i to frame j `(h, w, 2)`, and whether it is
    cycle-consistent `(h, w)`."""
    p, stride = _coarse_grid(store.size)
    pair = store.dense(i, j)
    return p, pair.flow[::stride, ::stride], pair.cycle[::stride, ::stride]


def _extend_by_a_frame(store, t: int, n: int, D: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """D_t and where it is known, given those of the adjacent frame n, which is nearer to the middle frame."""
    if not store.counts[t, n]:  # a store of few pairs
        return D, np.zeros_like(known)
    p, flow, consistent = _coarse_flow(store, t, n)
    _, stride = _coarse_grid(store.size)
    q = p + flow
    place = (q / stride).astype(np.float32)
    D = flow + cv2.remap(D, place, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    inside = ((q >= 0) & (q <= p[-1, -1])).all(axis=-1)
    known = consistent & inside & (cv2.remap(known.astype(np.uint8), place, None, cv2.INTER_NEAREST) > 0)
    return D, known


def _foreground_motion(D: np.ndarray, known: np.ndarray, B: np.ndarray, F: np.ndarray, size: tuple[int, int],
                       at: np.ndarray) -> np.ndarray:
    """Motion `(R, R, 2)` to the middle frame at positions `at` `(R, R, 2)`, beyond the foreground's similarity F
    `(2, 3)`: a local mean over what moves against the background's, B; zero where nothing does. It does not fold.

    D `(h, w, 2)`: D_t; known `(h, w)`: where it is."""
    p, stride = _coarse_grid(size)
    against = p + D - apply(F, p)  # (h, w, 2)
    from_background = np.linalg.norm(p + D - apply(B, p), axis=-1) / max(size)
    distance = np.linalg.norm(against, axis=-1) / max(size)
    weights = (known & (from_background > MIN_MOTION)) * (1 + (distance / OWN_MOTION) ** 2) ** -2  # (h, w)
    values = np.dstack([against * weights[..., None], weights]).astype(np.float32)  # (h, w, 3)
    out = np.zeros_like(p)
    left = np.ones((*weights.shape, 1), np.float32)
    for radius, enough in zip(RADII, FULL_WINDOW, strict=True):
        around = cv2.GaussianBlur(values, (0, 0), radius * max(weights.shape), borderType=cv2.BORDER_CONSTANT)
        share = np.minimum(around[..., 2:] / enough, 1)
        out += left * share * around[..., :2] / np.maximum(around[..., 2:], 1e-6)
        left *= 1 - share
    out = _without_folds(out, apply(F, p), MIN_CELL_AREA * np.linalg.det(F[:, :2]) * stride ** 2)
    return cv2.remap(out, (at / stride).astype(np.float32), None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _without_folds(displacement: np.ndarray, p: np.ndarray, smallest: float) -> np.ndarray:
    """The displacement `(h, w, 2)` of positions p, blurred until every cell's area is at least `smallest`; zero if
    blurring does not help."""
    out = displacement
    sigma = 1.0
    while sigma < max(p.shape):
        x = np.diff(p + out, axis=1)[:-1]
        y = np.diff(p + out, axis=0)[:, :-1]
        if (x[..., 0] * y[..., 1] - x[..., 1] * y[..., 0] > smallest).all():
            return out
        out = cv2.GaussianBlur(displacement, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
        sigma *= 1.5
    return np.zeros_like(displacement)


@torch.no_grad()
def layer_votes(model: OmniMotion, store) -> np.ndarray:
    """v of all layers but the last, `(S - 1, R, R)` float32, rows along y; 0 where nothing votes.

    model: with motion layers (`--deform warp` or `grid`, `--field images` or `grid`), before its first step. store: a
    correspondence store."""
    H, W = store.size
    S, R = model.config.grid_layers, model.field.side
    p = _voting_pixels(store.size)
    sums = np.zeros((3, S - 1, R, R))  # of votes, of their absolute values, and their number
    with model.bound():
        for t, targets in enumerate(_voting_targets(store.counts)):
            if not len(targets):
                continue
            q, consistent = map(np.stack, zip(*(_flow_ends(store.index(t, j), p, W) for j in targets), strict=True))
            u = _canonical(model, [t], p[None])  # (1, S, n, 3)
            from_p = denormalize_pixels(u[..., :2], store.size)
            from_q = denormalize_pixels(_canonical(model, targets, q)[..., :2], store.size)
            e = (from_p - from_q).norm(dim=-1).cpu().numpy() / (VOTE_SCALE * max(H, W))  # (B, S, n)
            votes, counts = _votes(e)  # (B, S - 1, n)
            counts &= consistent[:, None]
            votes *= counts
            places = model.field.vertices_of(u[0]).cpu().numpy()  # (S, n, 2)
            for total, values in zip(sums, (votes, np.abs(votes), counts), strict=True):
                for s in range(S - 1):
                    _add_to_vertices(total[s], places[s], values[:, s].sum(axis=0))
    votes, sizes, counts = (np.stack([cv2.GaussianBlur(x, (0, 0), VOTE_BLUR) for x in total]) for total in sums)
    v = np.divide(votes, sizes + PRIOR_VOTE * counts, out=np.zeros_like(votes), where=counts > 0)
    return v.astype(np.float32)


def _voting_pixels(size: tuple[int, int]) -> np.ndarray:
    """Pixels `(n, 2)` int64 of a coarse grid. Its stride is odd, so that half of them lie on each color of a
    checkerboard, because some stores keep only the pixels of one color."""
    stride = -(-max(size) // GRID_SIDE) | 1
    y, x = (np.arange(min(stride // 2, (n - 1) // 2), n, stride) for n in size)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _voting_targets(counts: np.ndarray) -> list[np.ndarray]:
    """For each frame, up to TARGETS of the frames with which it has correspondences, evenly spaced among these."""
    targets = []
    for row in counts:
        js = np.flatnonzero(row)
        chosen = np.linspace(0, len(js) - 1, min(TARGETS, len(js))).round().astype(int)
        targets.append(js[np.unique(chosen)])
    return targets


def _flow_ends(pair, p: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a pair's flow takes pixels p `(n, 2)` of a frame of `width`, and whether it is cycle-consistent there
    `(n,)`."""
    flat = p @ (1, width)
    rows, stored = pair.find(flat)
    q = p.astype(np.float32)
    consistent = np.zeros(len(p), bool)
    q[stored] += pair.flow(rows[stored])
    consistent[stored] = pair.cycle_at(flat[stored])
    return q, consistent


def _canonical(model: OmniMotion, frames, p: np.ndarray) -> Tensor:
    """M_t,s(p) of pixels `(B, n, 2)` of B frames, at the middle depth of each layer: `(B, S, n, 3)`."""
    B, n = p.shape[:2]
    config = model.config
    S = config.grid_layers
    device = next(model.parameters()).device
    z = config.min_depth + (torch.arange(S, device=device) + 0.5) * ((config.max_depth - config.min_depth) / S)
    xy = normalize_pixels(torch.from_numpy(p).float().to(device), model.size)
    x = torch.cat([xy[:, None].expand(B, S, n, 2), z[:, None, None].expand(B, S, n, 1)], dim=-1)
    ids = torch.as_tensor(frames, device=device)
    return model.maps(ids).to_canonical(x.flatten(1, 2)).view_as(x)


def _votes(e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Votes `(..., S - 1, n)` for all layers but the last by errors `(..., S, n)`; and where there is a vote."""
    best_behind = np.minimum.accumulate(e[..., ::-1, :], axis=-2)[..., ::-1, :]  # layers s, s + 1, ...
    best_in_front = np.minimum.accumulate(e, axis=-2)  # layers 0, ..., s
    votes_at = np.ones(e[..., 1:, :].shape, bool)
    votes_at[..., 1:, :] = best_in_front[..., :-2, :] >= best_behind[..., 1:-1, :]
    return np.clip(best_behind[..., 1:, :] - e[..., :-1, :], -1, 1) * votes_at, votes_at


def _add_to_vertices(total: np.ndarray, place: np.ndarray, values: np.ndarray) -> None:
    """Add values `(n,)` at places `(n, 2)`, in vertices, to the four vertices of `total` `(R, R)` around them."""
    vertices, shares = corners(place, total.shape)
    total += np.bincount(vertices.ravel(), (shares * values[:, None]).ravel(), total.size).reshape(total.shape)
