"""Variation of results over seeds: python -m benchmarks.seeds --config configs/demo.txt --data_dir seqs/demo

Trains the same options with several seeds, one process for each run. Prints the results of every seed, their mean,
standard deviation and range: the metrics if --annotations is given, the flow error against the stored correspondences,
and the round-trip error. --compare precision=fp32,bf16 does this for each value of an option. A finished run is not
repeated; an interrupted run is resumed. Other options of train.py can follow, after `--`.
"""

import json
import subprocess
import sys
import time

import torch

from benchmarks.tables import extent, spread
from common.cli import Parser
from common.files import write_json
from configs.options import parse, run_dir
from evaluation.tables import COLUMNS, markdown
from inference.load_run import load_run
from models.coords import denormalize_pixels

DIAGNOSIS = {  # entries of diagnosis.json (see training/failure_modes.py) and titles of their columns
    "error": "flow error, px",
    "near_missed": "missed, adjacent frames",
    "far_missed": "missed, distant frames",
    "hidden": "behind another surface",
    "twice": "in the volume twice",
    "not_invertible": "not invertible",
}


def train_and_score(arguments: list[str], annotations: str = "") -> dict:
    """Run train.py and eval.py with `arguments`.

    Returns the metrics (if annotations are given), the entry of diagnosis.json for the last step ("diagnosis") and the
    training time ("seconds"). They are saved in the run's folder: a finished run is not repeated, and an interrupted
    run is resumed."""
    folder = run_dir(parse("train", arguments))
    result = folder / "result.json"
    if not result.is_file():
        start = time.perf_counter()
        subprocess.run([sys.executable, "train.py", *arguments, "--i_img", "0", "--no_tensorboard"], check=True)
        out = {"seconds": time.perf_counter() - start}
        if annotations:
            subprocess.run([sys.executable, "eval.py", *arguments, "--annotations", annotations, "--query_mode",
                            "first", "--out", str(folder / "metrics.json")], check=True)
            out |= json.loads((folder / "metrics.json").read_text())
        diagnosis = folder / "diagnosis.json"
        out["diagnosis"] = json.loads(diagnosis.read_text())[-1] if diagnosis.is_file() else None
        write_json(result, out)
    return json.loads(result.read_text())


@torch.no_grad()
def round_trip(arguments: list[str]) -> float:
    """Largest distance in pixels by which points of the first frame move when the trained networks map them to the
    canonical volume and back."""
    model = load_run(parse("eval", arguments)).tracker.model
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 2_000, 2, generator=generator) * (torch.tensor(model.size[::-1]) - 1)
    maps, x = model.maps(torch.tensor([0])), model.lift(pixels)
    back = maps.to_local(maps.rays_to_canonical(x).flatten(1, 2)).view_as(x)
    return (denormalize_pixels(back[..., :2], model.size) - pixels[:, :, None]).norm(dim=-1).max().item()


def seed_table(runs: list[dict], trips: list[float]) -> str:
    """A row for each seed, then the mean ± standard deviation and the range of every column.

    runs: results of `train_and_score` for the seeds 1, 2, ...; trips: their round-trip errors, pixels."""
    columns = {title: [run[key] for run in runs] for key, title in COLUMNS.items() if all(key in run for run in runs)}
    if all(run["diagnosis"] for run in runs):
        columns |= {title: [run["diagnosis"][key] for run in runs] for key, title in DIAGNOSIS.items()
                    if all(key in run["diagnosis"] for run in runs)}
    columns["round trip, px"] = trips
    columns["training, s"] = [run["seconds"] for run in runs]
    rows = []
    for k, run in enumerate(runs):
        warnings = [line.split(":")[0] for line in (run["diagnosis"] or {"warnings": []})["warnings"]]
        rows.append([str(k + 1), *(f"{values[k]:.4f}" for values in columns.values()), "; ".join(warnings)])
    rows.append(["mean ± standard deviation", *(spread(values, ".4f") for values in columns.values()), ""])
    rows.append(["range", *(extent(values, ".4f") for values in columns.values()), ""])
    return markdown(["seed", *columns, "warnings"], rows)


def main() -> None:
    torch.set_flush_denormal(True)  # as train.py does
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/default.txt", help="preset")
    parser.add_argument("--data_dir", required=True, help="sequence folder")
    parser.add_argument("--annotations", default="", help="annotations (.npz)")
    parser.add_argument("--save_dir", default="out/seeds", help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, 1 to this")
    parser.add_argument("--compare", default="", metavar="OPTION=A,B", help="values of an option to compare")
    parser.add_argument("options", nargs="*", help="more options of train.py, after --")
    args = parser.parse_args()
    option, _, values = args.compare.partition("=")
    for value in values.split(","):
        more = [f"--{option}", value, *args.options] if option else args.options
        arguments = [["--config", args.config, "--data_dir", args.data_dir, "--save_dir", args.save_dir, "--expname",
                      f"{value or 'seed'}_{seed}", "--seed", str(seed), *more] for seed in range(1, args.seeds + 1)]
        runs = [train_and_score(words, args.annotations) for words in arguments]
        if option:
            print(f"\n{option} {value}\n")
        print(seed_table(runs, list(map(round_trip, arguments))))


if __name__ == "__main__":
    main()
