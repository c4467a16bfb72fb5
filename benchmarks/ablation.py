"""Effect of each modification on accuracy: python -m benchmarks.ablation [--clips seqs/bear] (make ablation)

Each preset in configs/ablation/ changes one thing in base.txt of that folder. Each preset is trained on every clip with
every seed, for the same number of steps (--steps) or the same time (--seconds). Rendered clips have 12 frames. Writes
OUT/ablation.csv (one row for each run), ablation.md and ablation.png. An interrupted benchmark can be run again; it
repeats only missing runs.

The table has the mean over clips and seeds, ± the standard deviation over seeds of the mean over clips. It also has the
mean difference from the base on the same clips and seeds, ± the standard error over these pairs.
"""

import argparse
import csv
import io
import logging
import math
import statistics
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.experiments import Cell, add_clip_arguments, clips_of, file_options, run_missing, spread
from common.cli import Parser, run
from common.files import atomic_path, write_text
from evaluation.plots import STYLE
from evaluation.scoring import COLUMNS

PRESETS = Path("configs/ablation")
BASE = PRESETS / "base.txt"
MAIN = "average_pts_within_thresh"  # metric of the plot


def values(records: list[dict], key: str) -> dict[tuple[str, int], float]:
    """A metric at the end of each run, or its "seconds", "steps" or "peak_bytes", by (clip, seed)."""
    return {(record["cell"]["clip"], record["cell"]["seed"]): record.get(key, record["curve"][-1].get(key))
            for record in records if key in record or key in record["curve"][-1]}


def means_of_seeds(by_clip_and_seed: dict[tuple[str, int], float]) -> list[float]:
    """The mean over the clips, for each seed."""
    seeds = sorted({seed for _, seed in by_clip_and_seed})
    return [statistics.mean(v for (_, s), v in by_clip_and_seed.items() if s == seed) for seed in seeds]


def difference(values_: dict, base: dict) -> tuple[float, float] | None:
    """Mean difference from the base over the common (clip, seed) pairs, and its standard error.

    None if no pair is common; the standard error of a single pair is NaN."""
    pairs = [values_[key] - base[key] for key in values_.keys() & base.keys()]
    if not pairs:
        return None
    return statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan


def table(groups: dict[str, list[dict]], base: str) -> list[str]:
    """Markdown table with one row for each preset, the base first."""
    lines = ["| preset | " + " | ".join(COLUMNS.values()) + " | delta_avg against base | steps | seconds | peak, GiB |",
             "|---" * (len(COLUMNS) + 5) + "|"]
    for name, records in groups.items():
        cells = [spread(means_of_seeds(values(records, key))) for key in COLUMNS]
        against = difference(values(records, MAIN), values(groups[base], MAIN)) if name != base else None
        cells.append(f"{against[0]:+.3f} ± {against[1]:.3f}" if against else "")
        cells += [f"{statistics.mean(values(records, key).values()):.0f}" for key in ("steps", "seconds")]
        cells.append(f"{max(values(records, 'peak_bytes').values()) / 2**30:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def clip_table(groups: dict[str, list[dict]]) -> list[str]:
    """Markdown table of delta_avg for every preset and clip."""
    clips = list(dict.fromkeys(record["cell"]["clip"] for records in groups.values() for record in records))
    lines = ["| delta_avg | " + " | ".join(Path(clip).name for clip in clips) + " |", "|---" * (len(clips) + 1) + "|"]
    for name, records in groups.items():
        found = values(records, MAIN)
        lines.append(f"| {name} | " + " | ".join(
            spread([v for (c, _), v in sorted(found.items()) if c == clip]) for clip in clips) + " |")
    return lines


def write_csv(records: list[dict], path: Path) -> None:
    """Write a CSV file with one row for each run."""
    rows = [{"preset": Path(r["cell"]["preset"]).stem, "clip": Path(r["cell"]["clip"]).name, "seed": r["cell"]["seed"],
             "steps": r["steps"], "seconds": round(r["seconds"], 1), "peak_bytes": r["peak_bytes"],
             **{k: v for k, v in r["curve"][-1].items() if k not in ("step", "seconds")}} for r in records]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def plot(groups: dict[str, list[dict]], base: str, path: Path) -> None:
    """Plot each preset's difference from the base in delta_avg.

    A small dot is one clip and seed; the large dot is the mean, with its standard error."""
    names = [name for name in groups if name != base][::-1]
    reference = values(groups[base], MAIN)
    with matplotlib.rc_context(STYLE):
        figure = Figure((7, 1.2 + 0.28 * len(names)), dpi=150, layout="constrained")
        axes = figure.subplots()
        for y, name in enumerate(names):
            found = values(groups[name], MAIN)
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
    parser.add_argument("--presets", default="", help="comma-separated names in configs/ablation; default: all")
    parser.add_argument("--steps", type=int, default=0, help="length of every run; 0: the base's own")
    parser.add_argument("--seconds", type=float, default=0.0, help="time of every run, instead of --steps")
    parser.add_argument("--out", default="out/ablation", help="folder of the results")
    add_clip_arguments(parser)
    parser.set_defaults(num_frames=12, chain="")  # the settings with which docs/ablation.md was measured
    args = parser.parse_args()
    known = {path.stem: str(path) for path in sorted(PRESETS.glob("*.txt")) if path != BASE}
    names = [name for name in args.presets.split(",") if name] or list(known)
    if unknown := set(names) - known.keys():
        parser.error(f"no preset '{min(unknown)}' in {PRESETS}: choose among {', '.join(known)}")
    presets = [args.base, *(known[name] for name in names)]
    steps = 0 if args.seconds else args.steps or int(file_options(args.base)["num_iters"])
    clips, out = clips_of(args), Path(args.out)
    cells = [Cell(preset, args.base, clip, seed, steps, args.seconds)
             for seed in range(1, args.seeds + 1) for clip in clips for preset in presets]
    records, failed = run_missing(cells, out)
    groups = {Path(preset).stem: [r for r in records if r["cell"]["preset"] == preset] for preset in presets}
    groups = {name: found for name, found in groups.items() if found}
    base = Path(args.base).stem
    if base not in groups:
        parser.exit(1, "no run of the base has finished: there is nothing to compare with\n")
    text = "\n".join([*table(groups, base), "", *clip_table(groups)])
    write_text(out / "ablation.md", text + "\n")
    write_csv(records, out / "ablation.csv")
    plot(groups, base, out / "ablation.png")
    print(text)
    parser.exit(1 if failed else 0, f"failed: {', '.join(failed)}\n" if failed else "")


if __name__ == "__main__":
    run(main)
