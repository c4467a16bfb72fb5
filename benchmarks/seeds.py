"""Variation of results over seeds: python -m benchmarks.seeds --config configs/demo.txt --data_dir seqs/demo

Trains the same options with several seeds, one process for each run. Prints the metrics of every seed, their mean,
standard deviation and range. Tracks are scored if --annotations is given; the flow error against the stored
correspondences is always printed. A finished run is not repeated; an interrupted run is resumed. Other options of
train.py can follow, after `--`.
"""

from benchmarks.experiments import spread, train_and_score
from common.cli import Parser
from evaluation.scoring import COLUMNS

DIAGNOSIS = {"error": "flow error, px", "near_missed": "missed, adjacent", "far_missed": "missed, distant",
       "hidden": "hidden", "twice": "twice"}


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/default.txt", help="preset")
    parser.add_argument("--data_dir", required=True, help="sequence folder")
    parser.add_argument("--annotations", default="", help="annotations (.npz)")
    parser.add_argument("--save_dir", default="out/seeds", help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, 1 to this")
    parser.add_argument("options", nargs="*", help="more options of train.py, after --")
    args = parser.parse_args()
    runs = {}
    for seed in range(1, args.seeds + 1):
        arguments = ["--config", args.config, "--data_dir", args.data_dir, "--save_dir", args.save_dir, "--expname",
                     f"seed_{seed}", "--seed", str(seed), *args.options]
        runs[seed] = train_and_score(arguments, args.annotations)
    print_table(runs)


def print_table(runs: dict[int, dict]) -> None:
    """A row for each seed, then the mean ± standard deviation and the range of every column."""
    columns = {title: [run[key] for run in runs.values()] for key, title in COLUMNS.items()
               if all(key in run for run in runs.values())}
    if all(run["diagnosis"] for run in runs.values()):
        columns |= {title: [run["diagnosis"][key] for run in runs.values()] for key, title in DIAGNOSIS.items()}
    print(f"| seed | {' | '.join(columns)} | warnings |")
    print("|---" * (len(columns) + 2) + "|")
    for k, (seed, run) in enumerate(runs.items()):
        warnings = [line.split(":")[0] for line in (run["diagnosis"] or {"warnings": []})["warnings"]]
        print(f"| {seed} | {' | '.join(f'{values[k]:.3f}' for values in columns.values())} | {'; '.join(warnings)} |")
    print(f"| mean ± standard deviation | {' | '.join(map(spread, columns.values()))} | |")
    print(f"| range | {' | '.join(f'{min(v):.3f} to {max(v):.3f}' for v in columns.values())} | |")


if __name__ == "__main__":
    main()
