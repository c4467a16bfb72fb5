"""Memory planner: estimates the peak memory of training and enables activation checkpointing to stay below a limit.

The peak of a forward and a backward pass is nearly linear in the number of points. It is extrapolated from two small
passes of the actual objective, which include the effects of the backend and of all settings.
"""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from inference.tracker import CHUNK_SAMPLES
from loaders.pair_sampler import Batch
from losses.objective import objective
from losses.schedules import loss_weights
from models.omnimotion import FIELD_PIECE, OmniMotion

log = logging.getLogger("train")
GIB = 2**30
PIECES = (0, 16_384, 4_096, 1_024)  # sizes of a recomputed piece in points, tried in this order; 0: all points at once


@dataclass
class Estimate:
    """Estimated memory in bytes."""
    base: int   # in use before the first step: the process with the frames, or the memory allocated on the GPU
    state: int  # gradients and the optimizer's moments
    step: int   # peak of a forward and a backward pass

    @property
    def total(self) -> int:
        """Peak memory in bytes."""
        return self.base + self.state + self.step

    def __str__(self) -> str:
        return (f"{self.total / GIB:.2f} GiB: {self.base / GIB:.2f} before the first step, {self.state / GIB:.2f} for "
                f"gradients and moments, {self.step / GIB:.2f} for a step")


def plan(trainer) -> Estimate:
    """Estimate the peak memory of a run. If it exceeds `--max_memory`, set the model to recompute activations in the
    backward pass, in the largest pieces that fit, and lower `options.chunk_size` accordingly.

    Results change only by rounding. If no piece size fits, the smallest is used and a warning is logged."""
    model = trainer.model
    options = trainer.options
    limit = int(options.max_memory * GIB)  # bytes; 0: no limit
    first = measure(trainer)
    if not limit or first.total <= limit:
        return first
    for piece in PIECES:
        model.recompute_above = 0
        model.piece = piece
        model.field_piece = min(piece or FIELD_PIECE, FIELD_PIECE)
        options.chunk_size = min(options.chunk_size, max(model.field_piece // CHUNK_SAMPLES, 1))
        estimate = measure(trainer)
        if estimate.total <= limit:
            break
    log.info("--max_memory %g: activations are recomputed in the backward pass, %s points at a time; without it %s",
             options.max_memory, model.piece or "all", first)
    if estimate.total > limit:
        log.warning("--max_memory %g cannot be kept: the least is %s", options.max_memory, estimate)
    return estimate


def measure(trainer) -> Estimate:
    """Estimate the peak memory of a run with the model's current settings. Two passes are measured, with an eighth and
    a quarter of a step's points; piece sizes are scaled by the same factor."""
    model = trainer.model
    options = trainer.options
    pairs = options.num_pairs // trainer.processes.count
    settings = {name: getattr(model, name) for name in ("recompute_above", "piece", "field_piece")}

    def peak(points: int) -> int:
        for name, value in settings.items():
            setattr(model, name, value and max(value * points // options.num_pts, 1))
        return pass_peak(model, pairs, points, options, trainer.device)

    few = max(options.num_pts // 8, 1)
    more = max(options.num_pts // 4, 2)
    try:
        peak_few = peak(few)
        peak_more = peak(more)
    finally:
        for name, value in settings.items():
            setattr(model, name, value)
    slope = (peak_more - peak_few) / (more - few)
    moments = 1 if options.optimizer == "muon" else 2  # values per parameter
    state = 4 * sum(p.numel() for p in model.parameters()) * (1 + moments)
    return Estimate(base_bytes(trainer.device), state, int(peak_more + slope * (options.num_pts - more)))


def base_bytes(device: torch.device) -> int:
    """Bytes in use now: resident memory of this process, or the memory that PyTorch has allocated on the GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # macOS reports only the peak so far

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pass_peak(model: OmniMotion, pairs: int, points: int, options, device: torch.device) -> int:
    """Peak bytes that a forward and a backward pass of the objective allocate, without the parameters' gradients.

    The batch has `pairs` x `points` random points. All loss terms that the options enable are computed."""
    generator = torch.Generator().manual_seed(0)
    largest = torch.tensor([model.config.width - 1, model.config.height - 1])
    pixels = (torch.rand(pairs, points, 2, generator=generator) * largest).to(device)
    # the smoothness term needs a frame before and after each of these
    ids = (1 + torch.arange(2 * pairs, device=device) % max(model.config.num_frames - 2, 1)).view(2, -1)
    jitter = torch.rand(pairs, 1, model.config.num_samples_ray, generator=generator).to(device)
    batch = Batch(*ids, pixels, pixels, torch.rand(pairs, points, 3, generator=generator).to(device),
                  torch.ones(pairs, points, device=device))
    weights = loss_weights(100_000, 0, options.w_smoothness, options.w_depth)
    depth_prior = torch.rand(pairs, points, generator=generator).to(device)

    def once() -> None:
        _, total, _ = objective(model, batch, jitter, weights, depth_prior=depth_prior)
        total.backward()

    try:
        if device.type == "cuda":
            once()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            once()
            return torch.cuda.max_memory_allocated(device) - before
        for p in model.parameters():  # gradients are counted in Estimate.state, so they are allocated before measuring
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silence the profiler on stderr
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            once()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        used = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            used += event.nbytes()
            peak = max(peak, used)
        return peak
    finally:
        for p in model.parameters():
            p.grad = None
