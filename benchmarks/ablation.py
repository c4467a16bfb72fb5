"""Effect of each modification on accuracy: python -m benchmarks.ablation [--clips seqs/bear] (make ablation)

Each preset in configs/ablation/ changes one thing in base.txt of that folder; those in configs/ablation/fast/ are for
`--base configs/fast.txt --folder configs/ablation/fast`. Each preset is trained on every clip with every seed, for the
same number of steps (--steps) or the same time (--seconds). Rendered clips have 12 frames. Writes OUT/ablation.md,
ablation.png and OUT/cells/*.json (one file for each run). An interrupted benchmark can be run again; it repeats only
missing runs.

The table has the mean over clips and seeds, ± the standard deviation over seeds of the mean over clips. It also has the
mean difference from the base on the same clips and seeds, ± the standard error over these pairs; the last columns are
of tracks that combine the model with optical flow (--follow_flow).
"""

import argparse
import logging
import math
import statistics
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.experiments import (
    FOLLOWED,
    Cell,
    add_clip_arguments,
    clips_of,
    file_options,
    finish,
    means_of_seeds,
    on_clip,
    run_missing,
    values,
)
from benchmarks.tables import spread
from common.cli import Parser, run
from common.files import atomic_path
from evaluation.plots import STYLE
from evaluation.tables import COLUMNS, markdown

PRESETS = Path("configs/ablation")
BASE = PRESETS / "base.txt"
METRIC = "average_pts_within_thresh"  # delta_avg, which the presets are compared by


def difference(values_: dict, base: dict) -> tuple[float, float] | None:
    """Mean difference from the base over the common (clip, seed) pairs, and its standard error.

    None if no pair is common; the standard error of a single pair is NaN."""
    pairs = [values_[key] - base[key] for key in values_.keys() & base.keys()]
    if not pairs:
        return None
    return statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan


def table(groups: dict[str, list[dict]], base: str) -> str:
    """Markdown table with one row for each preset, the base first."""
    rows = []
    for name, records in groups.items():
        cells = [spread(means_of_seeds(values(records, key))) for key in COLUMNS]
        cells.append(against_base(records, groups[base], METRIC))
        cells += [f"{statistics.mean(values(records, key).values()):.0f}" for key in ("steps", "seconds")]
        cells.append(f"{max(values(records, 'peak_bytes').values()) / 2**30:.2f}")
        cells.append(spread(means_of_seeds(values(records, FOLLOWED + METRIC))))
        cells.append(against_base(records, groups[base], FOLLOWED + METRIC))
        rows.append([name, *cells])
    return markdown(
        ["preset", *COLUMNS.values(), "delta_avg against base", "steps", "seconds", "peak, GiB",
         "delta_avg with flow", "against base"], rows)


def against_base(records: list[dict], base: list[dict], key: str) -> str:
    """`difference` of a metric as a table cell; empty for the base itself."""
    against = difference(values(records, key), values(base, key)) if records is not base else None
    return f"{against[0]:+.3f} ± {against[1]:.3f}" if against else ""


def clip_table(groups: dict[str, list[dict]]) -> str:
    """Markdown table of delta_avg for every preset and clip."""
    clips = list(dict.fromkeys(record["cell"]["clip"] for records in groups.values() for record in records))
    return markdown(["delta_avg", *(Path(clip).name for clip in clips)], [
        [name, *(spread(on_clip(records, METRIC, clip)) for clip in clips)] for name, records in groups.items()])


def plot(groups: dict[str, list[dict]], base: str, path: Path) -> None:
    """Plot each preset's difference from the base in delta_avg.

    A small dot is one clip and seed; the large dot is the mean, with its standard error."""
    names = [name for name in groups if name != base][::-1]
    reference = values(groups[base], METRIC)
    with matplotlib.rc_context(STYLE):
        figure = Figure((7, 1.2 + 0.28 * len(names)), dpi=150, layout="constrained")
        axes = figure.subplots()
        for y, name in enumerate(names):
            found = values(groups[name], METRIC)
            dots = [found[key] - reference[key] for key in found.keys() & reference.keys()]
            axes.plot(dots, [y] * len(dots), ".", color="#9db8d2", markersize=4)
            mean, error = difference(found, reference) or (math.nan, math.nan)
            axes.errorbar(mean, y, xerr=error, fmt="o", color="#0b5fa5", markersize=5, capsize=3)
        axes.axvline(0, color="0.4", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel=f"delta_avg minus that of {base}, same clip and seed", ylim=(-0.7, len(names) - 0.3))
        axes.grid(axis="x", alpha=0.3)
        with atomic_path(path) as temporary:
            figure.savefig(temporary)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(BASE), help="config file that the presets change")
    parser.add_argument("--folder", default=str(PRESETS), help="folder of the presets")
    parser.add_argument("--presets", default="", help="comma-separated names in the folder; default: all")
    parser.add_argument("--steps", type=int, default=0, help="length of every run; 0: the base's own")
    parser.add_argument("--seconds", type=float, default=0.0, help="time of every run, instead of --steps")
    parser.add_argument("--out", default="out/ablation", help="folder of the results")
    add_clip_arguments(parser)
    parser.set_defaults(num_frames=12, chain="")  # the settings with which docs/ablation.md was measured
    args = parser.parse_args()
    known = {path.stem: str(path) for path in sorted(Path(args.folder).glob("*.txt")) if path != BASE}
    names = [name for name in args.presets.split(",") if name] or list(known)
    if unknown := set(names) - known.keys():
        parser.error(f"no preset '{min(unknown)}' in {args.folder}: choose among {', '.join(known)}")
    presets = [args.base, *(known[name] for name in names)]
    steps = 0 if args.seconds else args.steps or int(file_options(args.base)["num_iters"])
    clips = clips_of(args)
    out = Path(args.out)
    cells = [Cell(preset, args.base, clip, seed, steps, args.seconds)
             for seed in range(1, args.seeds + 1) for clip in clips for preset in presets]
    records, failed = run_missing(cells, out)
    groups = {Path(preset).stem: [r for r in records if r["cell"]["preset"] == preset] for preset in presets}
    groups = {name: found for name, found in groups.items() if found}
    base = Path(args.base).stem
    if base not in groups:
        parser.exit(1, "no run of the base has finished: there is nothing to compare with\n")
    plot(groups, base, out / "ablation.png")
    finish(parser, [table(groups, base), clip_table(groups)], out / "ablation.md", failed)


if __name__ == "__main__":
    run(main)
