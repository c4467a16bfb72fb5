"""Draw points, tracks and matches on frames.

Notation
    T, H, W, N  frames, height, width, points
    picture     a frame scaled by `zoom`, so that marks on a small video do not overlap
"""

import math
from collections.abc import Iterator

import cv2
import numpy as np

from common.geometry import inside, regular_grid
from drawing.legend import point_legend, with_strip

PICTURE_SIDE = 480   # pixels: smallest shorter side of a picture
LONGEST_SIDE = 1920  # pixels: largest longer side of a picture, takes precedence
SHIFT = 4            # fractional bits of cv2's sub-pixel coordinates
DARK = (20, 20, 20)  # RGB of outlines
DENSE = 0.65         # opacity of the squares of dense grids


def picture_zoom(size: tuple[int, int]) -> float:
    """Scale from frames of `size` (H, W) to pictures: a whole number for small frames, below 1 for large ones."""
    if max(size) > LONGEST_SIDE:
        return LONGEST_SIDE / max(size)
    if min(size) >= PICTURE_SIDE:
        return 1
    return min(math.ceil(PICTURE_SIDE / min(size)), LONGEST_SIDE // max(size))


def enlarge(frame: np.ndarray, zoom: float) -> np.ndarray:
    """A frame `(H, W, 3)` uint8 as `(zoom H, zoom W, 3)`."""
    if zoom == 1:
        return frame.copy()
    return cv2.resize(frame, (round(frame.shape[1] * zoom), round(frame.shape[0] * zoom)),
                      interpolation=cv2.INTER_CUBIC if zoom > 1 else cv2.INTER_AREA)


def on_picture(points: np.ndarray, zoom: float) -> np.ndarray:
    """Convert points `(..., 2)` from pixels of the frame to pixels of its picture."""
    return (points + 0.5) * zoom - 0.5


def draw_points(picture: np.ndarray, points: np.ndarray, visible: np.ndarray, colors: np.ndarray, zoom: float,
                spacing: float = np.inf) -> None:
    """Draw points `(N, 2)`, in pixels of the frame, on its picture: discs if visible `(N,)`, rings if occluded.

    Points outside the frame are not drawn. Discs cover rings. If the points are a grid too dense for discs (`spacing`
    pixels of the frame apart), visible points are translucent squares and occluded points are not drawn."""
    drawn = inside(points, (picture.shape[0] / zoom, picture.shape[1] / zoom))
    radius = min(max(3.5, min(picture.shape[:2]) / 130), max(2.5, 0.16 * spacing * zoom))
    centers = on_picture(points, zoom)
    if too_dense(spacing, zoom):
        _draw_squares(picture, centers[drawn & visible], colors[drawn & visible], max(1, round(spacing * zoom)))
        return
    hidden = drawn & ~visible
    shown = drawn & visible
    _draw_circles(picture, centers[hidden], (radius + 1, radius + 1), colors[hidden], (3, 1))
    _draw_circles(picture, centers[shown], (radius + 1, radius), colors[shown], (cv2.FILLED, cv2.FILLED))


def too_dense(spacing: float, zoom: float) -> bool:
    """Whether points `spacing` pixels of the frame apart are less than 8 pixels apart on the picture."""
    return spacing * zoom < 8


def track_pictures(frames: np.ndarray, tracks: np.ndarray, visible: np.ndarray, colors: np.ndarray,
                   query_frame: int | None, spacing: float = np.inf) -> Iterator[np.ndarray]:
    """Pictures of all frames `(T, H, W, 3)` with tracks `(N, T, 2)`, visible `(N, T)`. Colors are constant `(N, 3)`, or
    one a frame `(N, T, 3)` for occlusion scores. Query points are `spacing` pixels of the frame apart."""
    zoom = picture_zoom(frames.shape[1:3])
    scored = colors.ndim == 3
    legend = point_legend(too_dense(spacing, zoom), scored)
    for t, frame in enumerate(frames):
        picture = enlarge(frame, zoom)
        draw_points(picture, tracks[:, t], visible[:, t], colors[:, t] if scored else colors, zoom, spacing)
        yield with_strip(picture, frame_caption(t, len(frames), query_frame), legend)


def match_picture(frames: tuple[np.ndarray, np.ndarray], points: np.ndarray, matches: np.ndarray, visible: np.ndarray,
                  colors: np.ndarray, caption: str = "", lines: int = 0, spacing: float = np.inf) -> np.ndarray:
    """Two frames side by side with points `(N, 2)` of the first and their matches `(N, 2)`, visible `(N,)`, in the
    second. Lines join `lines` of the visible matches."""
    zoom = picture_zoom(frames[0].shape[:2])
    pictures = [enlarge(frame, zoom) for frame in frames]
    draw_points(pictures[0], points, np.ones(len(points), bool), colors, zoom, spacing)
    draw_points(pictures[1], matches, visible, colors, zoom, spacing)
    out = np.concatenate(pictures, axis=1)
    right = np.array([pictures[0].shape[1], 0])
    ends = np.stack([on_picture(points, zoom), on_picture(matches, zoom) + right], 1)  # (N, 2, 2)
    shown = np.flatnonzero(visible)
    joined = shown[np.linspace(0, len(shown) - 1, min(lines, len(shown))).astype(int)]
    draw_paths(out, ends[joined], colors[joined])
    return with_strip(out, caption, point_legend(too_dense(spacing, zoom))) if caption else out


def draw_paths(picture: np.ndarray, paths: np.ndarray, colors: np.ndarray, thickness: int = 1) -> None:
    """Draw polylines `(N, L, 2)`, in pixels of the picture, in colors `(N, 3)`."""
    places = np.rint(paths.clip(-9_999, 9_999) * (1 << SHIFT)).astype(np.int32)
    for path, color in zip(places, colors.tolist(), strict=True):
        cv2.polylines(picture, [path], False, color, thickness, cv2.LINE_AA, SHIFT)


def frame_caption(t: int, T: int, query_frame: int | None = None) -> str:
    """Caption such as `frame 3 / 81`, marked if it is the query frame."""
    return f"frame {t} / {T - 1}" + ("   query frame" if t == query_frame else "")


def grid_spacing(size: tuple[int, int]) -> int:
    """Pixels between the points of a grid with about 28 along the longer side of frames of `size`."""
    return max(1, round(max(size) / 28))


def point_grid(size: tuple[int, int], interval: int = 0) -> np.ndarray:
    """Points `(N, 2)` float32 of a regular grid on a frame of `size` (H, W), row by row.

    They are `interval` pixels apart, or `grid_spacing(size)` if it is 0."""
    interval = interval or grid_spacing(size)
    return regular_grid(size, interval, interval // 2).reshape(-1, 2)


def grid_shape(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of `point_grid(size)`."""
    interval = grid_spacing(size)
    return regular_grid(size, interval, interval // 2).shape[:2]


def _draw_squares(picture: np.ndarray, centers: np.ndarray, colors: np.ndarray, side: int) -> None:
    H, W = picture.shape[:2]
    frame = picture.copy()
    column, row = np.rint(centers - (side - 1) / 2).astype(int).T
    for dy in range(side):
        for dx in range(side):
            place = (row + dy).clip(0, H - 1), (column + dx).clip(0, W - 1)
            picture[place] = np.rint((1 - DENSE) * frame[place] + DENSE * colors)


def _draw_circles(picture: np.ndarray, centers: np.ndarray, radii: tuple[float, float], colors: np.ndarray,
                  thickness: tuple[int, int]) -> None:
    """Draw a dark circle around each center `(N, 2)`, in pixels of the picture, and over it one in its color `(N, 3)`;
    `radii` and `thickness` are those of the two."""
    scale = 1 << SHIFT
    outer, inner = (round(radius * scale) for radius in radii)
    for place, color in zip(np.rint(centers * scale).astype(int).tolist(), colors.tolist(), strict=True):
        cv2.circle(picture, place, outer, DARK, thickness[0], cv2.LINE_AA, SHIFT)
        cv2.circle(picture, place, inner, color, thickness[1], cv2.LINE_AA, SHIFT)
