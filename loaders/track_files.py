"""Ground-truth tracks, query points and predicted tracks as files (docs/method.md). loaders/predicted_tracks.py reads
tracks of any tracker.

Notation
    N, T, M  ground-truth tracks, frames, query points
    point    (x, y) in pixels of the frame: x right, y down, pixel centers at integers
    query    (t, y, x): frame number and position, in the order that TAP-Vid uses
    size     (H, W) of the frames, pixels
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import atomic_path
from common.geometry import inside
from loaders.npy import ArrayFile
from loaders.source_frames import MAX_NUMBER, SourceFrames, resize_points, resize_queries

QUERY_STRIDE = 5  # frames; distance of query frames in TAP-Vid's strided mode
MAX_CSV = 64 << 20  # bytes; larger .csv files are rejected
DTYPES = {"b": "bool", "iu": "whole numbers", "f": "floating point", "iuf": "numbers"}


@dataclass(frozen=True)
class Annotations:
    """Ground truth of N points. Entries of `points` are undefined where a point is occluded or not evaluated."""
    points: np.ndarray                      # (N, T, 2) float32 pixels
    occluded: np.ndarray                    # (N, T) bool; a point outside the frame is occluded
    frame_size: tuple[int, int]             # (H, W)
    query_points: np.ndarray | None = None  # (N, 3) float32, one per track; None: see sample_queries
    evaluated: np.ndarray | None = None     # (N, T) bool: entries used in evaluation; None: all

    def resized(self, size: tuple[int, int]) -> "Annotations":
        """These annotations for the video resized to `size` (H, W)."""
        queries = None if self.query_points is None else resize_queries(self.query_points, self.frame_size, size)
        points = resize_points(self.points, self.frame_size, size)
        return replace(self, points=points, query_points=queries, frame_size=tuple(size))

    def at_frames(self, frames: np.ndarray) -> "Annotations":
        """These annotations in some of their frames, `(T',)`, ascending; queries must lie in these."""
        queries = self.query_points
        if queries is not None:
            queries = queries.copy()
            queries[:, 0] = np.searchsorted(frames, queries[:, 0])
        evaluated = None if self.evaluated is None else self.evaluated[:, frames]
        return replace(self, points=self.points[:, frames], occluded=self.occluded[:, frames], evaluated=evaluated,
                       query_points=queries)


@dataclass(frozen=True)
class PointTracks:
    """Tracks of M query points, predicted by any tracker. Depth and score are None if the tracker has none."""
    tracks: np.ndarray                         # (M, T, 2) float32 pixels
    visible: np.ndarray                        # (M, T) bool
    query_points: np.ndarray                   # (M, 3) float32
    frame_size: tuple[int, int]                # (H, W)
    occlusion_score: np.ndarray | None = None  # (M, T) float32
    depth: np.ndarray | None = None            # (M, T) float32
    source: SourceFrames | None = None         # where the frames come from; None: not known

    def resized(self, size: tuple[int, int]) -> "PointTracks":
        """These tracks for the video resized to `size` (H, W)."""
        source = None if self.source is None else replace(self.source, size=tuple(size))
        return replace(self, tracks=resize_points(self.tracks, self.frame_size, size), frame_size=tuple(size),
                       query_points=resize_queries(self.query_points, self.frame_size, size), source=source)


def save_annotations(path: str | Path, annotations: Annotations) -> None:
    """Write annotations.npz; fields that are None are left out."""
    _save(path, vars(annotations))


def load_annotations(path: str | Path, num_frames: int | None = None) -> Annotations:
    """Read annotations.npz. Positions that are not finite are replaced by 0.

    UserError if the file is missing or damaged, a key is missing or has the wrong type or shape, a visible point is not
    finite, a query is outside the clip, or the number of frames is not `num_frames`."""
    entries = Entries(path)
    points = entries.numbers("points", (None, None, 2))
    N, T = points.shape[:2]
    occluded = entries.array("occluded", "b", (N, T))
    size = entries.size()
    evaluated = entries.array("evaluated", "b", (N, T), optional=True)
    queries = entries.array("query_points", "iuf", (N, 3), optional=True)
    if num_frames is not None and num_frames != T:
        raise UserError(f"{path}: `points` has {T} frames, the sequence {num_frames}: annotations must cover the same "
                        "frames")
    counted = ~occluded if evaluated is None else ~occluded & evaluated
    wrong = counted & ~np.isfinite(points).all(axis=-1)
    if wrong.any():
        n, t = np.argwhere(wrong)[0]
        raise UserError(f"{path}: `points` has no finite position for point {n} in frame {t}, where it is visible: "
                        "mark it occluded or give its position")
    if queries is not None:
        queries = checked_queries(queries, path, T, size)
    points = np.nan_to_num(points, nan=0.0, posinf=0.0, neginf=0.0)
    return Annotations(points, occluded, size, queries, evaluated)


def sample_queries(annotations: Annotations, query_mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Query points `(M, 3)` float32 and, for each, the row of its ground-truth track `(M,)`.

    If the annotations have query points, these are returned unchanged. Otherwise they are chosen as in TAP-Vid (Doersch
    et al., NeurIPS 2022, section 3). 'first': each track in the first frame where it is visible. 'strided': in every
    fifth frame, all tracks that are visible there. Entries that are not evaluated are never query points.
    UserError for an unknown mode, or if no track is visible in a query frame."""
    if query_mode not in ("first", "strided"):
        raise UserError(f"no query mode '{query_mode}': choose first or strided")
    if annotations.query_points is not None:
        return annotations.query_points, np.arange(len(annotations.query_points))
    seen = ~annotations.occluded if annotations.evaluated is None else ~annotations.occluded & annotations.evaluated
    if query_mode == "first":
        rows = np.flatnonzero(seen.any(axis=1))
        frames = seen[rows].argmax(axis=1)
    else:
        frames, rows = np.nonzero(seen[:, ::QUERY_STRIDE].T)  # by frame, then by track
        frames = frames * QUERY_STRIDE
    if len(rows) == 0:
        raise UserError(f"the annotations have no visible point to query in the mode '{query_mode}'")
    points = annotations.points[rows, frames]  # (M, 2)
    return np.stack([frames, points[:, 1], points[:, 0]], -1).astype(np.float32), rows


