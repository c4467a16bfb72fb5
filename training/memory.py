"""How much memory training will take, and how to keep to a limit.

Notation
    n        samples of a step: pairs x points x samples on a ray
    base     what is there before the first step: the process with the frames, or what is allocated on the GPU
    state    what parameters will need besides themselves: gradients, the optimizer's moments, the last good state
    peak(n)  the most that a forward and a backward pass hold, nearly a straight line: two small passes are measured

A pass of the model as it is, is measured, so that any backend and any setting is counted as it is.
"""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from losses.losses import objective
from losses.schedules import loss_weights
from models.omnimotion import FIELD_PIECE, OmniMotion

log = logging.getLogger("train")
GIB = 2**30
PIECES = (0, 16_384, 4_096, 1_024)  # points a piece, tried in turn; 0: all of a layer's


@dataclass
class Estimate:
    """Bytes."""
    base: int
    state: int
    step: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.base + self.state + self.step

    def __str__(self) -> str:
        return (f"{self.total / GIB:.2f} GiB: {self.base / GIB:.2f} before the first step, {self.state / GIB:.2f} for "
                f"gradients and moments, {self.step / GIB:.2f} for a step")


def plan(trainer, limit: int) -> Estimate:
    """Estimate the peak of a trainer's run and, if it is more than `limit` bytes (0: none), have its model compute
    activations again, and in pieces, so that it fits; results stay the same but for rounding. The smallest pieces are
    taken even where they do not fit, which a warning says."""
    model, options = trainer.model, trainer.options
    estimate = first = measure(trainer)
    pieces = iter(PIECES)
    while limit and estimate.total > limit and (piece := next(pieces, None)) is not None:
        model.recompute_above, model.piece, model.field_piece = 0, piece, min(piece or FIELD_PIECE, FIELD_PIECE)
        options.chunk_size = min(options.chunk_size, max(model.field_piece // options.num_samples_ray, 1))
        estimate = measure(trainer)
    if estimate is not first:
        log.info("--max_memory %g: activations are computed again, those of %s points at a time; without it %s",
                 limit / GIB, model.piece or "all", first)
    if limit and estimate.total > limit:
        log.warning("--max_memory %g cannot be kept: the least is %s", limit / GIB, estimate)
    return estimate


def measure(trainer) -> Estimate:
    """The peak of a trainer's run as its model is set up now. A pass of an eighth and one of a quarter of a step's
    points are measured, with pieces that are as much smaller."""
    model, options, device = trainer.model, trainer.options, trainer.device
    parameters = sum(p.numel() for p in model.parameters())
    share = len(range(*trainer.share.indices(options.num_pairs)))
    settings = model.recompute_above, model.piece, model.field_piece
    points, peaks = [max(options.num_pts // 8, 1), max(options.num_pts // 4, 2)], []
    try:
        for n in points:
            model.recompute_above, model.piece, model.field_piece = (
                value and max(value * n // options.num_pts, 1) for value in settings)
            peaks.append(pass_peak(model, share, n, options, device))
    finally:
        model.recompute_above, model.piece, model.field_piece = settings
    slope = (peaks[1] - peaks[0]) / (points[1] - points[0])
    moments = 1 if options.optimizer == "muon" else 2
    good = sum(v.numel() for v in model.state_dict().values()) + moments * parameters
    return Estimate(base_bytes(device), 4 * (parameters * (1 + moments) + good),
                    int(peaks[1] + slope * (options.num_pts - points[1])))


def base_bytes(device: torch.device) -> int:
    """What is in use now: resident memory of this process, or what is allocated on the GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # the peak so far, where the present is not to be had

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pass_peak(model: OmniMotion, pairs: int, points: int, options, device: torch.device) -> int:
    """The most bytes that a forward and a backward pass allocate; gradients, which stay, not counted."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([model.config.width - 1, model.config.height - 1])
    pixels = (torch.rand(pairs, points, 2, generator=generator) * size).to(device)
    ids = torch.arange(2 * pairs, device=device).view(2, -1) % model.config.num_frames
    jitter = torch.rand(pairs, 1, options.num_samples_ray, generator=generator).to(device)
    batch = _Batch(pixels, pixels, torch.rand(pairs, points, 3, generator=generator).to(device),
                   torch.ones(pairs, points, device=device))
    weights = loss_weights(100_000, 0)  # every loss takes part

    def once() -> None:
        prediction = model.predict_pairs(pixels, *ids, jitter)
        total, _ = objective(prediction, batch, weights, model.size, (options.min_depth, options.max_depth))
        if options.w_smoothness:
            inner = (ids[0] % max(model.config.num_frames - 2, 1) + 1).clamp(max=model.config.num_frames - 2)
            flows = model.scene_flow(prediction.local[:, : max(points // 4, 1)], inner.clamp(min=0))
            total = total + sum(flow.abs().mean() for flow in flows)
        total.backward()

    try:
        if device.type == "cuda":
            once()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            once()
            return torch.cuda.max_memory_allocated(device) - before
        for p in model.parameters():  # they are there from the first step on
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it reports on itself on stderr
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


@dataclass
class _Batch:
    """What the losses look at, as loaders.pair_sampler.Batch."""
    pixels1: torch.Tensor
    pixels2: torch.Tensor
    rgb1: torch.Tensor
    weights: torch.Tensor
