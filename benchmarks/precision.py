"""Error of bf16 products: python -m benchmarks.precision --data_dir seqs/demo --annotations seqs/demo/annotations.npz

Trains a preset with several seeds in float32 and in bf16, with one process for each run, and scores the tracks. Also
measures the round-trip error: how far pixels move when the trained networks map them to the canonical volume and back.
A finished run is not repeated.
"""

import statistics

import torch

from benchmarks.experiments import spread, train_and_score
from common.cli import Parser
from configs.options import parse
from evaluation.scoring import COLUMNS
from inference.load_run import load_run
from models.coords import denormalize_pixels


@torch.no_grad()
def round_trip(arguments: list[str]) -> float:
    """Largest round-trip error in pixels, over samples of the first frame mapped forward and back."""
    tracker = load_run(parse("eval", arguments)).tracker
    model, generator = tracker.model, torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 2_000, 2, generator=generator) * (torch.tensor(model.size[::-1]) - 1)
    maps, x = model.maps(torch.tensor([0])), model.lift(pixels)
    back = maps.to_local(maps.rays_to_canonical(x).flatten(1, 2)).view_as(x)
    return (denormalize_pixels(back[..., :2], model.size) - pixels[:, :, None]).norm(dim=-1).max().item()


def main() -> None:
    torch.set_flush_denormal(True)  # as train.py does
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/small.txt", help="preset")
    parser.add_argument("--data_dir", required=True, help="sequence folder")
    parser.add_argument("--annotations", required=True, help="annotations (.npz)")
    parser.add_argument("--save_dir", default="out/precision", help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs a precision")
    parser.add_argument("--num_iters", type=int, default=0, help="steps; 0: the preset's")
    args = parser.parse_args()
    rows, trips = {}, {}
    for seed in range(1, args.seeds + 1):
        for precision in ("fp32", "bf16"):
            name = f"{precision}_{seed}"
            arguments = ["--config", args.config, "--data_dir", args.data_dir, "--save_dir", args.save_dir, "--expname",
                         name, "--seed", str(seed), "--precision", precision, "--device", "cpu"]
            arguments += ["--num_iters", str(args.num_iters)] if args.num_iters else []
            rows.setdefault(precision, []).append(train_and_score(arguments, args.annotations))
            trips.setdefault(precision, []).append(round_trip(arguments))
    print(f"| precision | {' | '.join(COLUMNS.values())} | training, s | forward then inverse, px |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for precision, runs in rows.items():
        cells = [spread([run[key] for run in runs]) for key in COLUMNS]
        cells += [f"{statistics.mean(run['seconds'] for run in runs):.0f}", f"{max(trips[precision]):.5f}"]
        print(f"| {precision} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
