"""Files of query points, annotations and tracks, brought to the pixels and frame numbers of a sequence.

A file with a `frame_size` is in pixels of frames of that size, which must have the aspect ratio of the sequence's
frames or of their source. A file without one (.csv) is, with coordinates = "source", in pixels and frame numbers of the
source if all of its points fit there, else in those of the sequence's frames. Frame numbers of query points are the
source's in the same way, except in a file whose `frame_size` is the sequence's and not the source's: it has the
sequence's.

Notation
    M, N, T      query points, annotated points, frames of the sequence
    query        (t, y, x)
    coordinates  "source" or "frames": the option --coordinates
"""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.geometry import inside
from loaders.images import size_text
from loaders.predicted_tracks import load_tracks
from loaders.source_frames import SourceFrames, resize_points, resize_queries
from loaders.track_files import Annotations, PointTracks, checked_queries, load_annotations, load_query_file

log = logging.getLogger(__name__)
COORDINATES = ("source", "frames")


def queries_of_clip(path: str | Path, clip: SourceFrames, coordinates: str) -> np.ndarray:
    """Query points `(M, 3)` float32 of a file, in pixels and frame numbers of the sequence's frames.

    UserError as `load_queries`, or if they fit neither the source nor the frames."""
    queries, size = load_query_file(path)
    T = len(clip.numbers)
    if clip.is_the_sequence and size in (None, clip.size):
        return checked_queries(queries, path, T, clip.size)
    if size is not None and not clip.fits(size):
        raise UserError(_misfit(path, size, clip))
    by_source = coordinates == "source" and (size is None or size != clip.size or clip.size == clip.source_size)
    if by_source:
        found = _in_source(queries, size or clip.source_size, clip)
        if found is not None:
            _tell(path, f"query points are in {_source_text(clip)}", clip)
            return found
    found = queries if size is None else resize_queries(queries, size, clip.size)
    good = inside(found[:, :0:-1], clip.size) & (found[:, 0] < T)
    if by_source and not clip.is_the_sequence and not good.all():
        row = int(np.argmin(good))
        t, y, x = queries[row]
        pixels = f" of {size_text(size)} pixels" if size else ""
        raise UserError(f"{path}: `query_points` row {row} (t, y, x) = ({t:g}, {y:g}, {x:g}){pixels} fits neither "
                        f"{_source_text(clip)} nor the sequence's frames ({size_text(clip.size)}, frames 0 to "
                        f"{T - 1}): correct or remove it")
    if not good.all():
        return checked_queries(found, path, T, clip.size)
    if by_source:
        _tell(path, f"query points do not fit {_source_text(clip)}; they are read in the sequence's frames, "
              f"{size_text(size or clip.size)}, frames 0 to {T - 1}", clip)
    return found


def annotations_of_clip(path: str | Path, clip: SourceFrames, coordinates: str) -> Annotations:
    """Annotations of a file, in pixels of the sequence's frames. They may cover all frames of the source.

    If the source is not known, other aspect ratios are stretched to the frames.
    UserError as `load_annotations`, or if size or number of frames fit neither the source nor the frames."""
    truth = annotations_at(load_annotations(path), path, clip, coordinates)
    if not clip.fits(truth.frame_size):
        if clip.known:
            raise UserError(_misfit(path, truth.frame_size, clip))
        log.info("%s: annotations of %s are stretched to the frames' %s", path, size_text(truth.frame_size),
                 size_text(clip.size))
    return truth.resized(clip.size)


def annotations_at(truth: Annotations, path: str | Path, clip: SourceFrames, coordinates: str) -> Annotations:
    """The annotations in the frames of the sequence, if they cover these or, with "source", the source's frames.

    path: their file, for messages. UserError if they cover neither, or have query points in other frames."""
    frames = _columns(truth.points.shape[1], clip, coordinates)
    if frames is None:
        raise UserError(f"{path}: `points` has {truth.points.shape[1]} frames, the sequence {len(clip.numbers)}: "
                        "annotations must cover the same frames")
    if truth.query_points is not None:
        lost = ~np.isin(truth.query_points[:, 0], frames)
        if lost.any():
            row = int(np.argmax(lost))
            raise UserError(f"{path}: `query_points` row {row} is in frame {truth.query_points[row, 0]:g} of the "
                            f"source, the sequence has its frames {clip.numbers_text()}: remove this point")
    if len(frames) == truth.points.shape[1]:
        return truth
    log.info("%s: its %d frames are taken as those of the source; the sequence has %s", path, truth.points.shape[1],
             clip.numbers_text())
    return truth.at_frames(frames)


