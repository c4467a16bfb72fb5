"""Pictures of a colored point cloud that swings from side to side, in orthographic projection.

Notation
    N        points
    point    (x, y, z): x right, y down, z away from the viewer
"""

from collections.abc import Iterator

import numpy as np

from drawing.legend import STRIP

SWING = np.radians(40)  # radians: largest rotation to either side
TILT = np.radians(15)   # radians: the view is from slightly above


def cloud_pictures(points: np.ndarray, colors: np.ndarray, size: tuple[int, int], count: int,
                   dot: int = 2) -> Iterator[np.ndarray]:
    """`count` pictures `(H, W, 3)` of `size` (H, W), of one full swing of points `(N, 3)` with colors `(N, 3)`
    uint8. A point is a square of `dot` pixels; nearer points cover farther ones."""
    center = np.median(points, axis=0)
    centered = points - center
    x, y, z = np.percentile(abs(centered), 99, axis=0).clip(1e-6)  # half of the cloud's extent
    half_width = x + z * np.sin(SWING)
    half_height = y + (z + x * np.sin(SWING)) * np.sin(TILT)
    scale = 0.48 * min(size[1] / half_width, size[0] / half_height)
    for turn in SWING * np.sin(np.linspace(0, 2 * np.pi, count, endpoint=False)):
        x, y, z = (centered @ _view(turn).T).T
        yield _splat(x * scale + size[1] / 2, y * scale + size[0] / 2, z, colors, size, dot)


def _view(turn: float) -> np.ndarray:
    """Rotation `(3, 3)` by `turn` radians about the vertical axis, then by TILT about the horizontal axis."""
    about_y = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(TILT), np.sin(TILT)], [0, -np.sin(TILT), np.cos(TILT)]])
    return about_x @ about_y


def _splat(x: np.ndarray, y: np.ndarray, z: np.ndarray, colors: np.ndarray, size: tuple[int, int],
           dot: int) -> np.ndarray:
    out = np.full((*size, 3), STRIP, np.uint8)
    order = np.argsort(-z)  # far points first: numpy keeps the last value written to a pixel
    column, row = (np.floor(a[order]).astype(int) for a in (x, y))
    for dy in range(dot):
        for dx in range(dot):
            inside = (row + dy >= 0) & (row + dy < size[0]) & (column + dx >= 0) & (column + dx < size[1])
            out[row[inside] + dy, column[inside] + dx] = colors[order[inside]]
    return out
