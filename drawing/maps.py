"""Pictures of dense results: depth, flow, rendered color, flow error.

Notation
    T, H, W  frames, height, width
    map      values on a coarse grid of the frame `(h, w, ...)`, enlarged to the picture
"""

from collections.abc import Iterable, Iterator

import cv2
import numpy as np

from drawing.colors import depth_colors, error_colors, flow_colors, full_saturation
from drawing.legend import depth_legend, error_legend, flow_legend, text_picture, with_strip
from drawing.tracks import DARK, LONGEST_SIDE, enlarge, frame_caption, picture_zoom

ARROWS = 24  # arrows along the longer side of a flow picture


def depth_pictures(depths: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Pictures of depths `(T, h, w)` of frames of `size` (H, W), all with the same color scale."""
    near, far = depth_range(depths)
    legend = depth_legend(near, far)
    for t, depth in enumerate(depths):
        picture = depth_colors(fit(depth, picture_size(size)), near, far)
        yield with_strip(picture, frame_caption(t, len(depths)), legend)


def depth_range(depths: np.ndarray) -> tuple[float, float]:
    """Range of the color scale: the 1st and the 99th percentile of depth."""
    near, far = np.percentile(depths.astype(np.float32), (1, 99))
    return float(near), float(far)


def flow_pictures(flows: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Pictures of flows `(T - 1, h, w, 2)` in pixels from each frame of `size` (H, W) to the next, with arrows."""
    longest = full_saturation(flows)
    legend = flow_legend(longest)
    for t, flow in enumerate(flows):
        picture = flow_colors(fit(flow, picture_size(size)), longest)
        _draw_arrows(picture, flow, longest)
        yield with_strip(picture, f"flow from frame {t} to {t + 1}", legend)


def color_pictures(frames: np.ndarray, rendered: np.ndarray) -> Iterator[np.ndarray]:
    """Frames `(T, H, W, 3)` uint8 beside their renderings `(T, h, w, 3)` in [0, 1]."""
    shape = picture_size(frames.shape[1:3])
    for t, (frame, colors) in enumerate(zip(frames, rendered, strict=True)):
        shown = np.rint(colors.clip(0, 1) * 255).astype(np.uint8)
        small = cv2.resize(frame, shown.shape[1::-1], interpolation=cv2.INTER_AREA)
        error = ((shown.astype(np.float32) - small) ** 2).mean() / 255**2
        psnr = 10 * np.log10(1 / max(error, 1e-10))
        picture = beside([fit(frame, shape), fit(shown, shape)])
        yield with_strip(picture, frame_caption(t, len(frames)), text_picture(f"frame | rendered, PSNR {psnr:.1f} dB"))


def error_pictures(frames: np.ndarray, errors: np.ndarray) -> Iterator[np.ndarray]:
    """Frames `(T, H, W, 3)` uint8 beside their accumulated flow errors `(T, h, w)` in pixels."""
    shape = picture_size(frames.shape[1:3])
    largest = error_scale(errors)
    legend = error_legend(largest)
    for t, (frame, error) in enumerate(zip(frames, errors, strict=True)):
        shown = fit(error_colors(error, largest), shape, cv2.INTER_NEAREST)
        yield with_strip(beside([fit(frame, shape), shown]), frame_caption(t, len(frames)), legend)


def error_scale(errors: np.ndarray) -> float:
    """Upper end of the color scale: the 99th percentile of the errors, in pixels."""
    return max(float(np.percentile(errors, 99)), 1e-3)


def picture_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the picture of a frame of `size` (H, W), in picture pixels."""
    zoom = picture_zoom(size)
    return round(size[0] * zoom), round(size[1] * zoom)


def fit(values: np.ndarray, shape: tuple[int, int], interpolation: int = cv2.INTER_LINEAR) -> np.ndarray:
    """A map or frame `(h, w, ...)` resized to `shape`."""
    if values.shape[0] > shape[0]:
        interpolation = cv2.INTER_AREA
    values = values if values.dtype == np.uint8 else values.astype(np.float32)
    return cv2.resize(values, shape[::-1], interpolation=interpolation)


def beside(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """Pictures of equal size side by side, shrunk to at most LONGEST_SIDE pixels of width."""
    out = np.concatenate(list(pictures), axis=1)
    return enlarge(out, min(1, LONGEST_SIDE / out.shape[1]))


def _draw_arrows(picture: np.ndarray, flow: np.ndarray, longest: float) -> None:
    """Draw arrows on the picture. Flow `(h, w, 2)` of `longest` pixels is drawn as 0.8 times the arrows' spacing."""
    spacing = max(picture.shape[:2]) / ARROWS  # pixels of the picture
    for y in np.arange(spacing / 2, picture.shape[0], spacing):
        for x in np.arange(spacing / 2, picture.shape[1], spacing):
            row = int(y / picture.shape[0] * flow.shape[0])
            column = int(x / picture.shape[1] * flow.shape[1])
            arrow = flow[row, column] * 0.8 * spacing / longest
            arrow = arrow * min(1, 1.5 * spacing / max(float(np.hypot(*arrow)), 1e-6))
            if np.hypot(*arrow) > 2:
                start, end = (tuple(int(v * 16) for v in place) for place in ((x, y), (x + arrow[0], y + arrow[1])))
                cv2.arrowedLine(picture, start, end, DARK, 1, cv2.LINE_AA, 4, 0.3)
