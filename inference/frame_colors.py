"""Colors of the frames of a video, compared between points of two frames.

Notation
    a, b     frames
    p, q     points of frame a and of frame b, pixels                               (n, 2)
"""

from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np

SIDE = 256              # pixels of the shorter side at which colors are kept; larger frames are resized
BLUR = 1.5              # pixels of the resized frame: standard deviation of the blur
KEPT_FRAMES = 512       # whose colors are kept in memory, up to 0.4 MB each in 16:9
LAB_STEPS = np.array([100 / 255, 1, 1], np.float32)  # CIELAB units of one step of OpenCV's 8-bit L, a and b
REMAP_WIDTH = 1_024     # points in a row of cv2.remap, which takes less than 32,768 rows and columns


class FrameColors:
    """CIELAB colors of frames. They are blurred, to ignore noise and texture that is smaller than the error of flow.

    frame: t -> image `(H, W, 3)` uint8 RGB. Colors are computed when they are first needed."""

    def __init__(self, frame: Callable[[int], np.ndarray]):
        self._frame = frame
        self._colors = lru_cache(KEPT_FRAMES)(self._blurred)

    def difference(self, a: int, p: np.ndarray, b: int, q: np.ndarray) -> np.ndarray:
        """Distance `(n,)` of the colors of points p `(n, 2)` of frame a and q `(n, 2)` of frame b, in CIELAB units."""
        return _distance(self.at(a, p), self.at(b, q))

    def _blurred(self, t: int) -> tuple[np.ndarray, float]:
        """Colors `(h, w, 3)` uint8 of frame t, and h / H."""
        image = self._frame(t)
        zoom = min(SIDE / min(image.shape[:2]), 1.0)
        size = [max(round(side * zoom), 1) for side in image.shape[1::-1]]
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(cv2.GaussianBlur(small, (0, 0), BLUR), cv2.COLOR_RGB2LAB), zoom

    def at(self, t: int, points: np.ndarray) -> np.ndarray:
        """Colors `(n, 3)` float32, in steps of OpenCV's 8-bit CIELAB, at points `(n, 2)` of frame t; outside the frame,
        of the nearest point of the border."""
        if not len(points):
            return np.empty((0, 3), np.float32)
        colors, zoom = self._colors(t)
        rows = -(-len(points) // REMAP_WIDTH)
        places = np.zeros((rows * REMAP_WIDTH, 2), np.float32)
        places[:len(points)] = (points + 0.5) * zoom - 0.5
        out = cv2.remap(colors, places.reshape(rows, REMAP_WIDTH, 2), None, cv2.INTER_LINEAR,
                        borderMode=cv2.BORDER_REPLICATE)
        return out.reshape(-1, 3)[:len(points)].astype(np.float32)


def _distance(colors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distances `(n,)` in CIELAB units of colors `(n, 3)` in steps of OpenCV's 8-bit CIELAB."""
    return np.sqrt((((colors - others) * LAB_STEPS) ** 2).sum(axis=-1))
