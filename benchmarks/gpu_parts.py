"""The parts of benchmarks.gpu. Each runs in a process of its own: python -m benchmarks.gpu_parts NAME SETTING

Notation
    part     a function of a Setting that returns a Found; an exception is the part's result, too
    GFLOP    10^9 multiplications and additions
"""

import json
import logging
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.step import RUNS, SHAPES, new_trainer, step_gflop, write_sequence
from benchmarks.timing import alternate, seconds_of
from common.errors import UserError
from common.files import read_json, write_json
from common.geometry import regular_grid
from configs.options import parse
from evaluation.tables import COLUMNS
from inference.processes import run_command
from inference.tracker import Tracker
from models.factory import new_model, pick_device
from models.omnimotion import OmniMotion

QUICK_SHAPE = (2, 16, 8)  # pairs, points per pair, samples per ray
QUICK_MODEL = ("--coupling_width 32 --affine_width 16 --affine_layers 3 --field_width 32 --grid_levels 3").split()
STEPS_PER_TIME = 10    # steps, on a GPU, between two synchronizations with it
PRODUCTS_PER_TIME = 20  # the same for matrix products; an idle GPU takes some milliseconds to raise its clock
REPEATS = 5            # timed groups of steps or products
MATRIX_SIDE = 8_192
TOLERANCE = 1e-4       # largest difference to the CPU, as a share of the largest value
START_NOISE = 0.002    # standard deviation of deformation parameters that start at 0, normalized units
FRAMES = 60            # of dense tracking, at
FRAME_SIZE = (480, 854)  # (H, W) pixels
CHUNK = 8_192          # rays at a time
WHOLE_SECONDS = 40     # a whole frame is tracked only if that takes less; otherwise its time is extrapolated
STEP_RUNS = RUNS | {   # name: preset, without fused functions, more options
    "default_triton_bf16": ("default", False, ["--precision", "bf16", "--mlp_backend", "triton"]),
    "default_compiled_bf16": ("default", False, ["--precision", "bf16", "--compile", "inductor"]),
}
OUTPUTS = {            # name: preset, more options
    "default": ("default", ["--mlp_backend", "torch"]),
    "default_triton": ("default", ["--mlp_backend", "triton"]),
    "original": ("original", ["--mlp_backend", "torch"]),
    "fast": ("fast", []),
}


@dataclass(frozen=True)
class Setting:
    """What all parts share."""
    device: str  # cpu | cuda
    folder: str  # for the sequence and the runs
    quick: bool  # small sizes

    @property
    def torch_device(self) -> torch.device:
        """The device; UserError if there is none of this kind."""
        return pick_device(self.device)

    @property
    def sequence(self) -> Path:
        """Folder of the sequence that steps are timed on."""
        return Path(self.folder) / "sequence"

    def model_options(self) -> list[str]:
        """Options of the model's size."""
        return QUICK_MODEL if self.quick else []


@dataclass
class Found:
    """The result of a part."""
    text: str                                             # for the table
    values: dict[str, float] = field(default_factory=dict)  # for the JSON file; "gflop": of `seconds`
    peak_gib: float | None = None                         # largest memory of the device; on a CPU, of the process


class Part(NamedTuple):
    """A part and the time after which it is stopped."""
    run: Callable[[Setting], Found]
    seconds: float
    cuda_only: bool = False


def sequence(setting: Setting) -> Found:
    """Render the sequence that steps are timed on and compute its correspondences, on the CPU."""
    side, num_frames = (64, 6) if setting.quick else (256, 10)
    seconds = seconds_of(lambda: write_sequence(setting.sequence, side, num_frames), torch.device("cpu"))
    return Found(f"{num_frames} frames of {side}x{side} in {seconds:.1f} s", {"seconds": seconds})


def matrix_rate(setting: Setting) -> Found:
    """TFLOP/s of a large matrix product in bf16, tf32 (on CUDA) and float32."""
    device = setting.torch_device
    side = 512 if setting.quick else MATRIX_SIDE
    dtypes = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
    if device.type != "cuda":
        del dtypes["tf32"]
    count = PRODUCTS_PER_TIME if device.type == "cuda" and not setting.quick else 1
    rates = {}
    for name, dtype in dtypes.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)

        def multiply(a=a, b=b, out=out) -> None:
            for _ in range(count):
                torch.mm(a, b, out=out)

        seconds = alternate({name: multiply}, REPEATS, 3, device)[name]
        rates[name] = 2 * count * side**3 / statistics.median(seconds) / 1e12
    text = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
    return Found(f"{text} TFLOP/s", {f"{name}_tflops": rate for name, rate in rates.items()}, peak_memory(device))


