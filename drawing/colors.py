"""Color maps for positions, flow, depth, errors and scores, uint8 RGB.

They can be told apart with every kind of color vision, except the standard flow wheel, whose pictures also have arrows.

Notation
    H, W, N  height, width, points
"""

import cv2
import numpy as np

# Colors at a 3x3 grid over the frame, after the color-blind safe palette of Okabe and Ito: blue at the left, green in
# the middle, yellow to red at the right; the upper row is lighter than the lower one.
POSITIONS = np.array([[[86, 180, 233], [130, 215, 190], [245, 233, 90]],
                      [[40, 140, 230], [30, 190, 120], [240, 165, 30]],
                      [[0, 84, 190], [150, 80, 175], [213, 84, 0]]], np.float32)
SCORES = np.array([[0, 114, 230], [245, 245, 245], [230, 92, 0]], np.float32)
# Middlebury's wheel (Baker et al., "A database and evaluation methodology for optical flow", 2011): six hues and the
# number of steps from each to the next, chosen for even perceptual spacing. Angle 0 points right and grows downward.
WHEEL = ((255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255))
WHEEL_STEPS = (15, 6, 4, 11, 13, 6)


def position_colors(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Colors `(N, 3)` that vary smoothly with the position of points `(N, 2)` in a frame of `size` (H, W)."""
    place = ((points + 0.5) / np.array(size[::-1])).clip(0, 1) * 2
    column, row = (place.astype(int).clip(max=1)).T
    x, y = (place - np.stack([column, row], -1)).T[..., None]
    upper, lower = ((1 - x) * POSITIONS[r, column] + x * POSITIONS[r, column + 1] for r in (row, row + 1))
    return np.rint((1 - y) * upper + y * lower).astype(np.uint8)


def flow_colors(flow: np.ndarray, longest: float | None = None) -> np.ndarray:
    """Flow `(H, W, 2)` in pixels as `(H, W, 3)`: hue shows direction, saturation length; white is no motion.

    Flow of `longest` pixels (default: `full_saturation`) has full saturation; longer flow is darker."""
    length = np.hypot(flow[..., 0], flow[..., 1])
    length = length / (longest or full_saturation(flow))
    wheel = _wheel()
    turn = np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi) % 1 * len(wheel)
    low = turn.astype(int) % len(wheel)
    share = (turn - np.floor(turn))[..., None]
    hue = (1 - share) * wheel[low] + share * wheel[(low + 1) % len(wheel)]
    inside = 1 - length[..., None] * (1 - hue)
    return np.rint(np.where(length[..., None] <= 1, inside, 0.75 * hue) * 255).astype(np.uint8)


def full_saturation(flow: np.ndarray) -> float:
    """The 98th percentile of the length of flow `(..., 2)`, at least 0.1 pixel so that noise stays near white."""
    return max(float(np.percentile(np.hypot(flow[..., 0], flow[..., 1]), 98)), 0.1)


def depth_colors(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Depths `(H, W)` as `(H, W, 3)`: yellow is `near`, dark blue is `far`."""
    return _mapped(1 - _share(depth, near, far), cv2.COLORMAP_VIRIDIS)


def error_colors(error: np.ndarray, largest: float | None = None) -> np.ndarray:
    """Errors `(H, W)` as `(H, W, 3)`: dark is 0, the lightest color is `largest` (default: the maximum)."""
    return _mapped(_share(error, 0, largest or float(error.max())), cv2.COLORMAP_INFERNO)


def score_colors(scores: np.ndarray) -> np.ndarray:
    """Scores in [0, 1] of any shape as `(..., 3)`: blue is 0, white 0.5, orange 1."""
    place = scores.clip(0, 1)[..., None] * 2
    lower = (1 - place) * SCORES[0] + place * SCORES[1]
    upper = (2 - place) * SCORES[1] + (place - 1) * SCORES[2]
    return np.rint(np.where(place < 1, lower, upper)).astype(np.uint8)


def _share(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return ((values.astype(np.float32) - low) / max(high - low, 1e-6)).clip(0, 1)


def _mapped(values: np.ndarray, color_map: int) -> np.ndarray:
    return cv2.cvtColor(cv2.applyColorMap(np.rint(values * 255).astype(np.uint8), color_map), cv2.COLOR_BGR2RGB)


def _wheel() -> np.ndarray:
    """The wheel's colors `(55, 3)` in [0, 1]."""
    parts = []
    for k, steps in enumerate(WHEEL_STEPS):
        start, end = (np.array(WHEEL[i % 6], np.float32) / 255 for i in (k, k + 1))
        share = np.arange(steps)[:, None] / steps
        parts.append((1 - share) * start + share * end)
    return np.concatenate(parts)
