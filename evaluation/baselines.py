"""What tracking costs nothing: points that do not move, and optical flow chained from frame to frame.

Notation
    M, T   query points, frames
    query  (t, y, x)
    fb     forward-backward error: where a point is after one step there and back, pixels
"""

import numpy as np

from common.errors import UserError
from loaders.track_files import PointTracks

MAX_FB = 1.0  # pixels


def static_tracks(query_points: np.ndarray, num_frames: int, size: tuple[int, int]) -> PointTracks:
    """Query points `(M, 3)` that stay where they are, visible in all frames."""
    tracks = np.repeat(query_points[:, None, :0:-1], num_frames, axis=1).astype(np.float32)  # (M, T, 2)
    return PointTracks(tracks, np.ones(tracks.shape[:2], bool), query_points, size)


def chained_flow_tracks(query_points: np.ndarray, store) -> PointTracks:
    """Query points `(M, 3)` moved along the flow between adjacent frames, forward and backward from their frame.

    store: correspondences (loaders/store.py). UserError unless it has the flow of every pixel of adjacent frames.
    From the step on where fb exceeds MAX_FB a point counts as occluded, because the chain may then follow what hides
    it; its position is chained on. Outside the frame it is occluded only for as long. Of MAX_FB 1 and 3 px, recovery
    from a large fb or none, and waiting at the place of the loss or not, this is the best by average_jaccard on the
    synthetic scenes and on a real clip."""
    check_adjacent_flow(store)
    M, T = len(query_points), store.num_frames
    start = np.round(query_points[:, 0]).astype(np.int64)
    tracks = np.repeat(query_points[:, None, :0:-1], T, axis=1).astype(np.float32)  # (M, T, 2)
    lost = np.zeros((M, T), bool)
    for step, frames in ((1, range(T - 1)), (-1, range(T - 1, 0, -1))):
        for a in frames:
            b = a + step
            rows = np.flatnonzero(start <= a if step > 0 else start >= a)
            there, back = store.dense(a, b).flow, store.dense(b, a).flow
            move = sample(there, tracks[rows, a])
            tracks[rows, b] = tracks[rows, a] + move
            fb = np.linalg.norm(move + sample(back, tracks[rows, b]), axis=-1)
            lost[rows, b] = lost[rows, a] | (fb > MAX_FB)
    return PointTracks(tracks, ~lost & inside(tracks, store.size), query_points, store.size)


def check_adjacent_flow(store) -> None:
    """UserError unless a store has the flow of every pixel of adjacent frames; one that was made of tracks has not."""
    H, W = store.size
    if not (store.pairs == (0, 1)).all(axis=1).any() or store.index(0, 1).count != H * W:
        raise UserError(f"the correspondences in {store.root} have no flow of every pixel between adjacent frames, as "
                        "those that are made of tracks: make them with --flow dis or raft")


def sample(flow: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Flow (or colors) `(H, W, c)` at points `(n, 2)`, bilinear, `(n, c)`; outside the frame that of the nearest
    border pixel."""
    pixels, weights = corners(points, flow.shape[:2])
    return (weights[..., None] * flow.reshape(-1, flow.shape[2])[pixels]).sum(axis=1).astype(np.float32)


def corners(points: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The four pixels around each of the points `(n, 2)`, as flat indices, and their bilinear weights: `(n, 4)` each.
    A point outside the frame counts as the nearest one inside."""
    H, W = size
    x, y = points[:, 0].clip(0, W - 1), points[:, 1].clip(0, H - 1)
    x0, y0 = np.minimum(x.astype(np.int64), W - 2), np.minimum(y.astype(np.int64), H - 2)
    u, v = x - x0, y - y0
    weights = np.stack([(1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v], axis=-1)
    return (y0 * W + x0)[:, None] + np.array([0, 1, W, W + 1]), weights


def inside(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which of the points `(..., 2)` are in a frame of `size` = (H, W), whose pixels reach half a pixel out."""
    return ((points >= -0.5) & (points <= np.array(size[::-1]) - 0.5)).all(axis=-1)
