"""Trails: the path of each foreground point over the last frames, relative to the background.

Notation
    T, N, L  frames, tracks, frames of a trail
    step     step[t], a homography that takes background pixels of frame t to frame t + 1   (T - 1, 3, 3)
"""

from collections.abc import Iterator

import cv2
import numpy as np

from drawing.legend import point_legend, with_strip
from drawing.tracks import draw_paths, draw_points, enlarge, frame_caption, on_picture, picture_zoom, too_dense

TRAIL = 24        # frames of a trail
PIECE = 3         # consecutive frames of a trail drawn with one opacity
DIMMED = 0.55     # brightness of the frames under the trails
RANSAC_PX = 1.5   # pixels: inlier distance of the background's homography


def background_step(points: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Homography `(3, 3)` from points `(M, 2)` to `moved` `(M, 2)` by RANSAC; a translation by the median motion if
    there are fewer than 8 points or no homography is found."""
    if len(points) >= 8:
        found, _ = cv2.findHomography(points.astype(np.float64), moved.astype(np.float64), cv2.RANSAC, RANSAC_PX)
        if found is not None and np.isfinite(found).all():
            return found
    out = np.eye(3)
    if len(points):
        out[:2, 2] = np.median(moved - points, axis=0)
    return out


def stabilized_trails(tracks: np.ndarray, steps: np.ndarray, t: int, length: int = TRAIL) -> np.ndarray:
    """Positions of tracks `(N, T, 2)` in the last frames up to t, warped into frame t by the background's motion.

    Returns `(N, L, 2)`, oldest first; the last one is the position in frame t."""
    start = max(0, t - length)
    out = np.empty((len(tracks), t - start + 1, 2))
    carry = np.eye(3)  # homography from frame k to frame t
    for k in range(t, start - 1, -1):
        if k < t:
            carry = carry @ steps[k]
        out[:, k - start] = _apply(carry, tracks[:, k])
    return out


def trail_pictures(frames: np.ndarray, tracks: np.ndarray, visible: np.ndarray, colors: np.ndarray, steps: np.ndarray,
                   query_frame: int, spacing: float = np.inf) -> Iterator[np.ndarray]:
    """Pictures of all frames `(T, H, W, 3)` with trails of the foreground's tracks `(N, T, 2)`, visible `(N, T)`, in
    colors `(N, 3)`. A trail fades with age and is drawn where its point is visible. Query points are `spacing` pixels
    of the frame apart."""
    zoom = picture_zoom(frames.shape[1:3])
    legend = point_legend(too_dense(spacing, zoom))
    for t, frame in enumerate(frames):
        picture = np.rint(enlarge(frame, zoom) * DIMMED).astype(np.uint8)
        shown = visible[:, t]
        _draw_trails(picture, on_picture(stabilized_trails(tracks[shown], steps, t), zoom), colors[shown])
        draw_points(picture, tracks[:, t], shown, colors, zoom, spacing)
        caption = f"paths of up to {TRAIL} frames, camera motion removed"
        yield with_strip(picture, f"{frame_caption(t, len(frames), query_frame)}   {caption}", legend)


def _draw_trails(picture: np.ndarray, trails: np.ndarray, colors: np.ndarray) -> None:
    """Draw trails `(N, L, 2)` in pixels of the picture; older pieces are fainter."""
    last = trails.shape[1] - 1
    for age in reversed(range(0, last, PIECE)):
        layer = picture.copy()
        draw_paths(layer, trails[:, max(0, last - age - PIECE):last - age + 1], colors, 2)
        cv2.addWeighted(layer, 1 - age / TRAIL, picture, age / TRAIL, 0, picture)


def _apply(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    x = np.concatenate([points, np.ones((len(points), 1))], 1) @ homography.T  # (N, 3)
    return x[:, :2] / np.where(abs(x[:, 2:]) < 1e-9, 1e-9, x[:, 2:])