def step(setting: Setting, name: str) -> Found:
    """Time and memory of a training step of one of STEP_RUNS."""
    preset, plain, more = STEP_RUNS[name]
    device = setting.torch_device
    shape = QUICK_SHAPE if setting.quick else SHAPES[device.type]
    trainer = new_trainer(setting.sequence, preset, plain, shape, [
        *more, *setting.model_options(), "--device", device.type, "--expname", name, "--no_tensorboard"])
    steps = 1 if setting.quick or device.type == "cpu" else STEPS_PER_TIME
    losses = []

    def train() -> None:
        for _ in range(steps):
            terms, _ = trainer.train_step()
        losses.append(terms["total"])

    seconds = [value / steps for value in alternate({name: train}, REPEATS, 2, device)[name]]
    if not all(torch.isfinite(loss) for loss in losses):
        raise ArithmeticError(f"the loss is not finite: {[float(loss) for loss in losses]}")
    median = statistics.median(seconds)
    values = {"seconds": median, "fastest": min(seconds), "slowest": max(seconds)}
    if preset == "default":
        values["gflop"] = step_gflop(trainer.model, shape)
    return Found(f"{median * 1e3:.2f} ms a step ({min(seconds) * 1e3:.2f} to {max(seconds) * 1e3:.2f})", values,
                 peak_memory(device))


def outputs(setting: Setting, name: str) -> Found:
    """Compare the prediction of a model of OUTPUTS, and its gradients, with those of the same model on the CPU, both in
    float32. ArithmeticError if an output differs by more than TOLERANCE of its largest value."""
    preset, more = OUTPUTS[name]
    device = setting.torch_device
    words = ["--config", f"configs/{preset}.txt", "--precision", "fp32", *setting.model_options()]
    torch.manual_seed(0)
    size, num_frames = (64, 96), 8
    reference = new_model(parse("train", [*words, "--device", "cpu"]), num_frames, size, torch.device("cpu"))
    with torch.no_grad():
        for parameter in reference.deform.parameters():
            if not parameter.any():  # grids start at 0
                parameter.normal_(std=START_NOISE)
    model = new_model(parse("train", [*words, "--device", device.type, *more]), num_frames, size, device)
    model.load_state_dict(reference.state_dict())
    B, N = QUICK_SHAPE[:2] if setting.quick else (4, 128)
    pixels = torch.rand(B, N, 2) * torch.tensor([size[1] - 1.0, size[0] - 1.0])
    ids = torch.randint(num_frames, (2, B))
    jitter = torch.rand(B, 1, reference.config.num_samples_ray)
    expected, expected_gradients = _prediction(reference, pixels, ids, jitter)
    found, found_gradients = _prediction(model, pixels.to(device), ids.to(device), jitter.to(device))
    values = {"outputs": _largest_difference(found, expected),
              "gradients": _largest_difference(found_gradients, expected_gradients)}
    text = f"outputs differ by {values['outputs']:.1e}, gradients by {values['gradients']:.1e} of the largest value"
    if not values["outputs"] <= TOLERANCE:
        raise ArithmeticError(f"{text}: more than {TOLERANCE:g}")
    return Found(text, values, peak_memory(device))


