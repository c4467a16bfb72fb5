"""Colors of the frames of a video, compared between points of two frames.

Notation
    a, b     frames
    p, q     points of frame a and of frame b, pixels                               (n, 2)
"""

from collections.abc import Callable
from functools import cache

import cv2
import numpy as np

COLOR_BLUR = 1.5 / 256  # share of the frame's shorter side: standard deviation of the blur
LAB_STEPS = np.array([100 / 255, 1, 1], np.float32)  # CIELAB units of one step of OpenCV's 8-bit L, a and b
REMAP_WIDTH = 1_024     # points in a row of cv2.remap, which takes less than 32,768 rows and columns


class FrameColors:
    """CIELAB colors of frames. They are blurred, to ignore noise and texture that is smaller than the error of flow.

    frame: t -> image `(H, W, 3)` uint8 RGB. Colors are computed when they are first needed, and kept in 8 bits."""

    def __init__(self, frame: Callable[[int], np.ndarray]):
        self._frame = frame
        self._colors = cache(self._blurred)

    def difference(self, a: int, p: np.ndarray, b: int, q: np.ndarray) -> np.ndarray:
        """Distance `(n,)` of the colors of points p `(n, 2)` of frame a and q `(n, 2)` of frame b, in CIELAB units."""
        difference = (_look_up(self._colors(a), p) - _look_up(self._colors(b), q)) * LAB_STEPS
        return np.sqrt((difference ** 2).sum(axis=-1))

    def _blurred(self, t: int) -> np.ndarray:
        image = self._frame(t)
        blurred = cv2.GaussianBlur(image, (0, 0), COLOR_BLUR * min(image.shape[:2]))
        return cv2.cvtColor(blurred, cv2.COLOR_RGB2LAB)


def _look_up(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Bilinear samples `(n, 3)` float32 of an image `(H, W, 3)` uint8 at points `(n, 2)`, rounded to integers; outside
    the frame, of the nearest point of the border."""
    if not len(points):
        return np.empty((0, 3), np.float32)
    rows = -(-len(points) // REMAP_WIDTH)
    places = np.zeros((rows * REMAP_WIDTH, 2), np.float32)
    places[:len(points)] = points
    out = cv2.remap(image, places.reshape(rows, REMAP_WIDTH, 2), None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return out.reshape(-1, 3)[:len(points)].astype(np.float32)