def load_queries(path: str | Path, num_frames: int | None = None, size: tuple[int, int] | None = None) -> np.ndarray:
    """Query points `(M, 3)` float32 from an .npz with the key `query_points` or a .csv with the header t,y,x.

    UserError if the file is missing, damaged or empty, or if a query is not finite, has a fractional frame number, or
    is outside the clip (checked if `num_frames` and `size` are given)."""
    return checked_queries(load_query_file(path)[0], path, num_frames, size)


def load_query_file(path: str | Path) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Query points as `load_queries` without a clip, and the size (H, W) of their frames, None if the file has none."""
    size = None
    if Path(path).suffix.lower() == ".csv":
        queries = _read_csv(Path(path))
    else:
        entries = Entries(path)
        queries = entries.array("query_points", "iuf", (None, 3))
        size = entries.size() if "frame_size" in entries.arrays else None
    if len(queries) == 0:
        raise UserError(f"{path} has no query points: give at least one (t, y, x)")
    return checked_queries(queries, path), size


def save_queries(path: str | Path, queries: np.ndarray, size: tuple[int, int]) -> None:
    """Write query points `(M, 3)` and the frame size (H, W) as .npz."""
    _save(path, {"query_points": queries, "frame_size": size})


def save_tracks(path: str | Path, tracks: PointTracks) -> None:
    """Write tracks.npz; fields that are None are left out. A known source is written as the keys `frame_numbers` (T,),
    `source_size` (H, W) and, if it is known, `frame_rate`."""
    entries = dict(vars(tracks))
    source = entries.pop("source")
    if source is not None:
        entries |= {"frame_numbers": source.numbers, "source_size": source.source_size,
                    "frame_rate": source.frame_rate}
    _save(path, entries)


class Entries:
    """Checked access to the arrays of an .npz file. Each problem raises a UserError that names the file and the key."""

    def __init__(self, path: str | Path, arrays: Mapping[str, np.ndarray] | ArrayFile | None = None):
        """arrays: the content of the file, if it is not an .npz."""
        self.path = path
        if arrays is None:
            arrays = ArrayFile(path, "an .npz of numbers is needed, as numpy.savez writes it")
        self.arrays = arrays

    def numbers(self, key: str, shape: tuple, optional: bool = False):
        """The floating-point array `key` as float32; values beyond the range of float32 become infinite."""
        found = self.array(key, "f", shape, optional)
        if found is None:
            return None
        with np.errstate(over="ignore"):
            return found.astype(np.float32)

    def array(self, key: str, kinds: str, shape: tuple, optional: bool = False):
        """The array `key`, whose dtype is one of `kinds` and whose shape is `shape` (None: any length)."""
        if key not in self.arrays:
            if optional:
                return None
            there = ", ".join(sorted(self.arrays.names)[:20]) or "nothing"
            raise UserError(f"{self.path} has no `{key}`: it has {there}")
        out = self.arrays[key]
        fits = out.ndim == len(shape) and all(want in (None, side) for want, side in zip(shape, out.shape, strict=True))
        if not fits:
            wanted = ", ".join("any" if side is None else str(side) for side in shape)
            raise UserError(f"{self.path}: `{key}` has the shape {out.shape}, it must be ({wanted})")
        if out.dtype.kind not in kinds:
            raise UserError(f"{self.path}: `{key}` is {out.dtype}, it must be {DTYPES[kinds]}")
        return out

    def size(self, key: str = "frame_size") -> tuple[int, int]:
        """The size (H, W) in the entry `key`."""
        H, W = (int(side) for side in self.array(key, "iu", (2,)))
        if min(H, W) < 1:
            raise UserError(f"{self.path}: `{key}` is ({H}, {W}), it must be (height, width) in pixels")
        return H, W

    def source(self, size: tuple[int, int], num_frames: int | None = None) -> SourceFrames | None:
        """The source of tracks in frames of `size`; None if the file does not have it."""
        numbers = self.array("frame_numbers", "iu", (num_frames,), optional=True)
        if numbers is None:
            return None
        if len(numbers) == 0 or numbers[0] < 0 or numbers[-1] > MAX_NUMBER or (numbers[1:] <= numbers[:-1]).any():
            raise UserError(f"{self.path}: `frame_numbers` must be ascending frame numbers, from 0 on")
        rate = self.array("frame_rate", "iuf", (), optional=True)
        if rate is not None and not (np.isfinite(rate) and rate > 0):
            raise UserError(f"{self.path}: `frame_rate` must be frames per second")
        return SourceFrames(size, self.size("source_size"), numbers.astype(np.int64),
                            None if rate is None else float(rate))


def checked_queries(queries: np.ndarray, path: str | Path, num_frames: int | None = None,
                    size: tuple[int, int] | None = None) -> np.ndarray:
    """Query points as float32. UserError unless each has a whole frame number and lies inside the clip."""
    t, y, x = queries.T
    good = np.isfinite(queries).all(axis=1)
    good &= (t == np.round(t)) & (t >= 0) & (t < (num_frames or np.inf))
    if size is not None:
        good &= inside(queries[:, :0:-1], size)
    if not good.all():
        row = int(np.argmin(good))
        limits = f" of {num_frames} frames" if num_frames else ""
        limits += f" of {size[1]}x{size[0]} pixels" if size else ""
        raise UserError(f"{path}: `query_points` row {row} (t, y, x) = ({t[row]:g}, {y[row]:g}, {x[row]:g}) is not a "
                        f"frame number and a pixel of the clip{limits}")
    return queries.astype(np.float32)


def _read_csv(path: Path) -> np.ndarray:
    try:
        if path.stat().st_size > MAX_CSV:
            raise UserError(f"{path} has more than {MAX_CSV >> 20} MiB: give the queries as .npz")
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: give query points as .csv or .npz") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table of query points: give text in UTF-8 whose first line is "
                        "t,y,x") from error
    if not rows or [cell.strip().lower() for cell in rows[0]] != ["t", "y", "x"]:
        raise UserError(f"{path}: the first line must be t,y,x")
    try:
        return np.array([[float(cell) for cell in row] for row in rows[1:]], np.float64).reshape(len(rows) - 1, 3)
    except ValueError as error:
        raise UserError(f"{path}: every line after the first must be three numbers: t,y,x") from error


def _save(path: str | Path, entries: dict) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **{key: value for key, value in entries.items() if value is not None})
