"""Time of a training step with and without the fused functions: make bench

All runs train on the same batches of a small rendered sequence, alternately in one process:
    original_plain      OmniMotion's network and losses (configs/original.txt), without fused functions, float32
    default_plain       the default preset, without fused functions, float32
    default_fused_fp32  the default preset with fused functions, float32
    default_fused_bf16  the same with bf16 products, which is the default on hardware that supports them
    fast                the fast preset, which is a different model
"Without fused functions" means separate PyTorch operations for each layer and Adam without its fused kernel. Absolute
times vary between runs; compare the ratios of medians. GFLOP counts the matrix products of a fused default step.
"""

import logging
import resource
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.tables import extent
from benchmarks.timing import alternate
from common.cli import Parser
from common.files import write_json
from configs.options import parse
from evaluation.tables import markdown
from loaders.sequence import open_sequence
from models.factory import pick_device
from models.kernels.backend import choose_products
from models.omnimotion import OmniMotion
from preprocessing.pipeline import Method, build_store
from preprocessing.synthetic.render import write_scene
from training.trainer import Trainer

SHAPES = {"cpu": (4, 64, 16), "cuda": (8, 256, 32)}  # pairs, points per pair, samples per ray
RUNS = {  # name: preset, without fused functions, more options
    "original_plain": ("original", True, ["--precision", "fp32", "--mlp_backend", "torch"]),
    "default_plain": ("default", True, ["--precision", "fp32", "--mlp_backend", "torch"]),
    "default_fused_fp32": ("default", False, ["--precision", "fp32"]),
    "default_fused_bf16": ("default", False, ["--precision", "bf16"]),
    "fast": ("fast", False, []),
}


def write_sequence(folder: Path, side: int = 256, num_frames: int = 10) -> None:
    """Render a scene of `side` x `side` pixels and compute its correspondences."""
    write_scene(folder, "demo", (side, side), num_frames, 0, 16)
    build_store(open_sequence(folder), Method())


def make_plain(trainer: Trainer) -> None:
    """Turn the fused functions and the fused optimizer kernel off."""
    trainer.model.deform.fused = trainer.model.field.net.fused = False
    if hasattr(trainer.model.time_latent.network, "fused"):
        trainer.model.time_latent.network.fused = False
    for optimizer in trainer.optimizers.values():
        for group in optimizer.param_groups:
            group.update(fused=False, foreach=trainer.device.type == "cuda")  # PyTorch's defaults


def new_trainer(folder: Path, preset: str, plain: bool, shape: tuple[int, int, int], more: list[str]) -> Trainer:
    """A new trainer of a preset with the batch `shape` (pairs, points per pair, samples per ray)."""
    sizes = zip(("--num_pairs", "--num_pts", "--num_samples_ray"), map(str, shape), strict=True)
    trainer = Trainer(parse("train", [
        "--config", f"configs/{preset}.txt", "--data_dir", str(folder), "--save_dir", str(folder / "out"),
        *(word for option in sizes for word in option), *more]))
    if plain:
        make_plain(trainer)
    return trainer


def step_gflop(model: OmniMotion, shape: tuple[int, int, int]) -> float:
    """GFLOP (10^9 multiplications and additions) of the matrix products of a fused step, forward and backward.

    Counts two passes of all samples through the coupling layers, and one through the affine map and the field."""
    def chain(layers) -> int:
        return sum(layer.in_features * layer.out_features for layer in layers if isinstance(layer, nn.Linear))

    couplings = 0
    for layer in model.deform.layers:
        width = layer.mlp[0].out_features
        couplings += layer.projection[0].in_features * width + width * width + chain(layer.mlp[2:])
    field = model.field.net
    filters = sum(2 * f.mu.numel() for f in field.filters)
    per_sample = 2 * couplings + chain(model.deform.affine.mlp) + filters + chain([*field.linear, field.output_linear])
    return 3 * 2 * per_sample * shape[0] * shape[1] * shape[2] / 1e9


def profile_table(trainer: Trainer, steps: int = 5, rows: int = 12) -> str:
    """Markdown table of the operators that take the largest share of a step."""
    with torch.profiler.profile() as profile:
        for _ in range(steps):
            trainer.train_step()
    operators = sorted(profile.key_averages(), key=lambda op: -op.self_cpu_time_total)
    total = sum(op.self_cpu_time_total for op in operators)
    return markdown(["operator", "calls a step", "share of a step"], [
        [op.key, f"{op.count / steps:.0f}", f"{op.self_cpu_time_total / total:.1%}"] for op in operators[:rows]])


def measure(folder: Path, device: torch.device, steps: int, profile: bool) -> tuple[dict[str, list[float]], float]:
    """Seconds of each step of each run, and GFLOP of a fused step.

    The key "sampler" has the seconds of drawing a batch for the bf16 run."""
    shape = SHAPES[device.type]
    runs = {name: new_trainer(folder, preset, plain, shape, more) for name, (preset, plain, more) in RUNS.items()}
    bf16 = runs["default_fused_bf16"]
    work = {name: run.train_step for name, run in runs.items()}
    work["sampler"] = partial(bf16.sampler.batch, 9, lambda distance: 1.0)
    times = alternate(work, steps, 3, device)
    if profile:
        print(profile_table(bf16))
    return times, step_gflop(runs["default_plain"].model, shape)


def main() -> None:
    torch.set_flush_denormal(True)  # as train.py does
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15, help="timed steps a run, after 3 that are not timed")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", default="out/bench/step.json", help="file for the medians")
    parser.add_argument("--profile", action="store_true", help="also print where the time of a bf16 step goes")
    args = parser.parse_args()
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "bench"
        write_sequence(folder)
        times, gflop = measure(folder, device, args.steps, args.profile)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    sampler = medians.pop("sampler")
    write_json(args.out, medians)
    products = choose_products("bf16", "auto", device)
    maker = ("the C++ kernels" if products.native else
             "float32 products of rounded operands" if products.emulated else "PyTorch")
    shape = " x ".join(map(str, SHAPES[device.type]))
    print(f"{device.type}, {torch.get_num_threads()} threads, {shape} pairs x points x samples, {args.steps} steps; "
          f"bf16 by {maker}")
    print(markdown(
        ["run", "median, ms", "fastest to slowest", "x faster than default plain", "than original plain"],
        [[name, f"{median * 1e3:.0f}", extent([1e3 * seconds for seconds in times[name]], ".0f"),
          f"{medians['default_plain'] / median:.2f}", f"{medians['original_plain'] / median:.2f}"]
         for name, median in medians.items()]))
    fast = medians["default_fused_bf16"]
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30
    print(f"default_fused_bf16: sampler {sampler / fast:.1%} of a step; {gflop:.0f} GFLOP, "
          f"{gflop / fast:.0f} GFLOP/s; peak memory of all runs together {peak:.2f} GiB")


if __name__ == "__main__":
    main()
