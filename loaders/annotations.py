"""Ground-truth tracks, query points and predicted tracks as files (DESIGN.md section 3).

Notation
    N, T, M  ground-truth tracks, frames, query points
    point    (x, y): pixels of the frame, x right, y down, centres at integers
    query    (t, y, x): frame number and point, in TAP-Vid's order
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import UserError
from loaders.files import atomic_path

QUERY_STRIDE = 5


@dataclass(frozen=True)
class Annotations:
    """Ground truth of N points. A point outside the frame is occluded; where it is then is not known to all data sets."""
    points: np.ndarray                       # (N, T, 2) float32 pixels
    occluded: np.ndarray                     # (N, T) bool
    frame_size: tuple[int, int]              # (H, W)
    query_points: np.ndarray | None = None   # (N, 3) float32, one a row
    evaluated: np.ndarray | None = None      # (N, T) bool: entries outside it do not count


def save_annotations(path: str | Path, annotations: Annotations) -> None:
    """Write annotations.npz; keys that are None are left out."""
    entries = {name: value for name, value in vars(annotations).items() if value is not None}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **entries)
