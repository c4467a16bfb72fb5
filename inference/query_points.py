"""Query points given in pixels and frame numbers of a clip, and grids of them, for the sequence's frames.

Notation
    query    (t, y, x)
    source   the clip; its frames may be larger than the sequence's
"""

from collections.abc import Sequence

import numpy as np

from common.errors import UserError
from common.geometry import regular_grid
from loaders.source_frames import SourceFrames, resize_queries
from loaders.track_files import checked_queries


def queries_in_frames(queries: np.ndarray, source: SourceFrames, where: str) -> np.ndarray:
    """Query points `(N, 3)` in pixels and frame numbers of the source, in those of the sequence's frames, float32.

    UserError, which begins with `where`, if one is no frame number and pixel of the source."""
    checked = checked_queries(queries, where, int(source.numbers[-1]) + 1, source.source_size)
    frames = source.indices(checked[:, 0])
    if frames is None:  # lost in a damaged video
        raise UserError(f"{where}: query points must be in the frames {source.numbers_text()}")
    out = resize_queries(checked, source.source_size, source.size)
    out[:, 0] = frames
    return out


def points_in_frames(points: Sequence[tuple[int, float, float]], source: SourceFrames) -> np.ndarray:
    """As `queries_in_frames`, for points (t, x, y) of the option --query."""
    t, x, y = np.array(points, np.float64).T
    return queries_in_frames(np.stack([t, y, x], 1), source, "--query")


def grid_in_frames(spacing: int, source: SourceFrames) -> np.ndarray:
    """Query points of the first frame, `spacing` pixels of the source apart."""
    points = regular_grid(source.source_size, spacing, spacing // 2).reshape(-1, 2)
    return queries_in_frames(_of_frame(source.numbers[0], points), source, "--grid")


def every_pixel(number: int, source: SourceFrames, spacing: int = 1) -> np.ndarray:
    """Every `spacing`-th pixel of the sequence's frame whose number in the source is `number`.

    UserError if there is no such frame."""
    frames = source.indices(np.array([number]))
    if frames is None:
        raise UserError(f"--every_pixel {number}: there are the frames {source.numbers_text()}")
    return _of_frame(frames[0], regular_grid(source.size, spacing, spacing // 2).reshape(-1, 2))


def _of_frame(t: int, points: np.ndarray) -> np.ndarray:
    """Query points `(N, 3)` float32 of points (x, y) `(N, 2)` of frame t."""
    return np.column_stack([np.full(len(points), t), points[:, ::-1]]).astype(np.float32)