def _prediction(model: OmniMotion, pixels: Tensor, ids: Tensor, jitter: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the training forward pass, and the gradients of a sum over them, on the CPU."""
    prediction = model.predict_pairs(pixels, ids[0], ids[1], jitter)
    parts = [prediction.canonical, prediction.target, prediction.weights, prediction.rgb, prediction.pixels]
    total = sum(((k + 1) * part.sin()).mean() for k, part in enumerate(parts))
    gradients = torch.autograd.grad(total, [*model.parameters()], allow_unused=True)
    return [part.detach().cpu() for part in parts], [g.cpu() for g in gradients if g is not None]


def _largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of two lists of tensors, each as a share of the tensor's largest expected value. Tensors that
    are 0 up to rounding are compared with 1e-6 of the largest value of all. NaN if a value is not a number."""
    least = 1e-6 * max(e.abs().max().item() for e in expected)
    shares = [((f - e).abs().max() / e.abs().max().clamp(min=least)) for f, e in zip(found, expected, strict=True)]
    return torch.stack(shares).max().item()  # max() of tensors keeps NaN


def demo(setting: Setting) -> Found:
    """The steps of scripts/demo.sh, with their times and the demo's metrics."""
    root = Path(setting.folder)
    data = ["--data_dir", str(root / "demo")]
    run = ["--config", "configs/demo.txt", *data, "--save_dir", str(root / "out"), "--device", setting.device]
    size, train = [], []
    if setting.quick:
        size = ["--size", "64", "64", "--num_frames", "6"]
        train = ["--num_iters", "20", "--grid_levels", "3"]
    metrics = root / "metrics.json"
    commands = {
        "scene": ["-m", "preprocessing", "synthetic", *data, *size],
        "preprocessing": ["-m", "preprocessing", *data],
        "training": ["train.py", *run, *train, "--no_tensorboard"],
        "score": ["eval.py", *run, *train, "--annotations", str(root / "demo/annotations.npz"), "--query_mode", "first",
                  "--out", str(metrics)],
        "pictures": ["viz.py", *run, *train],
    }
    seconds = {}
    for name, words in commands.items():
        start = time.perf_counter()
        run_command(words)
        seconds[name] = time.perf_counter() - start
    scores = read_json(metrics, "")
    found = {title: scores[key] for key, title in COLUMNS.items() if key in scores}
    text = ", ".join(f"{title} {value:.3f}" for title, value in found.items())
    times = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    return Found(f"{text}; {sum(seconds.values()):.0f} s ({times})", found | {"seconds": seconds})


@torch.no_grad()
def dense(setting: Setting, preset: str) -> Found:
    """Time to track every pixel of a frame through all frames (positions, depths, occlusion scores) with a new model,
    by the Tracker, which benchmarks.inference compares with a slower way."""
    device = setting.torch_device
    size, num_frames, chunk = ((24, 32), 4, 256) if setting.quick else (FRAME_SIZE, FRAMES, CHUNK)
    options = parse("eval", ["--config", f"configs/{preset}.txt", "--device", device.type, "--chunk_size", str(chunk),
                             *setting.model_options()])
    tracker = Tracker(new_model(options, num_frames, size, device).eval(), options.use_max_loc, options.occlusion_th,
                      options.chunk_size)
    pixels = regular_grid(size, 1, 0).reshape(-1, 2)
    queries = np.column_stack([np.full(len(pixels), num_frames // 2), pixels[:, ::-1]]).astype(np.float32)
    some = queries[np.linspace(0, len(queries) - 1, 2 * options.chunk_size).astype(int)]
    tracker.track(some)  # warm-up: kernels are compiled
    seconds = seconds_of(partial(tracker.track, some), device) * len(queries) / len(some)
    how = f"extrapolated from {len(some)} pixels"
    if seconds < WHOLE_SECONDS:
        seconds = seconds_of(partial(tracker.track, queries), device)
        how = "measured"
    return Found(f"{len(queries)} pixels of {size[1]}x{size[0]} through {num_frames} frames: {seconds:.1f} s ({how})",
                 {"seconds": seconds, "pixels": len(queries), "measured_pixels": len(
                     queries if how == "measured" else some)}, peak_memory(device))


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: PyTorch's on the GPU, else the resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# In the order in which they run: what others need, then what is most likely to work; the compiled step, which compiles
# for long, is last and may take what time is left. The limits add up to more than
# benchmarks.gpu may take in all, since few parts should reach theirs.
PARTS = {
    "sequence": Part(sequence, 60),
    "matrix rate": Part(matrix_rate, 40),
    **{f"step: {name}": Part(partial(step, name=name), 60) for name in RUNS},
    "step: default_triton_bf16": Part(partial(step, name="default_triton_bf16"), 90, cuda_only=True),
    **{f"outputs: {name}": Part(partial(outputs, name=name), 45, cuda_only="triton" in name) for name in OUTPUTS},
    "demo": Part(demo, 180),
    "dense tracks: default": Part(partial(dense, preset="default"), 75),
    "dense tracks: fast": Part(partial(dense, preset="fast"), 60),
    "step: default_compiled_bf16": Part(partial(step, name="default_compiled_bf16"), 300, cuda_only=True),
}


def main(name: str, setting: Setting, result: Path) -> None:
    """Run a part and write its Found, or {"error", "details"}, to the file `result`."""
    torch.set_flush_denormal(True)  # as train.py does
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        content = asdict(PARTS[name].run(setting))
    except (Exception, SystemExit) as error:  # the other parts go on
        line = " ".join(str(error).split())
        if not isinstance(error, UserError | ArithmeticError):
            line = f"{type(error).__name__}: {line}"
        content = {"error": line, "details": traceback.format_exc()}
    write_json(result, content)


if __name__ == "__main__":
    main(sys.argv[1], Setting(**json.loads(sys.argv[2])), Path(sys.argv[3]))
