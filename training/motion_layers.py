"""Motion layers, from correspondences: the motion that each layer starts with, and where each layer is empty.

If everything starts at one depth, occluding surfaces stay at the same depth instead of separating. Therefore the
deformation is initialized from segmented motion (training/layer_similarities.py): the background in the farthest part
of each ray, what moves otherwise in front of it. At each position of the canonical volume, votes of the correspondences
decide before the first step which layers are empty. Without them, the few samples of the first steps would decide, and
results would differ between seeds.

Notation (motion)
    T, H, W  frames, height, width
    S, R     layers, vertices per side
    m        middle frame, in which all maps start as the identity
    p, q     positions of a coarse grid, every `stride` pixels, and where adjacent flow takes them    (h, w, 2)
    D_t      displacement from frame t to frame m: adjacent flows added up                            (h, w, 2)
    F_t      similarity of a layer from frame t to frame m                                            (2, 3)

Notation (votes)
    p, q     pixels of a coarse grid of frame t, and where correspondences take them in frame j       (n, 2)
    e_s      |M_t,s(p) - M_j,s(q)|, M_t,s the map from frame t to canonical space in layer s, in units of
             VOTE_SCALE: how much the correspondence contradicts the motion of layer s
    vote     margin by which layer s beats every layer behind it, clipped to [-1, 1]; negative: layer s is empty at p.
             0 if a layer in front of s is better than s and all layers behind s: that layer hides s
    v        sum of the votes around a vertex / (sum of their absolute values + PRIOR_VOTE * their number), in (-1, 1)
"""

import cv2
import numpy as np
import torch
from torch import Tensor

from common.geometry import corners
from models.coords import denormalize_pixels, normalize_pixels
from models.omnimotion import OmniMotion
from training.similarity import apply

GRID_SIDE = 128             # positions of a coarse grid along the longer side

# shares of the frame's longer side
MIN_MOTION = 3 / 256        # smallest motion relative to the background that is a foreground's
OWN_MOTION = 12 / 256       # distance from the foreground's similarity at which motion counts a quarter
RADII = (0.06, 0.12, 0.24)  # standard deviations of the windows over which foreground motion is averaged
VOTE_SCALE = 2 / 256        # error that counts 1 in a vote

# shares of other things
FULL_WINDOW = (0.2, 0.2, 1e-3)  # of moving positions under the window of each radius; below it, the next one takes part
MIN_CELL_AREA = 0.2         # of a cell's original area that remains after the displacement

TARGETS = 8                 # frames j of each frame t that vote, evenly among those with correspondences
PRIOR_VOTE = 0.1            # mean size of the votes at which v reaches half of what it can be
VOTE_BLUR = 1.0             # standard deviation in vertices


def layers_of_motion(store, vertices: np.ndarray, similarities: np.ndarray) -> np.ndarray:
    """Motion in pixels of every layer to the middle frame `(T, S, R, R, 2)` float32, at positions `vertices`
    `(R, R, 2)` (x, y) of every frame, also outside it.

    store: a correspondence store. similarities: F_t of all layers `(S, T, 2, 3)`, the background last, as of
    `layer_similarities.find_layers`. Where flow does not tell the motion of a foreground layer, it is that of its
    similarity."""
    T = store.num_frames
    m = T // 2
    p, _ = _coarse_grid(store.size)
    rigid = np.stack([[apply(F, vertices) - vertices for F in layer] for layer in similarities], axis=1)
    out = rigid.astype(np.float32)  # (T, S, R, R, 2)
    for frames in (range(m, -1, -1), range(m, T)):
        D, known = np.zeros_like(p), np.ones(p.shape[:2], bool)
        for t in frames:
            if t != m:
                D, known = _extend_by_a_frame(store, t, t + (1 if t < m else -1), D, known)
            for layer in range(len(similarities) - 1):
                out[t, layer] += _foreground_motion(D, known, similarities[:, t], layer, store.size, vertices)
    return out


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


def _foreground_motion(D: np.ndarray, known: np.ndarray, similarities: np.ndarray, layer: int, size: tuple[int, int],
                       at: np.ndarray) -> np.ndarray:
    """Motion `(R, R, 2)` of a foreground layer to the middle frame at positions `at` `(R, R, 2)`, beyond its
    similarity: a local mean over what moves against the background and most like this layer; zero where nothing does.
    It does not fold.

    D `(h, w, 2)`: D_t; known `(h, w)`: where it is. similarities: F_t of all layers `(S, 2, 3)`."""
    p, stride = _coarse_grid(size)
    F = similarities[layer]
    against = p + D - apply(F, p)  # (h, w, 2)
    distances = np.stack([np.linalg.norm(p + D - apply(other, p), axis=-1) for other in similarities]) / max(size)
    own = known & (distances[-1] > MIN_MOTION) & (distances[layer] <= distances[:-1].min(axis=0))
    weights = own * (1 + (distances[layer] / OWN_MOTION) ** 2) ** -2  # (h, w)
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
