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
    reach = np.percentile(abs(centered), 99, axis=0).clip(1e-6)
    wide = np.hypot(reach[0], reach[2] * np.sin(SWING))
    high = np.hypot(reach[1], reach[2] * np.sin(TILT))
    scale = 0.48 * min(size[1] / wide, size[0] / high) * 0.95
    for turn in SWING * np.sin(np.linspace(0, 2 * np.pi, count, endpoint=False)):
        x, y, z = (centered @ _view(turn).T).T
        yield _splat(x * scale + size[1] / 2, y * scale + size[0] / 2, z, colors, size, dot)


def _view(turn: float) -> np.ndarray:
    """Rotation `(3, 3)` by `turn` radians about the vertical axis, then by TILT about the horizontal axis."""
    c, s = np.cos(turn), np.sin(turn)
    ct, st = np.cos(TILT), np.sin(TILT)
    return np.array([[1, 0, 0], [0, ct, st], [0, -st, ct]]) @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


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
