"""Score or write tracks: python eval.py --config configs/default.txt --data_dir seqs/clip --annotations gt.npz

--annotations GT               score the model's tracks against ground truth; --baselines static,chain adds baselines
--queries Q --out TRACKS       write tracks of any query points, without a score
--predictions TRACKS --annotations GT   score tracks of any tracker, without a model
--predictions TRACKS --out FILE         convert tracks; the ending of FILE sets the format: .npz .csv .pt .nuke .rrd
--tapvid FILE                  run a benchmark: preprocess, train, track and score every video
"""

import json
import logging
from argparse import Namespace
from pathlib import Path

import torch

from common.cli import run
from common.errors import UserError
from common.files import write_text
from configs.options import parse, run_dir
from evaluation.benchmark import run_benchmark
from evaluation.scoring import (
    BASELINES,
    COLUMNS,
    UNITS,
    as_point_tracks,
    baseline_tracks,
    load_predictions,
    score,
)
from inference.load_run import load_run
from loaders.images import limit_pixels
from loaders.sequence import open_sequence
from loaders.track_export import check_format, export_tracks
from loaders.track_files import load_annotations, load_queries, load_tracks, sample_queries, save_tracks

log = logging.getLogger("eval")


def evaluate(options: Namespace) -> None:
    """Run the mode that the options select."""
    if options.tapvid:
        run_benchmark(options)
    elif options.predictions and options.out and not options.annotations:
        convert_tracks(options)
    elif options.predictions:
        score_predictions(options)
    elif options.queries:
        track_queries(options)
    elif options.annotations:
        score_model(options)
    else:
        raise UserError("nothing to do: say --annotations FILE, --queries FILE, --predictions FILE, or --tapvid FILE")


def score_model(options: Namespace) -> None:
    """Track the annotations' queries with the run's model and with the baselines; write tracks and metrics."""
    names = [name for name in options.baselines.split(",") if name]
    if unknown := set(names) - set(BASELINES):
        raise UserError(f"no baseline '{min(unknown)}': choose among {', '.join(BASELINES)}")
    run = load_run(options)
    sequence, tracker = run.sequence, run.tracker
    truth = load_annotations(options.annotations, len(sequence)).resized(sequence.size)
    queries, rows = sample_queries(truth, options.query_mode)
    results = {name: baseline_tracks(name, sequence, queries) for name in names}
    results["model"] = as_point_tracks(tracker.track(queries), queries, sequence.size)
    table = {name: score(tracks, truth, rows, options.query_mode) for name, tracks in results.items()}
    save_tracks(run_dir(options) / "annotation_tracks.npz", results["model"])
    path = Path(options.out or run_dir(options) / "metrics.json")
    write_metrics(path, {"follow_flow": options.follow_flow} | table.pop("model") | (
        {"baselines": table} if table else {}), options.query_mode)


def track_queries(options: Namespace) -> None:
    """Track the query points of a file with the run's model, and write the tracks."""
    path = Path(options.out or run_dir(options) / "tracks.npz")
    check_format(path)
    run = load_run(options)
    sequence, tracker = run.sequence, run.tracker
    queries = load_queries(options.queries, len(sequence), sequence.size)
    export_tracks(path, as_point_tracks(tracker.track(queries), queries, sequence.size), sequence)
    log.info("%d tracks through %d frames: %s", len(queries), len(sequence), path)


def convert_tracks(options: Namespace) -> None:
    """Write a file of tracks in another format. A .rrd file also has the frames if --data_dir is given."""
    check_format(Path(options.out))
    tracks = load_tracks(options.predictions)
    sequence = open_sequence(options.data_dir, options.num_imgs) if options.data_dir else None
    export_tracks(Path(options.out), tracks, sequence)
    log.info("%d tracks: %s", len(tracks.tracks), options.out)


def score_predictions(options: Namespace) -> None:
    """Score a file of tracks. Its queries must be those of the annotations in the query mode, in the same order."""
    if not options.annotations:
        raise UserError("--predictions are scored against --annotations FILE: give both")
    tracks, truth, rows = load_predictions(Path(options.predictions), load_annotations(options.annotations),
                                           options.query_mode, options.annotations)
    path = Path(options.out or Path(options.predictions).with_suffix(".metrics.json"))
    write_metrics(path, score(tracks, truth, rows, options.query_mode), options.query_mode)


def write_metrics(path: Path, metrics: dict, query_mode: str) -> None:
    """Write the metrics to a JSON file and print them as a table."""
    write_text(path, json.dumps({"query_mode": query_mode, **metrics}, indent=1) + "\n")
    rows = {**metrics.get("baselines", {}), "model + flow" if metrics.get("follow_flow") else "model": metrics}
    print(f"query mode {query_mode}; {UNITS}")
    print(f"{'':12}" + "".join(f"{title:>11}" for title in COLUMNS.values()))
    for name, row in rows.items():
        cells = (f"{row[key]:11.3f}" if key in row else f"{'-':>11}" for key in COLUMNS)
        print(f"{name:12}" + "".join(cells))
    log.info("%s", path)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_flush_denormal(True)  # see train.py
    options = parse("eval")
    limit_pixels(options.max_pixels)
    evaluate(options)


if __name__ == "__main__":
    run(main)
