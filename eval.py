"""Score or write tracks: python eval.py --config configs/default.txt --data_dir seqs/clip --annotations gt.npz

--annotations GT               tracks of the run's model against ground truth; --baselines static,chain beside it
--queries Q --out TRACKS       tracks of any query points, without a score
--predictions TRACKS --annotations GT   tracks of any tracker against ground truth, without a model
--predictions TRACKS --out FILE         the same tracks in another format, by FILE's ending: .npz .csv .pt .nuke .rrd
"""

import json
import logging
from argparse import Namespace
from pathlib import Path

from configs.options import parse, run, run_dir
from errors import UserError
from inference import open_run
from loaders.annotations import (
    Annotations,
    PointTracks,
    load_annotations,
    load_queries,
    load_tracks,
    sample_queries,
    save_tracks,
)
from loaders.exports import check_format, export_tracks
from loaders.files import write_text
from loaders.sequence import VideoSequence, open_sequence
from loaders.store import open_correspondences
from losses.metrics import tapvid_metrics
from preprocessing.baselines import chained_flow_tracks, static_tracks

log = logging.getLogger("eval")
COLUMNS = {"average_jaccard": "AJ", "average_pts_within_thresh": "delta_avg", "occlusion_accuracy": "OA",
           "temporal_coherence": "TC"}
BASELINES = ("static", "chain")


def evaluate(options: Namespace) -> None:
    """The mode that the options ask for."""
    if options.predictions and options.out and not options.annotations:
        convert_tracks(options)
    elif options.predictions:
        score_predictions(options)
    elif options.queries:
        track_queries(options)
    elif options.annotations:
        score_model(options)
    else:
        raise UserError("nothing to do: say --annotations FILE, --queries FILE, or --predictions FILE")


def score_model(options: Namespace) -> None:
    """Track the annotations' queries with the run's model and with the baselines; write tracks and metrics."""
    names = [name for name in options.baselines.split(",") if name]
    if unknown := set(names) - set(BASELINES):
        raise UserError(f"no baseline '{min(unknown)}': choose among {', '.join(BASELINES)}")
    sequence, tracker = open_run(options)
    truth = load_annotations(options.annotations, len(sequence)).resized(sequence.size)
    queries, rows = sample_queries(truth, options.query_mode)
    results = {name: baseline(name, sequence, queries) for name in names}
    results["model"] = as_point_tracks(tracker.track(queries), queries, sequence.size)
    table = {name: score(tracks, truth, rows, options.query_mode) for name, tracks in results.items()}
    save_tracks(run_dir(options) / "annotation_tracks.npz", results["model"])
    path = Path(options.out or run_dir(options) / "metrics.json")
    write_metrics(path, table.pop("model") | ({"baselines": table} if table else {}), options.query_mode)


def track_queries(options: Namespace) -> None:
    """Tracks of the query points of a file."""
    path = Path(options.out or run_dir(options) / "tracks.npz")
    check_format(path)
    sequence, tracker = open_run(options)
    queries = load_queries(options.queries, len(sequence), sequence.size)
    export_tracks(path, as_point_tracks(tracker.track(queries), queries, sequence.size), sequence)
    log.info("%d tracks through %d frames: %s", len(queries), len(sequence), path)


def convert_tracks(options: Namespace) -> None:
    """A file of tracks in another format; a .rrd shows the frames too if the sequence is given."""
    check_format(Path(options.out))
    tracks = load_tracks(options.predictions)
    sequence = open_sequence(options.data_dir, options.num_imgs) if options.data_dir else None
    export_tracks(Path(options.out), tracks, sequence)
    log.info("%d tracks: %s", len(tracks.tracks), options.out)


def score_predictions(options: Namespace) -> None:
    """Score a file of tracks; its queries must be the annotations' (in the query mode), in their order."""
    if not options.annotations:
        raise UserError("--predictions are scored against --annotations FILE: give both")
    truth = load_annotations(options.annotations)
    tracks = load_tracks(options.predictions, truth.points.shape[1])
    truth = truth.resized(tracks.frame_size)
    queries, rows = sample_queries(truth, options.query_mode)
    if queries.shape != tracks.query_points.shape or abs(queries - tracks.query_points).max(initial=0) > 0.01:
        raise UserError(f"{options.predictions}: its `query_points` ({len(tracks.query_points)}) are not the "
                        f"{len(queries)} of {options.annotations} in the query mode '{options.query_mode}': track "
                        "these, in this order")
    path = Path(options.out or Path(options.predictions).with_suffix(".metrics.json"))
    write_metrics(path, score(tracks, truth, rows, options.query_mode), options.query_mode)


def baseline(name: str, sequence: VideoSequence, queries) -> PointTracks:
    """Tracks of a baseline: `static` points stay, `chain` follows the flow from frame to frame."""
    if name == "static":
        return static_tracks(queries, len(sequence), sequence.size)
    return chained_flow_tracks(queries, open_correspondences(sequence))


def as_point_tracks(tracks, queries, size: tuple[int, int]) -> PointTracks:
    """The tracker's result as it is written to a file."""
    return PointTracks(**vars(tracks), query_points=queries, frame_size=size)


def score(tracks: PointTracks, truth: Annotations, rows, query_mode: str) -> dict[str, float]:
    """Metrics of tracks whose query m belongs to ground-truth row rows[m]."""
    evaluated = None if truth.evaluated is None else truth.evaluated[rows]
    return tapvid_metrics(tracks.query_points, truth.occluded[rows], truth.points[rows], ~tracks.visible,
                          tracks.tracks, query_mode, truth.frame_size, evaluated)


def write_metrics(path: Path, metrics: dict, query_mode: str) -> None:
    """metrics.json, and its table on the screen."""
    write_text(path, json.dumps({"query_mode": query_mode, **metrics}, indent=1) + "\n")
    rows = {**metrics.get("baselines", {}), "model": metrics}
    print(f"query mode {query_mode}; fractions at 256x256; TC in pixels a frame squared, 0 is best")
    print(f"{'':8}" + "".join(f"{title:>11}" for title in COLUMNS.values()))
    for name, row in rows.items():
        cells = (f"{row[key]:11.3f}" if key in row else f"{'-':>11}" for key in COLUMNS)
        print(f"{name:8}" + "".join(cells))
    log.info("%s", path)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    evaluate(parse("eval"))


if __name__ == "__main__":
    run(main)
