"""Layers of motion as a start: the background's, nearer what moves against it, and in front what crosses the picture.

A volume in which everything starts at one depth stays a sheet: what overlaps is squeezed together instead of being put
in front of each other. With one motion in the nearer half of each ray and one in the other, every pixel finds its layer
in the first steps.

Notation
    T, H, W  frames, height, width
    m        middle frame, where all maps start as the identity
    p, q     positions of a coarse raster, every `stride` pixels, and where adjacent flow takes them  (h, w, 2)
    D_t      displacement from frame t to frame m: adjacent flows added up                            (h, w, 2)
    S_t      similarity, the background's motion from frame t to frame m                              (2, 3)
    moves    believed positions whose D_t differs from S_t's by more than APART, less than FAR        (h, w)
    M_t      similarity from frame t to t + 1 of what crosses the picture: a rigid motion that is so fast against the
             background's that half the clip would take it farther than FAR, and takes it by CROSSES       (3, 3)
"""

import cv2
import numpy as np

RASTER = 128     # positions along the longer side
APART, FAR = 3 / 256, 0.3  # of the longer side: what moves, and what moves too far for what would be in between
CROSSES, PART, RIGID = 0.5, 5e-3, 0.5  # of the longer side; of the picture, at least; of what is so fast, at least
REFIT = 0.4      # share of the positions from which on S_t is fitted to D_t
RADII = (0.06, 0.12, 0.24)  # of the longer side: what moves is averaged over the smallest that finds enough of it
ENOUGH = (0.2, 0.2, 1e-3)   # share of what moves under the window
FEW, ROUNDS = 10, 10        # positions that are too few for a similarity; of its fit
UNFOLDED = 0.2              # of a cell's area is left of it, at least


def layers_of_motion(store, vertices: np.ndarray, crossing: np.ndarray | None = None) -> np.ndarray:
    """Displacements in pixels to the middle frame at positions `vertices` `(R, R, 2)` (x, y) of every frame, also
    outside it, `(T, S, R, R, 2)` float32: of what moves and of the background, S = 2; with `crossing`, that motion
    in front of these, S = 3.

    store: a correspondence store; where nothing is believed, the background's motion stands in, without any the
    identity."""
    T, (H, W) = store.num_frames, store.size
    p, stride = _raster(store.size)
    near, far, front = np.empty((3, T, *vertices.shape), np.float32)
    m = T // 2
    for frames in (range(m, -1, -1), range(m, T)):
        D, known, S, M = np.zeros_like(p), np.ones(p.shape[:2], bool), np.eye(2, 3), np.eye(3)
        for t in frames:
            if t != m:
                D, known, S = _one_frame_on(store, t, t + (1 if t < m else -1), p, stride, D, known, S)
            far[t] = _apply(S, vertices) - vertices
            near[t] = far[t] + _moving(p, D, known, S, max(H, W), vertices)
            if crossing is not None:
                if t != m:
                    M = M @ (crossing[t] if t < m else np.linalg.inv(crossing[t - 1]))
                front[t] = _apply(M[:2], vertices) - vertices
    return np.stack([near, far] if crossing is None else [front, near, far], axis=1)


def crossing_motion(store) -> np.ndarray | None:
    """M_t of all adjacent frames `(T - 1, 3, 3)`, or None if nothing crosses the picture. Before and after what is seen
    of it, its center goes on as at first and at last."""
    T, side, (p, stride) = store.num_frames, max(store.size), _raster(store.size)
    run, far, best = [], np.zeros(2), (0.0, [])  # parts of frames in a row, and how far they go against the background
    for t in range(T - 1):
        part = _fast_part(store, t, p, stride, 2 * FAR / T * side)
        run, far = ([*run, (t, part)], far + part[1]) if part else ([], np.zeros(2))
        best = max(best, (float(np.linalg.norm(far)), run), key=lambda found: found[0])
    if best[0] < CROSSES * side:
        return None
    run = best[1]
    out = np.tile(np.eye(3), (T - 1, 1, 1))
    for t, (M, _, _) in run:
        out[t, :2] = M
    out[:run[0][0], :2, 2], out[run[-1][0] + 1:, :2, 2] = (_apply(M, center) - center for _, (M, _, center) in (
        run[0], run[-1]))
    return out


def _fast_part(store, t: int, p: np.ndarray, stride: int, speed: float) -> tuple | None:
    """The similarity `(2, 3)` from frame t to the next that most of what is faster than `speed` (pixels, against the
    background) follows, how far that goes against the background `(2,)`, and its center `(2,)`; None if there is too
    little of it."""
    if not store.counts[t, t + 1]:
        return None
    pair = store.dense(t, t + 1)
    q, believed = p + pair.flow[::stride, ::stride], pair.cycle[::stride, ::stride]
    background = _similarity(p[believed], q[believed], 0.5)
    if background is None:
        return None
    against = q - _apply(background, p)
    fast, near = believed & (np.linalg.norm(against, axis=-1) > speed), min(APART * max(store.size), speed / 2)
    M = _similarity(p[fast], q[fast], near / 2)
    if M is None:
        return None
    rigid = np.linalg.norm(_apply(M, p[fast]) - q[fast], axis=-1) < near
    if rigid.mean() < RIGID or rigid.sum() < PART * fast.size:
        return None
    return M, np.median(against[fast][rigid], axis=0), p[fast][rigid].mean(axis=0)