def load_tracks_of_clip(path: str | Path, clip: SourceFrames, queries: np.ndarray | None, coordinates: str,
                        visible_th: float = 0.5) -> PointTracks:
    """Tracks of any tracker in pixels of the sequence's frames. A file without frame size is in pixels of the source,
    or with coordinates = "frames" in those of the sequence.

    queries: `(N, 3)`, in pixels of the sequence's frames, are used where the file has none. UserError as
    `loaders.predicted_tracks.load_tracks` and `tracks_of_clip`."""
    size = default_size(clip, coordinates)
    if queries is not None and size != clip.size:
        queries = resize_queries(queries, clip.size, size)
    return tracks_of_clip(load_tracks(path, len(clip.numbers), queries, size, visible_th), path, clip)


def default_size(clip: SourceFrames, coordinates: str) -> tuple[int, int]:
    """Size (H, W) of the frames in whose pixels a file without frame size is."""
    return clip.source_size if coordinates == "source" else clip.size


def tracks_of_clip(tracks: PointTracks, path: str | Path, clip: SourceFrames) -> PointTracks:
    """The tracks of the file `path` in pixels of the sequence's frames. UserError if their size fits neither source nor
    frames."""
    if not clip.fits(tracks.frame_size):
        raise UserError(_misfit(path, tracks.frame_size, clip))
    tracks = tracks if tracks.frame_size == clip.size else tracks.resized(clip.size)
    return replace(tracks, source=clip) if clip.known else tracks


def points_of_clip(points: np.ndarray, size: tuple[int, int], path: str | Path, clip: SourceFrames) -> np.ndarray:
    """Points `(..., 2)` of the file `path`, in frames of `size`, in pixels of the sequence's frames.

    UserError if their size fits neither source nor frames."""
    if not clip.fits(size):
        raise UserError(_misfit(path, size, clip))
    return points if size == clip.size else resize_points(points, size, clip.size)


def _columns(num_frames: int, clip: SourceFrames, coordinates: str) -> np.ndarray | None:
    """Which of the file's frames the sequence has `(T,)`, for a file of `num_frames` frames; None if it cannot be."""
    T = len(clip.numbers)
    if num_frames == T:
        return np.arange(T)
    return clip.numbers if coordinates == "source" and clip.known and num_frames > clip.numbers.max() else None


def _in_source(queries: np.ndarray, size: tuple[int, int], clip: SourceFrames) -> np.ndarray | None:
    """Query points in frames of `size` and with the source's frame numbers, brought to the sequence's frames `(M, 3)`;
    None if they do not fit."""
    frames = clip.indices(queries[:, 0])
    if frames is None or not inside(queries[:, :0:-1], size).all():
        return None
    found = resize_queries(queries, size, clip.size) if size != clip.size else queries.copy()
    found[:, 0] = frames
    return found


def _source_text(clip: SourceFrames) -> str:
    return f"{clip.name or 'the source'} ({clip})"


def _misfit(path: str | Path, size: tuple[int, int], clip: SourceFrames) -> str:
    source = f"its source {size_text(clip.source_size)}" if clip.size != clip.source_size else "so is their source"
    return (f"{path} is for frames of {size_text(size)}, the sequence's are {size_text(clip.size)}, {source}: resize "
            "the frames or the tracks, or correct its `frame_size`")


def _tell(path: str | Path, what: str, clip: SourceFrames) -> None:
    """Log how a file was read, where there is a choice."""
    if not clip.is_the_sequence:
        log.info("%s: %s", path, what)
