"""Score tracks from every annotated position, for videos with few annotated points:
python -m benchmarks.every_query --config configs/fast.txt --expname fast --data_dir seqs/bear

Takes the options of eval.py. A point is a query in every frame in which it is annotated as visible. Its track is
scored in all other annotated frames, before and after the query. This gives many more tracks than TAP-Vid's query mode
`first`, and most of them are shorter. Prints Markdown tables for the model alone, for the model's tracks that follow
optical flow (--follow_flow 1), and for chained optical flow. The second table has delta_avg by the distance in frames
between the query and the scored frame. Hand annotations do not mark exactly the same point in every
frame, which limits the score that a tracker can reach.
"""

from argparse import Namespace
from dataclasses import replace

import numpy as np
import torch

from benchmarks.experiments import ground_truth
from common.cli import run
from configs.options import parse
from evaluation.scoring import as_point_tracks, baseline_tracks, score
from evaluation.tables import COLUMNS, markdown
from inference.load_run import load_run
from loaders.track_files import Annotations

FIRST_RANGE = 5  # frames: upper end of the first range of distances


def every_query(truth: Annotations) -> tuple[np.ndarray, np.ndarray]:
    """Queries (t, y, x) `(M, 3)` float32, and the annotation row `(M,)` of each."""
    rows, frames = np.nonzero(~truth.occluded if truth.evaluated is None else ~truth.occluded & truth.evaluated)
    return np.column_stack([frames, truth.points[rows, frames, ::-1]]).astype(np.float32), rows


def far_apart(truth: Annotations, queries: np.ndarray, rows: np.ndarray) -> dict[str, Annotations]:
    """Ground truth with one row for each query, for ranges of the distance in frames to the query.

    With FIRST_RANGE = 5 the ranges are 1 to 5, 6 to 10, 11 to 20, and so on; each key names a range. Ranges without a
    visible position are left out."""
    T = truth.points.shape[1]
    away = np.abs(np.arange(T) - queries[:, :1])  # (M, T)
    used = np.ones((len(rows), T), bool) if truth.evaluated is None else truth.evaluated[rows]
    out = {}
    low, high = 1, FIRST_RANGE
    while low < T:
        some = used & (away >= low) & (away <= high)
        if (some & ~truth.occluded[rows]).any():
            out[f"{low} to {min(high, T - 1)}"] = replace(
                truth, points=truth.points[rows], occluded=truth.occluded[rows], evaluated=some)
        low, high = high + 1, 2 * high
    return out


def main() -> None:
    torch.set_flush_denormal(True)  # as train.py does
    options = vars(parse("eval"))
    found = {}
    for name, flow in (("the model alone", 0), ("with the flow", 1)):
        run = load_run(Namespace(**options | {"follow_flow": flow}))
        sequence, tracker = run.sequence, run.tracker
        truth = ground_truth(sequence)[0]
        queries, rows = every_query(truth)
        found[name] = as_point_tracks(tracker.track(queries), queries, sequence.size)
    found["chained flow"] = baseline_tracks("chain", sequence, queries)
    rows_of_scores = []
    for name, tracks in found.items():
        metrics = score(tracks, truth, rows, "strided")  # counts the frames before and after each query
        within = ", ".join(f"{metrics[f'pts_within_{threshold}']:.0%}" for threshold in (4, 8, 16))
        rows_of_scores.append([name, *(f"{metrics[key]:.3f}" for key in list(COLUMNS)[:3]), within])
    print(markdown([f"{len(queries)} queries", *list(COLUMNS.values())[:3], "within 4, 8, 16 px"], rows_of_scores))
    rows_of_distances = []
    for name, some in far_apart(truth, queries, rows).items():
        metrics = [score(tracks, some, np.arange(len(rows)), "strided") for tracks in found.values()]
        rows_of_distances.append([name, str((some.evaluated & ~some.occluded).sum()),
                                  *(f"{each['average_pts_within_thresh']:.3f}" for each in metrics)])
    print()
    print(markdown(["delta_avg, frames apart", "positions", *found], rows_of_distances))


if __name__ == "__main__":
    run(main)
