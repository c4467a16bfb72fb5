"""Tracks from every annotated position, where few points are annotated:
python -m benchmarks.every_query --config configs/fast.txt --expname fast --data_dir seqs/bear

The run's options, as eval.py takes them. A point is a query in every frame in which it is annotated as visible, and its
track is scored in all other annotated frames, before and after. That asks for many times the tracks of TAP-Vid's mode
`first`, and most of them are shorter. Chained flow, the model alone, and its tracks with the flow; Markdown. The
second table has delta_avg by how far the scored frame is from the query's: what people place by hand is not the same
point to a pixel from one frame to the next, and no tracker gets beyond that.
"""

from argparse import Namespace
from dataclasses import replace

import numpy as np
import torch

from benchmarks.experiments import ground_truth
from common.cli import run
from configs.options import parse
from evaluation.scoring import as_point_tracks, baseline_tracks, score
from inference.load_run import load_run
from loaders.track_files import Annotations

KEYS = ("average_jaccard", "average_pts_within_thresh", "occlusion_accuracy", "pts_within_4", "pts_within_8",
        "pts_within_16")
NEAR = 5  # frames


def every_query(truth: Annotations) -> tuple[np.ndarray, np.ndarray]:
    """Queries (t, y, x) `(M, 3)` float32 and the rows `(M,)` of the annotations that they are of."""
    rows, frames = np.nonzero(~truth.occluded if truth.evaluated is None else ~truth.occluded & truth.evaluated)
    return np.column_stack([frames, truth.points[rows, frames, ::-1]]).astype(np.float32), rows


def far_apart(truth: Annotations, queries: np.ndarray, rows: np.ndarray) -> dict[str, Annotations]:
    """The truth with a row a query, of frames 1 to NEAR, NEAR + 1 to 2 NEAR, 2 NEAR + 1 to 4 NEAR ... frames from it;
    ranges without any are left out."""
    T = truth.points.shape[1]
    away = np.abs(np.arange(T) - queries[:, :1])  # (M, T)
    used = np.ones((len(rows), T), bool) if truth.evaluated is None else truth.evaluated[rows]
    out, low, high = {}, 1, NEAR
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
    print(f"| {len(queries)} queries | AJ | delta_avg | OA | within 4, 8, 16 px |\n|---|---|---|---|---|")
    for name, tracks in found.items():
        a, d, o, *within = (score(tracks, truth, rows, "strided")[key] for key in KEYS)  # that mode scores both ways
        print(f"| {name} | {a:.3f} | {d:.3f} | {o:.3f} | {', '.join(f'{share:.0%}' for share in within)} |")
    print(f"\n| delta_avg, frames apart | positions | {' | '.join(found)} |\n|---|---|{'---|' * len(found)}")
    for name, some in far_apart(truth, queries, rows).items():
        d = [score(tracks, some, np.arange(len(rows)), "strided")["average_pts_within_thresh"]
             for tracks in found.values()]
        print(f"| {name} | {(some.evaluated & ~some.occluded).sum()} | {' | '.join(f'{x:.3f}' for x in d)} |")


if __name__ == "__main__":
    run(main)