def _raster(size: tuple[int, int]) -> tuple[np.ndarray, int]:
    (H, W), stride = size, -(-max(size) // RASTER)
    return np.stack(np.meshgrid(np.arange(0, W, stride), np.arange(0, H, stride)), axis=-1).astype(np.float32), stride


def _one_frame_on(store, t: int, n: int, p: np.ndarray, stride: int, D: np.ndarray, known: np.ndarray, S: np.ndarray):
    """D_t, where it is believed, and S_t, from those of the adjacent frame n, which is nearer to m."""
    if not store.counts[t, n]:  # a store of few pairs
        return D, np.zeros_like(known), S
    pair = store.dense(t, n)
    flow, believed = pair.flow[::stride, ::stride], pair.cycle[::stride, ::stride]
    q = p + flow
    place = (q / stride).astype(np.float32)
    D = flow + cv2.remap(D, place, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    inside = ((q >= 0) & (q <= p[-1, -1])).all(axis=-1)
    known = believed & inside & (cv2.remap(known.astype(np.uint8), place, None, cv2.INTER_NEAREST) > 0)
    step = _similarity(p[believed], q[believed], 0.5)
    S = (S @ np.vstack([step, [0, 0, 1]])) if step is not None else S
    if known.mean() > REFIT:  # what is added up over many frames drifts
        again = _similarity(p[known], (p + D)[known], APART * max(store.size) / 2, S)
        S = S if again is None else again
    return D, known, S


def _similarity(p: np.ndarray, q: np.ndarray, scale: float, start: np.ndarray | None = None) -> np.ndarray | None:
    """The similarity `(2, 3)` that takes most of the positions `(n, 2)` p near q, by reweighted least squares (Geman
    and McClure's weights) from `start`, or from the best by mean distance; `scale` is the distance in pixels at which
    a pair counts a quarter. None for too few."""
    if len(p) < FEW:
        return None
    center = p.mean(axis=0, dtype=np.float64)
    (x, y), one, none = (p - center).T.astype(np.float64), np.ones(len(p)), np.zeros(len(p))
    A = np.stack([np.stack([x, -y, one, none], axis=-1), np.stack([y, x, none, one], axis=-1)])  # (2, n, 4)
    target, S = (q - center).T.astype(np.float64), start  # (2, n)
    for k in range(ROUNDS):
        r = np.linalg.norm(_apply(S, p) - q, axis=-1) if S is not None else one
        weights = 1 / np.maximum(r, 0.01) if start is None and k < ROUNDS / 2 else (1 + (r / scale) ** 2) ** -2
        B = A * weights[:, None]
        a, b, *shift = np.linalg.solve(np.einsum("dnc,dne->ce", B, A) + 1e-9 * np.eye(4),
                                       np.einsum("dnc,dn->c", B, target))
        R = np.array([[a, -b], [b, a]])
        S = np.concatenate([R, (shift + center - R @ center)[:, None]], axis=1)
    return S


def _apply(S: np.ndarray, p: np.ndarray) -> np.ndarray:
    return (p @ S[:, :2].T + S[:, 2]).astype(np.float32)


def _moving(p: np.ndarray, D: np.ndarray, known: np.ndarray, S: np.ndarray, side: int, at: np.ndarray) -> np.ndarray:
    """Motion against the background `(R, R, 2)` at positions `at` `(R, R, 2)`: of what moves nearby, averaged; zero if
    nothing moves."""
    stride = -(-side // RASTER)
    against = p + D - _apply(S, p)  # (h, w, 2)
    distance = np.linalg.norm(against, axis=-1) / side
    moves = known & (distance > APART) & (distance < FAR)
    values = np.dstack([against * moves[..., None], moves]).astype(np.float32)  # (h, w, 3)
    out, left = np.zeros_like(p), np.ones((*moves.shape, 1), np.float32)
    for radius, enough in zip(RADII, ENOUGH, strict=True):
        around = cv2.GaussianBlur(values, (0, 0), radius * max(moves.shape), borderType=cv2.BORDER_CONSTANT)
        share = np.minimum(around[..., 2:] / enough, 1)
        out += left * share * around[..., :2] / np.maximum(around[..., 2:], 1e-6)
        left *= 1 - share
    out = _unfolded(out, _apply(S, p), UNFOLDED * np.linalg.det(S[:, :2]) * stride ** 2)
    return cv2.remap(out, (at / stride).astype(np.float32), None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _unfolded(displacement: np.ndarray, p: np.ndarray, least: float) -> np.ndarray:
    """The displacement `(h, w, 2)` of positions p, blurred until every cell's area is at least `least`; none if that
    does not help."""
    out, sigma = displacement, 1.0
    while sigma < max(p.shape):
        x, y = np.diff(p + out, axis=1)[:-1], np.diff(p + out, axis=0)[:, :-1]
        if (x[..., 0] * y[..., 1] - x[..., 1] * y[..., 0] > least).all():
            return out
        out = cv2.GaussianBlur(displacement, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
        sigma *= 1.5
    return np.zeros_like(displacement)
