"""Time of a training step, fast paths against their plain twins, in turns in one process: make bench

Both twins take the same steps on the same batches of a small rendered sequence. The table has the medians, their ratio
and the process's peak memory so far. Machines are noisy: read the ratio.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from configs.options import parse
from loaders.sequence import open_sequence
from preprocessing.pipeline import Method, build_store
from preprocessing.synthetic import write_scene
from trainer import Trainer

SHAPES = {"default, 4 x 64 x 16": ["--num_pairs", "4", "--num_pts", "64", "--num_samples_ray", "16"],
          "demo, 16 x 64 x 8": ["--config", "configs/demo.txt"],
          "original, 4 x 64 x 16": ["--config", "configs/original.txt", "--num_pairs", "4", "--num_pts", "64",
                                    "--num_samples_ray", "16"]}


def trainer(folder: Path, arguments: list[str], fused: bool) -> Trainer:
    """A fresh run with or without the fast paths."""
    out = Trainer(parse("train", [*arguments, "--data_dir", str(folder), "--save_dir", str(folder / "out")]))
    out.model.deform.fused = out.model.field.net.fused = fused
    return out


def step_time(run: Trainer) -> float:
    """Seconds of one step."""
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run.train_step()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="timed steps a twin, after 2 that are not timed")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "bench"
        write_scene(folder, "demo", (128, 128), 10, 0, 16)
        build_store(open_sequence(folder), Method())
        for name, arguments in SHAPES.items():
            twins = {fused: trainer(folder, arguments, fused) for fused in (False, True)}
            times = {False: [], True: []}
            for step in tqdm(range(args.steps + 2), name):
                for fused, run in twins.items():
                    seconds = step_time(run)
                    if step >= 2:
                        times[fused].append(seconds)
            plain, fast = (statistics.median(times[fused]) * 1e3 for fused in (False, True))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            rows.append(f"| {name} | {plain:.0f} | {fast:.0f} | {plain / fast:.2f} | {peak:.2f} |")
    print("| preset, pairs x points x samples | plain, ms | fast, ms | ratio | peak, GiB |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
