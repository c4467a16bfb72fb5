"""Where the flow error is large: error maps for hard mining (docs/method.md).

Notation
    T, h, w  frames, and rows and columns of square cells of `cell` pixels a side
    sums     summed flow error in pixels                      (T, h, w)
    counts   number of errors in the sum                      (T, h, w)
    mean     sums / counts; a cell that was never hit takes its frame's mean, a frame the map's
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTHING = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16  # 5-tap binomial, a Gaussian of one cell


class ErrorMap:
    """Accumulated flow errors of all frames.

    `mode` "accumulated": every step's point errors and every full evaluation are added, over the whole run.
    `mode` "last": an evaluation replaces the map and steps add nothing (OmniMotion). "off": nothing is kept.
    """

    def __init__(self, num_frames: int, size: tuple[int, int], cell: int = 8, mode: str = "accumulated",
                 uniform_share: float = 0.1, device: torch.device | str = "cpu"):
        self.mode, self.cell, self.size, self.uniform_share = mode, cell, size, uniform_share
        self.sums = torch.zeros(num_frames, -(-size[0] // cell), -(-size[1] // cell), device=device)
        self.counts = torch.zeros_like(self.sums)
        self.shared = [torch.zeros_like(self.sums) for _ in range(2)]  # sums and counts that all processes have
        self.evaluations = 0

    @property
    def ready(self) -> bool:
        """Whether there is a first full map to draw by."""
        return self.evaluations > 0

    def add_points(self, frames: Tensor, pixels: Tensor, errors: Tensor, weights: Tensor) -> None:
        """Add errors `(B, N)` in pixels at `(B, N, 2)` of frames `(B,)`, where `weights` `(B, N)` is positive."""
        if self.mode == "accumulated":
            self._add(frames, pixels, errors, weights)

    def add_evaluation(self, parts: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
        """Add a full evaluation, the arguments of `add_points` part by part; in mode "last" it replaces what was
        there."""
        if self.mode == "last":
            for values in (self.sums, self.counts, *self.shared):
                values.zero_()
        for part in parts:
            self._add(*part)
        self.evaluations += 1

    def _add(self, frames: Tensor, pixels: Tensor, errors: Tensor, weights: Tensor) -> None:
        frames, pixels, errors, weights = (a.to(self.sums.device) for a in (frames, pixels, errors, weights))
        _, h, w = self.sums.shape
        column, row = (pixels / self.cell + 0.5 / self.cell).floor().long().unbind(-1)  # (B, N)
        column, row = column.clamp(0, w - 1), row.clamp(0, h - 1)  # a matched point may lie just outside its frame
        cell = ((frames[:, None] * h + row) * w + column).flatten()
        counted = ((weights > 0) & torch.isfinite(errors)).flatten()
        self.sums.view(-1).index_add_(0, cell, torch.where(counted, errors.flatten(), 0))
        self.counts.view(-1).index_add_(0, cell, counted.to(self.sums.dtype))

    def share(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add what other processes have added since the last call; `total` sums a tensor over the processes."""
        for values, shared in zip((self.sums, self.counts), self.shared, strict=True):
            shared += total(values - shared)
            values.copy_(shared)

    def mean(self) -> Tensor:
        """Mean error of each cell `(T, h, w)` in pixels."""
        frame_sums, frame_counts = self.sums.sum((1, 2)), self.counts.sum((1, 2))
        overall = frame_sums.sum() / frame_counts.sum().clamp(min=1)
        frame = torch.where(frame_counts > 0, frame_sums / frame_counts.clamp(min=1), overall)  # (T,)
        return torch.where(self.counts > 0, self.sums / self.counts.clamp(min=1), frame[:, None, None])

    def frame_weights(self) -> Tensor:
        """Probability of drawing each frame `(T,)`: its mean error, and a uniform share."""
        return self._with_uniform_share(self.mean().mean((1, 2)))

    def cell_weights(self) -> Tensor:
        """Weight of the pixels of each cell `(T, h, w)`: the smoothed mean error with a uniform share; mean 1 a
        frame."""
        kernel = SMOOTHING.to(self.sums.device)
        smooth = F.pad(self.mean()[:, None], (2, 2, 2, 2), mode="replicate")  # (T, 1, h + 4, w + 4)
        smooth = F.conv2d(F.conv2d(smooth, kernel.view(1, 1, 1, 5)), kernel.view(1, 1, 5, 1))[:, 0]
        T, h, w = smooth.shape
        return self._with_uniform_share(smooth.view(T, -1)).view(T, h, w) * h * w

    def _with_uniform_share(self, weights: Tensor) -> Tensor:
        """Normalized to sum 1 over the last dimension, mixed with the uniform distribution."""
        share = (weights + 1e-12) / (weights + 1e-12).sum(-1, keepdim=True)  # a map of zeros is uniform
        return (1 - self.uniform_share) * share + self.uniform_share / weights.shape[-1]

    def state_dict(self) -> dict:
        """For the checkpoint."""
        return {"sums": self.sums, "counts": self.counts, "evaluations": self.evaluations}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`."""
        for values, shared, name in zip((self.sums, self.counts), self.shared, ("sums", "counts"), strict=True):
            values.copy_(state[name])
            shared.copy_(state[name])
        self.evaluations = state["evaluations"]
