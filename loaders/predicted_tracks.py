"""Tracks of any tracker: names, layouts and types of the arrays that people save.

    this project   `tracks` (N, T, 2), `visible` (N, T) bool, `query_points` (N, 3), `frame_size` (H, W)
    CoTracker      (pred_tracks (1, T, N, 2), pred_visibility (1, T, N)), bool or probabilities (Karaev et al., ECCV
                   2024; CoTrackerPredictor.forward in cotracker/predictor.py)
    TAPIR          `tracks` (N, T, 2), `visibles` (N, T), `query_points` (N, 3); its `occlusion` are logits (Doersch et
                   al., ICCV 2023; tapnet/models/tapir_model.py)

Notation
    N, T     tracks, frames
    layout   order of the first two axes of an array: (N, T) or (T, N); a leading batch dimension of 1 is dropped
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from loaders.source_frames import SourceFrames, resize_queries
from loaders.track_arrays import open_arrays
from loaders.track_files import Entries, PointTracks, checked_queries

log = logging.getLogger(__name__)
POSITIONS = ("tracks", "pred_tracks", "points")
VISIBLE = ("visible", "visibles", "visibility", "visibilities", "pred_visibility", "pred_visible", "vis")
OCCLUDED = ("occluded", "occlusion", "occlusions", "pred_occluded", "pred_occlusion")
OWN = {"tracks", "visible", "query_points", "frame_size"}
ROUNDING = 1e-3  # probabilities may be this far outside [0, 1]
MAX_QUERY_DISTANCE = 2.0  # pixels, of a track that starts at its query point
MIN_STARTING_SHARE = 0.5  # of the tracks that start at query points which are read in the right order
HOW = "save it as .npz with `tracks` (N, T, 2), `visible` (N, T), `query_points` (N, 3) and `frame_size` (H, W)"


@dataclass(frozen=True)
class FileTracks:
    """What a file of tracks holds. Fields that the file does not have are None."""
    tracks: np.ndarray                         # (N, T, 2) float32 pixels
    visible: np.ndarray                        # (N, T) bool
    query_points: np.ndarray | None            # (N, 3) float32 = (t, y, x)
    frame_size: tuple[int, int] | None         # (H, W)
    occlusion_score: np.ndarray | None = None  # (N, T) float32
    depth: np.ndarray | None = None            # (N, T) float32
    source: SourceFrames | None = None         # where the frames come from


def load_tracks(path: str | Path, num_frames: int | None = None, queries: np.ndarray | None = None,
                size: tuple[int, int] | None = None, visible_th: float = 0.5) -> PointTracks:
    """Tracks of query points from a file of any tracker.

    queries: `(N, 3)`, in frames of `size`, and size: (H, W), are used where the file has none of its own. The other
    arguments and errors are those of `read_tracks`; UserError also if there are no query points or no frame size."""
    found = read_tracks(path, num_frames, None if queries is None else len(queries), visible_th)
    if found.query_points is None and queries is None:
        raise UserError(f"{path} has no query points: give --queries FILE with one (t, y, x) for each of its "
                        f"{len(found.tracks)} tracks")
    if found.frame_size is None and size is None:
        raise UserError(f"{path} has no `frame_size`: give --data_dir, the sequence that was tracked, or {HOW}")
    frame_size = found.frame_size or tuple(size)
    points = found.query_points
    if points is None:
        points = queries if size is None or frame_size == tuple(size) else resize_queries(queries, size, frame_size)
    return PointTracks(found.tracks, found.visible, np.asarray(points, np.float32), frame_size, found.occlusion_score,
                       found.depth, found.source)


def stored_source(path: str | Path) -> SourceFrames | None:
    """The source of a file of tracks; None if the file does not have it, as those of other trackers."""
    if Path(path).suffix.lower() != ".npz":
        return None
    entries = Entries(path, open_arrays(path))
    known = {"frame_size", "frame_numbers"} <= set(entries.arrays.names or ())
    return entries.source(entries.size()) if known else None


def read_tracks(path: str | Path, num_frames: int | None = None, num_queries: int | None = None,
                visible_th: float = 0.5, hidden: bool = True) -> FileTracks:
    """The content of a file of tracks: .npz, .npy or .pt.

    num_frames, num_queries: what they must be; None: not known. The layout follows from them and from the file's own
    query points. visible_th: a point is visible if its probability is larger. Without visibility, all points are.
    hidden: whether positions of points that are not visible must be finite, too; if not, those that are not become 0.
    UserError if the file is missing or damaged, tracks are missing, two layouts fit, an array has a wrong shape or
    type, a position is not finite, or visibility is outside [0, 1]."""
    entries = Entries(path, open_arrays(path))
    name = _position_name(entries)
    positions = _without_batch(entries.arrays[name], 3, path, name)
    if positions.shape[-1] != 2 or positions.dtype.kind not in "iuf":
        raise UserError(f"{path}: `{name}` is {positions.dtype} of the shape {positions.shape}, it must be positions "
                        "(x, y) in pixels, (N, T, 2) or (T, N, 2)")
    given = _queries(entries)
    transposed = _is_transposed(entries, name, positions, given, num_queries, num_frames)
    positions = positions.swapaxes(0, 1) if transposed else positions
    N, T = positions.shape[:2]
    visible = _visible(entries, (N, T), transposed, visible_th)
    tracks = _finite(positions, visible | hidden, path, name)
    size = entries.size() if "frame_size" in entries.arrays else None
    score, depth = (_optional(entries, key, (N, T), transposed) for key in ("occlusion_score", "depth"))
    if given is not None:
        given = _in_order(given, tracks, entries)
        given = checked_queries(given, path, T, size)
    return FileTracks(tracks, visible, given, size, score, depth, entries.source(size, T) if size else None)


def _position_name(entries: Entries) -> str:
    there = [name for name in POSITIONS if name in entries.arrays]
    if not there:
        names = ", ".join(sorted(entries.arrays.names)[:20]) or "nothing"
        raise UserError(f"{entries.path} has no `tracks`: it has {names}; positions are named {', '.join(POSITIONS)}")
    if there[:2] == ["tracks", "pred_tracks"]:
        raise UserError(f"{entries.path} has `tracks` and `pred_tracks`: keep those that are to be read")
    return there[0]


def _without_batch(array: np.ndarray, ndim: int, path: str | Path, name: str) -> np.ndarray:
    """`array` with `ndim` axes, without a leading batch dimension of 1."""
    if array.ndim == ndim + 1 and array.shape[0] == 1:
        return array[0]
    if array.ndim == ndim + 1 and array.shape[0] > 1:
        raise UserError(f"{path}: `{name}` has the shape {array.shape}, a batch of {array.shape[0]} clips: save one "
                        "clip a file")
    if array.ndim != ndim:
        raise UserError(f"{path}: `{name}` has the shape {array.shape}: {HOW}")
    return array


def _is_transposed(entries: Entries, name: str, positions: np.ndarray, queries: np.ndarray | None, N: int | None,
                   T: int | None) -> bool:
    """Whether the layout of `positions` is (T, N). UserError if neither layout, or both, fit the file's `queries`, or
    without them N tracks, and T frames (None: not known).

    If both fit, it is that in which more tracks start at the file's queries; if that does not decide, arrays that are
    named and shaped as this project's or CoTracker's have their layout."""
    path = entries.path
    shape = first, second = positions.shape[:2]
    N = N if queries is None else len(queries)
    plain = N in (None, first) and T in (None, second)
    turned = N in (None, second) and T in (None, first)
    if plain and turned:
        if queries is not None:
            own, other = (max(_starting_share(array, queries)) for array in (positions, positions.swapaxes(0, 1)))
            if own != other and max(own, other) >= MIN_STARTING_SHARE:
                return other > own
        if entries.arrays.names and set(entries.arrays.names) >= OWN:
            return False
        if entries.arrays[name].ndim == 4 and (name == "pred_tracks" or getattr(entries.arrays, "by_place", False)):
            return True
        raise UserError(f"{path}: `{name}` has the shape {entries.arrays[name].shape}, which may be (tracks, frames) "
                        f"or (frames, tracks): {HOW}" + ("" if N or T else ", or give --queries FILE or --data_dir"))
    if plain or turned:
        return turned
    if N in shape and T is not None:
        other = second if first == N else first
        raise UserError(f"{path}: `{name}` has {other} frames, {T} are needed: give tracks of the same clip")
    wanted = " and ".join(f"{count} {what}" for count, what in ((N, "queries"), (T, "frames")) if count is not None)
    advice = "track the query points of --annotations in the --query_mode, or give those that were tracked"
    if N is None:
        advice = "give tracks through all frames of the clip"
    full = entries.arrays[name].shape
    raise UserError(f"{path}: `{name}` has the shape {full}, which does not fit {wanted}: {advice}")


def _oriented(array: np.ndarray, size: tuple[int, int], transposed: bool, path: str | Path, name: str) -> np.ndarray:
    """An array of one value per track and frame as (N, T) = `size`. Where N = T it has the layout of the tracks."""
    shape = array.shape
    while array.ndim > 2 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    turned = transposed if size[0] == size[1] else array.shape == size[::-1]
    array = array.T if turned and array.ndim == 2 else array
    if array.shape != size:
        raise UserError(f"{path}: `{name}` has the shape {shape}, it must be one value for each of {size[0]} tracks "
                        f"and {size[1]} frames")
    return array


def _finite(positions: np.ndarray, needed: np.ndarray, path: str | Path, name: str) -> np.ndarray:
    """Positions as contiguous float32; those that are not finite become 0. UserError if they are needed."""
    with np.errstate(over="ignore"):
        out = np.array(positions, np.float32, order="C")
    bad = ~np.isfinite(out).all(axis=-1)
    out[bad] = 0
    bad &= needed
    if bad.any():
        n, t = np.argwhere(bad)[0]
        raise UserError(f"{path}: `{name}` has {int(bad.sum())} positions that are not finite, the first of track {n} "
                        f"in frame {t}: replace them, or remove these tracks")
    return out


def _visible(entries: Entries, size: tuple[int, int], transposed: bool, visible_th: float) -> np.ndarray:
    """Visibility (N, T) bool, from the first of the known names that the file has."""
    path = entries.path
    name = next((name for name in VISIBLE + OCCLUDED if name in entries.arrays), None)
    if name is None:
        log.info("%s has no visibility: all points count as visible", path)
        return np.ones(size, bool)
    values = _oriented(entries.arrays[name], size, transposed, path, name)
    if values.dtype != bool:
        values = values.astype(np.float64)
        if not ((values >= -ROUNDING) & (values <= 1 + ROUNDING)).all():  # also true for NaN
            raise UserError(f"{path}: `{name}` has values from {values.min():g} to {values.max():g}, it must be bool, "
                            "0 or 1, or probabilities: apply a sigmoid to logits (TAPIR: visible = (1 - "
                            "sigmoid(occlusion)) * (1 - sigmoid(expected_dist)) > 0.5)")
        values = (1 - values if name in OCCLUDED else values) > visible_th
    elif name in OCCLUDED:
        values = ~values
    return np.ascontiguousarray(values)


def _optional(entries: Entries, key: str, size: tuple[int, int], transposed: bool) -> np.ndarray | None:
    if key not in entries.arrays:
        return None
    array = _oriented(entries.arrays[key], size, transposed, entries.path, key)
    if array.dtype.kind != "f":
        raise UserError(f"{entries.path}: `{key}` is {array.dtype}, it must be floating point")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float32)


def _queries(entries: Entries) -> np.ndarray | None:
    """The file's `query_points`, else its `queries`, (N, 3)."""
    name = next((name for name in ("query_points", "queries") if name in entries.arrays), None)
    if name is None:
        return None
    out = _without_batch(entries.arrays[name], 2, entries.path, name)
    if out.shape[1] != 3 or out.dtype.kind not in "iuf":
        raise UserError(f"{entries.path}: `{name}` is {out.dtype} of the shape {out.shape}, it must be numbers (N, 3)")
    return out


