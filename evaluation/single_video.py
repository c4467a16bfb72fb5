"""The modes of eval.py for one video: score a model, track query points, score or convert a file of tracks."""

import logging
from argparse import Namespace
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import check_writable, write_json
from configs.options import run_dir
from evaluation.scoring import (
    as_point_tracks,
    baseline_tracks,
    chosen_baselines,
    load_predictions,
    score,
)
from evaluation.tables import print_header, print_row
from inference.load_run import load_run
from loaders.clip_files import annotations_of_clip, load_tracks_of_clip, queries_of_clip
from loaders.predicted_tracks import load_tracks
from loaders.sequence import open_sequence
from loaders.source_frames import own_source, source_of
from loaders.track_export import check_format, export_tracks
from loaders.track_files import PointTracks, load_annotations, load_queries, sample_queries, save_tracks
from training.failure_modes import diagnosis_at

log = logging.getLogger("eval")


def check_modes(options: Namespace) -> None:
    """UserError if options of two modes are given together."""
    if options.tapvid and (options.annotations or options.queries):
        name = "annotations" if options.annotations else "queries"
        raise UserError(f"--tapvid has its own annotations and queries: leave --{name} out")
    if options.annotations and options.queries and not options.predictions:
        raise UserError("--annotations score the tracks of their own query points, --queries writes tracks without a "
                        "score: give one of them")
    if options.baselines and not options.tapvid and (options.predictions or options.queries):
        log.warning("--baselines are scored with --annotations and a model only: not used here")


def score_model(options: Namespace) -> None:
    """Track the annotations' queries with the run's model and with the baselines; write tracks and metrics."""
    baselines = chosen_baselines(options.baselines)
    run = load_run(options)
    path = Path(options.out or run_dir(options) / "metrics.json")
    check_writable(path.parent, "--out")
    check_writable(run_dir(options), "--save_dir")
    sequence = run.sequence
    clip = source_of(sequence)
    truth = annotations_of_clip(options.annotations, clip, options.coordinates)
    queries, rows = sample_queries(truth, options.query_mode)
    table = {name: score(baseline_tracks(name, sequence, queries, options.preprocessing), truth, rows,
                         options.query_mode) for name in baselines}
    tracks = as_point_tracks(run.tracker.track(queries), queries, sequence.size, clip)
    metrics = {"query_mode": options.query_mode, "follow_flow": options.follow_flow}
    metrics |= score(tracks, truth, rows, options.query_mode)
    if table:
        metrics["baselines"] = table
    if diagnosis := diagnosis_at(run.checkpoint_path.parent, run.checkpoint.step):
        metrics["diagnosis"] = diagnosis
    save_tracks(run_dir(options) / "annotation_tracks.npz", tracks)
    write_metrics(path, metrics, "model + flow" if metrics.get("follow_flow") else "model")


def track_queries(options: Namespace) -> None:
    """Track the query points of a file with the run's model, and write the tracks."""
    path = Path(options.out or run_dir(options) / "tracks.npz")
    check_format(path)
    run = load_run(options)
    check_writable(path.parent, "--out")
    sequence = run.sequence
    clip = source_of(sequence)
    queries = queries_of_clip(options.queries, clip, options.coordinates)
    tracks = as_point_tracks(run.tracker.track(queries), queries, sequence.size, clip)
    export_tracks(path, tracks, sequence, options.coordinates)
    log.info("%d tracks through %d frames: %s", len(queries), len(sequence), path)


def convert_tracks(options: Namespace) -> None:
    """Write a file of tracks in another format. --queries and the frame size of --data_dir are used where the file has
    none of its own. With --data_dir, the tracks are brought to the pixels of its frames, exports know the source, and a
    .rrd file also has the frames."""
    path = Path(options.predictions)
    check_format(Path(options.out))
    sequence = queries = None
    if options.data_dir:
        sequence = open_sequence(options.data_dir, options.num_imgs, options.max_pixels)
        clip = source_of(sequence)
        if options.queries:
            queries = queries_of_clip(options.queries, clip, options.coordinates)
        tracks = load_tracks_of_clip(path, clip, queries, options.coordinates, options.visible_th)
    else:
        queries = load_queries(options.queries) if options.queries else None
        tracks = load_tracks(path, None, queries, None, options.visible_th)
    check_queries(tracks, queries, options)
    export_tracks(Path(options.out), tracks, sequence, options.coordinates)
    log.info("%d tracks: %s", len(tracks.tracks), options.out)


def score_predictions(options: Namespace) -> None:
    """Score a file of tracks. Its queries must be those of the annotations in the query mode, in the same order.
    --data_dir names the frames of a file that does not say which they are."""
    if not options.annotations:
        raise UserError("--predictions are scored against --annotations FILE, or converted to --out FILE: "
                        "give one of them")
    path = Path(options.predictions)
    truth = load_annotations(options.annotations)
    clip = None
    if options.data_dir:
        clip = source_of(open_sequence(options.data_dir, options.num_imgs, options.max_pixels))
    tracks, truth, rows = load_predictions(path, truth, options.query_mode, options.annotations, options.visible_th,
                                           options.coordinates, clip)
    if options.queries:
        clip = tracks.source or own_source(tracks.frame_size, tracks.tracks.shape[1])
        check_queries(tracks, queries_of_clip(options.queries, clip, options.coordinates), options)
    metrics = {"query_mode": options.query_mode, **score(tracks, truth, rows, options.query_mode)}
    write_metrics(Path(options.out or path.with_suffix(".metrics.json")), metrics, "predictions")


def check_queries(tracks: PointTracks, queries: np.ndarray | None, options: Namespace) -> None:
    """UserError if tracks have other query points than those of --queries."""
    found = tracks.query_points
    if queries is not None and (found.shape != queries.shape or abs(found - queries).max(initial=0) > 0.01):
        raise UserError(f"{options.predictions}: its query points ({len(found)}) are not the {len(queries)} of "
                        f"{options.queries}: leave --queries out, or give those that were tracked")


def write_metrics(path: Path, metrics: dict, name: str) -> None:
    """Write the metrics to a JSON file, and print them as a table with one row for each tracker. name: of what is
    scored, besides the baselines."""
    write_json(path, metrics)
    print_header(f"query mode {metrics['query_mode']}")
    for baseline, row in metrics.get("baselines", {}).items():
        print_row(baseline, row)
    print_row(name, metrics)
    for line in metrics.get("diagnosis", {}).get("warnings", []):
        log.warning("diagnosis of the model after step %d: %s", metrics["diagnosis"]["step"], line)
    log.info("%s", path)
