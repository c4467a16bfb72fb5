"""Score tracks against ground truth; shared by the single-video and the benchmark modes of eval.py."""

import logging
from pathlib import Path

import numpy as np

from common.errors import UserError
from evaluation.baselines import chained_flow_tracks, multi_interval_flow_tracks, static_tracks
from evaluation.metrics import error_since_query, tapvid_metrics
from loaders.clip_files import annotations_at, default_size
from loaders.correspondences import open_correspondences
from loaders.images import size_text
from loaders.predicted_tracks import load_tracks, stored_source
from loaders.scenes import read_scenes
from loaders.sequence import VideoSequence
from loaders.source_frames import SourceFrames
from loaders.track_files import Annotations, PointTracks, sample_queries
from preprocessing.cli import flow_model

log = logging.getLogger("eval")
MAX_START_DISTANCE = 0.02  # share of the frame's longer side; a larger distance from the query points is logged
BASELINES = ("static", "chain", "multiflow")


def chosen_baselines(text: str) -> list[str]:
    """The names in a comma-separated list of baselines. UserError for an unknown name."""
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(BASELINES):
        raise UserError(f"no baseline '{min(unknown)}': choose among {', '.join(BASELINES)}")
    return names


def baseline_tracks(name: str, sequence: VideoSequence, queries: np.ndarray, preprocessing: str = "") -> PointTracks:
    """Tracks of a baseline: `static` points do not move; `chain` follows the stored flow from frame to frame;
    `multiflow` follows flow over several intervals, computed with the options `preprocessing`."""
    if name == "static":
        return static_tracks(queries, len(sequence), sequence.size)
    if name == "chain":
        return chained_flow_tracks(queries, open_correspondences(sequence), read_scenes(sequence))
    return multi_interval_flow_tracks(queries, sequence, *flow_model(preprocessing, sequence))


def as_point_tracks(tracks, queries: np.ndarray, size: tuple[int, int],
                    clip: SourceFrames | None = None) -> PointTracks:
    """The tracker's result with its queries, frame size, and source if it is known, as track files store it."""
    source = clip if clip and clip.known else None
    return PointTracks(**vars(tracks), query_points=queries, frame_size=size, source=source)


def score(tracks: PointTracks, truth: Annotations, rows: np.ndarray, query_mode: str) -> dict[str, float]:
    """Metrics of tracks whose query m belongs to ground-truth row rows[m]."""
    evaluated = None if truth.evaluated is None else truth.evaluated[rows]  # (M, T)
    return tapvid_metrics(tracks.query_points, truth.occluded[rows], truth.points[rows], ~tracks.visible,
                          tracks.tracks, query_mode, truth.frame_size, evaluated)


def error_curve(tracks: PointTracks, truth: Annotations, rows: np.ndarray, query_mode: str) -> dict[str, list]:
    """Error by distance in frames from the query; arguments as in `score`."""
    evaluated = None if truth.evaluated is None else truth.evaluated[rows]
    return error_since_query(tracks.query_points, truth.occluded[rows], truth.points[rows], tracks.tracks, query_mode,
                             truth.frame_size, evaluated)


def load_predictions(path: Path, truth: Annotations, query_mode: str, where: str, visible_th: float = 0.5,
                     coordinates: str = "source",
                     clip: SourceFrames | None = None) -> tuple[PointTracks, Annotations, np.ndarray]:
    """Tracks of any tracker, the ground truth at their frame size, and the ground-truth row of each query.

    where: file of the ground truth, for error messages. visible_th: see loaders.predicted_tracks.
    clip: source of the frames, used if the file does not have its own.
    A file without query points must hold the tracks of the query mode's query points, in their order. A file without
    frame size is in pixels of `clip`, or of the ground truth if there is no `clip`. Ground truth of all frames of the
    source is reduced to the frames of the tracks, if these are known and `coordinates` is "source".
    UserError unless the file has the queries of the query mode, in the same order. Where the frame sizes differ, a
    query may be off by a pixel of the smaller frames, since programs scale and round in different ways."""
    source = stored_source(path) or clip
    size = truth.frame_size
    if source is not None:
        truth = annotations_at(truth, where, source, coordinates)
    if clip is not None:
        size = default_size(clip, coordinates)
    queries, _ = sample_queries(truth if size == truth.frame_size else truth.resized(size), query_mode)
    tracks = load_tracks(path, truth.points.shape[1], queries, size, visible_th)
    resized = truth.resized(tracks.frame_size)
    queries, rows = sample_queries(resized, query_mode)
    zoom = max(new / old for new, old in zip(tracks.frame_size, truth.frame_size, strict=True))
    near = 0.01 if tracks.frame_size == truth.frame_size else max(1, zoom)  # pixels
    if queries.shape != tracks.query_points.shape or (abs(queries - tracks.query_points) > [0, near, near]).any():
        raise UserError(f"{path}: its query points ({len(tracks.query_points)}, in {size_text(tracks.frame_size)}) are "
                        f"not the {len(queries)} of {where} ({size_text(truth.frame_size)}) in the query mode "
                        f"'{query_mode}': track these, in this order")
    warn_if_far(tracks, path)
    return tracks, resized, rows


def warn_if_far(tracks: PointTracks, path: Path) -> None:
    """Log a warning if the tracks do not start at their query points: they may be in another order or frame size."""
    if len(tracks.tracks) == 0:
        return
    start = tracks.tracks[np.arange(len(tracks.tracks)), tracks.query_points[:, 0].astype(int)]  # (M, 2)
    distance = float(np.median(np.linalg.norm(start - tracks.query_points[:, :0:-1], axis=1)))
    if distance > MAX_START_DISTANCE * max(tracks.frame_size):
        log.warning("%s: its tracks are %.1f px (median) from their query points: are they in the queries' order, and "
                    "in pixels of frames of %dx%d?", path, distance, *tracks.frame_size[::-1])