def _in_order(queries: np.ndarray, tracks: np.ndarray, entries: Entries) -> np.ndarray:
    """Query points as (t, y, x). They may be in CoTracker's order (t, x, y), if only that is where the tracks start.

    UserError if `queries`, a name without a fixed order, fit both orders or neither."""
    yx, xy = _starting_share(tracks, queries)
    own = "query_points" in entries.arrays
    if xy >= MIN_STARTING_SHARE > yx:
        log.info("%s: its `%s` are read as (t, x, y), where its tracks start", entries.path,
                 "query_points" if own else "queries")
        return queries[:, [0, 2, 1]]
    if own or yx >= MIN_STARTING_SHARE > xy:
        return queries
    raise UserError(f"{entries.path}: its `queries` may be (t, x, y) or (t, y, x): name them `query_points`, with "
                    "(t, y, x)")


def _starting_share(tracks: np.ndarray, queries: np.ndarray) -> tuple[float, float]:
    """Share of the tracks `(N, T, 2)` that start at their query points `(N, 3)`: if these are (t, y, x), and if they
    are (t, x, y)."""
    frames = queries[:, 0]
    rows = np.flatnonzero((frames >= 0) & (frames < tracks.shape[1]))
    start = tracks[rows, frames[rows].astype(int)]  # (N', 2)
    near = [np.linalg.norm(start - queries[rows][:, order], axis=1) <= MAX_QUERY_DISTANCE for order in ([2, 1], [1, 2])]
    yx, xy = (chosen.sum() / max(len(queries), 1) for chosen in near)
    return yx, xy
