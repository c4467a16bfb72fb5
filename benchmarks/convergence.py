"""Accuracy over time and steps: python -m benchmarks.convergence configs/small.txt configs/fast.txt [--target 0.7]

Trains each config file on every clip with every seed, once for each run length of --steps, and scores the model at
--looks equally spaced steps. Schedules are fractions of a run, so a short run is not the beginning of a long one.
Writes OUT/convergence.md and convergence.png. Only missing runs are computed.

First table: delta_avg and AJ at the end of the runs (mean over clips and seeds, ± the standard deviation over seeds of
the mean over clips), and for each clip the seconds until delta_avg reaches the target. The target is --target or, if
that is 0, the best final delta_avg of the first preset on this clip. The time comes from the mean curve over the seeds:
linear interpolation between the scored steps, and never earlier than the first of them.
These are tracks of the model alone.
Second table: results for each clip, also with tracks that follow optical flow (--follow_flow 1), and for chained
optical flow without a model.
"""

import argparse
import logging
import math
import statistics
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.experiments import (
    FOLLOWED,
    Cell,
    add_clip_arguments,
    clips_of,
    file_options,
    finish,
    ground_truth,
    means_of_seeds,
    on_clip,
    run_missing,
    values,
)
from benchmarks.tables import spread
from common.cli import Parser, run
from common.files import atomic_path
from evaluation.plots import COLORS, STYLE
from evaluation.scoring import baseline_tracks, score
from evaluation.tables import markdown
from loaders.sequence import open_sequence

METRICS = ("average_pts_within_thresh", "average_jaccard")  # delta_avg and AJ
Runs = dict[tuple[str, int], list[dict]]  # (preset, index of its length) -> records


def curve(records: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, seconds and delta_avg, each `(looks,)`, at the scored steps: means over runs of one length."""
    looks = [[(point["step"], point["seconds"], point[METRICS[0]]) for point in record["curve"]] for record in records]
    return tuple(np.mean(looks, axis=0).T)


def time_to(target: float, records: list[dict]) -> float:
    """Seconds until the mean curve of the runs reaches `target`; NaN if it never does.

    Linear interpolation between scored steps; never earlier than the first scored step."""
    if not records:
        return math.nan
    _, seconds, metric = curve(records)
    reached = np.flatnonzero(metric >= target)
    if not len(reached):
        return math.nan
    k = reached[0]
    if k == 0:
        return float(seconds[0])
    share = (target - metric[k - 1]) / (metric[k] - metric[k - 1])
    return float(seconds[k - 1] + share * (seconds[k] - seconds[k - 1]))


def best_end(runs: list[list[dict]], clip: str) -> float:
    """Best final delta_avg on a clip among runs of several lengths, means over the seeds; NaN if there is none."""
    ends = [on_clip(records, METRICS[0], clip) for records in runs]
    return max((statistics.mean(end) for end in ends if end), default=math.nan)


def table(runs: Runs, clips: list[str], targets: dict[str, float]) -> str:
    """Markdown table with one row for each preset and run length."""
    rows = []
    for (preset, _), records in runs.items():
        seconds = statistics.mean(values(records, "seconds").values())
        row = [preset, str(records[0]["steps"]), f"{seconds:.0f}"]
        row += [spread(means_of_seeds(values(records, key))) for key in METRICS]
        for clip in clips:
            found = time_to(targets[clip], [r for r in records if r["cell"]["clip"] == clip])
            row.append("never" if math.isnan(found) else f"{found:.0f}")
        rows.append(row)
    return markdown(["preset", "steps", "seconds", "delta_avg", "AJ",
                     *(f"seconds to {targets[clip]:.3f}, {Path(clip).name}" for clip in clips)], rows)


def clip_table(runs: Runs, clips: list[str]) -> str:
    """Markdown table of delta_avg and AJ on every clip: the model alone, tracks that follow optical flow (--follow_flow
    1), and chained optical flow."""
    rows = []
    for (preset, _), records in runs.items():
        for prefix, name in (("", preset), (FOLLOWED, f"{preset}, with the flow")):
            cells = [" / ".join(spread(on_clip(records, prefix + key, clip)) for key in METRICS) for clip in clips]
            rows.append([name, str(records[0]["steps"]), *cells])
    chained = []
    for clip in clips:
        sequence = open_sequence(clip)
        truth, queries, annotation_rows = ground_truth(sequence)
        found = score(baseline_tracks("chain", sequence, queries), truth, annotation_rows, "first")
        chained.append(" / ".join(f"{found[key]:.3f}" for key in METRICS))
    rows.append(["chained flow", "", *chained])
    return markdown(["delta_avg / AJ at the end", "steps", *(Path(clip).name for clip in clips)], rows)


def plot(runs: Runs, path: Path) -> None:
    """Plot delta_avg over seconds and over steps: a line for each preset and run length, means over clips and seeds."""
    presets = list(dict.fromkeys(preset for preset, _ in runs))
    with matplotlib.rc_context(STYLE):
        figure = Figure((9, 3.8), dpi=150, layout="constrained")
        by_time, by_step = figure.subplots(1, 2, sharey=True)
        for (preset, length), records in runs.items():
            steps, seconds, metric = curve(records)
            style = {"color": COLORS[presets.index(preset) % len(COLORS)], "label": preset if length == 0 else None}
            by_time.plot(seconds, metric, ".-", **style)
            by_step.plot(steps, metric, ".-", **style)
        for axes, name in ((by_time, "seconds of training"), (by_step, "steps")):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(name)
            axes.grid(alpha=0.3)
        by_time.set_ylabel("delta_avg, mean over clips and seeds")
        by_time.legend(frameon=False)
        with atomic_path(path) as temporary:
            figure.savefig(temporary)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+", help="config files; the first is what the others are compared with")
    parser.add_argument("--steps", nargs="*", default=[], metavar="PRESET=N,N",
                        help="lengths of the runs of a config file, by its name; default: its own num_iters")
    parser.add_argument("--looks", type=int, default=5, help="points of a curve")
    parser.add_argument("--target", type=float, default=0.0,
                        help="delta_avg to reach; 0: on each clip the best that the first preset ends with")
    parser.add_argument("--out", default="out/convergence", help="folder of the results")
    add_clip_arguments(parser)
    args = parser.parse_args()
    lengths = dict(item.split("=") for item in args.steps)
    clips = clips_of(args)
    cells = {}
    for preset in args.presets:
        own = lengths.get(Path(preset).stem) or file_options(preset).get("num_iters", "100000")
        for k, steps in enumerate(map(int, own.split(","))):
            cells[Path(preset).stem, k] = [Cell(preset, preset, clip, seed, steps, 0.0, args.looks)
                                           for seed in range(1, args.seeds + 1) for clip in clips]
    records, failed = run_missing([cell for group in cells.values() for cell in group], Path(args.out))
    by_cell = {Cell(**record["cell"]): record for record in records}
    runs = {key: [by_cell[cell] for cell in group if cell in by_cell] for key, group in cells.items()}
    runs = {key: found for key, found in runs.items() if found}
    if not runs:
        parser.exit(1, "no run has finished\n")
    first = [found for (preset, _), found in runs.items() if preset == Path(args.presets[0]).stem]
    targets = {clip: args.target or best_end(first, clip) for clip in clips}
    plot(runs, Path(args.out) / "convergence.png")
    finish(parser, [table(runs, clips, targets), clip_table(runs, clips)], Path(args.out) / "convergence.md", failed)


if __name__ == "__main__":
    run(main)
