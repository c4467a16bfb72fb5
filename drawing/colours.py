"""Colours for positions, flow, depth and errors. Results are uint8 RGB.

Notation
    H, W, N  height, width, points
"""

import cv2
import numpy as np

DEGREES = 180 / np.pi


def position_colours(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A colour for each point `(N, 2)` of a frame of `size` (H, W), `(N, 3)`: the hue turns around the centre of the
    frame, the colours are paler near it, so that neighbours are alike and distant points are not."""
    x, y = ((points + 0.5) / np.array(size[::-1]) * 2 - 1).T
    radius = np.hypot(x, y).clip(0, 1)
    return _from_hsv(np.arctan2(y, x) * DEGREES, 0.35 + 0.65 * radius, np.ones_like(x))


def flow_colours(flow: np.ndarray, longest: float | None = None) -> np.ndarray:
    """Flow `(H, W, 2)` pixels as `(H, W, 3)`: hue is direction, saturation length, white no motion. `longest`, the
    length of full saturation, is by default that of 98% of the flow."""
    length = np.hypot(flow[..., 0], flow[..., 1])
    longest = longest or max(float(np.percentile(length, 98)), 1e-6)
    saturation = (length / longest).clip(0, 1)
    return _from_hsv(np.arctan2(flow[..., 1], flow[..., 0]) * DEGREES, saturation, np.ones_like(saturation))


def depth_colours(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Depths `(H, W)` as `(H, W, 3)`: red is `near`, blue is `far`."""
    closeness = 1 - ((depth.astype(np.float32) - near) / max(far - near, 1e-6)).clip(0, 1)
    return _mapped(closeness, cv2.COLORMAP_TURBO)


def error_colours(error: np.ndarray, largest: float | None = None) -> np.ndarray:
    """Errors `(H, W)` as `(H, W, 3)`, dark is 0; `largest` is by default the largest of them."""
    return _mapped((error / max(largest or float(error.max()), 1e-6)).clip(0, 1), cv2.COLORMAP_INFERNO)


def _mapped(values: np.ndarray, colour_map: int) -> np.ndarray:
    return cv2.cvtColor(cv2.applyColorMap(np.rint(values * 255).astype(np.uint8), colour_map), cv2.COLOR_BGR2RGB)


def _from_hsv(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Degrees of any turn, and two numbers in [0, 1], any shape -> uint8 `(..., 3)`."""
    hsv = np.stack([hue % 360, saturation, value], axis=-1).astype(np.float32)
    rgb = cv2.cvtColor(hsv.reshape(-1, 1, 3), cv2.COLOR_HSV2RGB).reshape(hsv.shape)
    return np.rint(rgb * 255).astype(np.uint8)
