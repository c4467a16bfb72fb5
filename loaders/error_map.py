"""Error maps for hard mining: the mean flow error of each cell of each frame (docs/method.md).

Notation
    T, h, w  frames, rows of cells, columns of cells; a cell is a square of `cell` x `cell` pixels
    sums     summed flow error in pixels                      (T, h, w)
    counts   number of errors in the sum                      (T, h, w)
    mean     sums / counts; an empty cell takes the mean of its frame, an empty frame the mean of the map
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTHING = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16  # 5-tap binomial filter; sigma is 1 cell


class ErrorMap:
    """Accumulated flow errors of all frames.

    `mode` "accumulated": the point errors of all steps and of all full evaluations of the run are added.
    `mode` "last": each full evaluation replaces the map, and steps add nothing (as in OmniMotion).
    `mode` "off": steps add nothing, and training uses no error map.
    `uniform_share`: weight of the uniform distribution in the mixture with the errors.
    """

    def __init__(self, num_frames: int, size: tuple[int, int], cell: int = 8, mode: str = "accumulated",
                 uniform_share: float = 0.1, device: torch.device | str = "cpu"):
        self.mode, self.cell, self.size, self.uniform_share = mode, cell, size, uniform_share
        self.sums = torch.zeros(num_frames, -(-size[0] // cell), -(-size[1] // cell), device=device)
        self.counts = torch.zeros_like(self.sums)
        self.shared = [torch.zeros_like(self.sums) for _ in range(2)]  # sums and counts common to all processes
        self.evaluations = 0

    @property
    def ready(self) -> bool:
        """Whether at least one full evaluation was added, so that weights can be computed."""
        return self.evaluations > 0

    def add_points(self, frames: Tensor, pixels: Tensor, errors: Tensor, weights: Tensor) -> None:
        """Add errors `(B, N)` at points `(B, N, 2)`, both in pixels, of frames `(B,)`, where weights `(B, N)` > 0."""
        if self.mode == "accumulated":
            self._add(frames, pixels, errors, weights)

    def add_evaluation(self, parts: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
        """Add a full evaluation, given in parts: each part is the arguments of `add_points`.

        In mode "last" it replaces the errors added before."""
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
        column, row = column.clamp(0, w - 1), row.clamp(0, h - 1)  # a point can lie slightly outside its frame
        cell = ((frames[:, None] * h + row) * w + column).flatten()
        counted = ((weights > 0) & torch.isfinite(errors)).flatten()
        self.sums.view(-1).index_add_(0, cell, torch.where(counted, errors.flatten(), 0))
        self.counts.view(-1).index_add_(0, cell, counted.to(self.sums.dtype))

    def share(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add the errors that other processes added since the last call; `total` sums a tensor over all processes."""
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
        """Probability of each frame `(T,)`: the normalized mean error, mixed with the uniform distribution."""
        return self._with_uniform_share(self.mean().mean((1, 2)))

    def cell_weights(self) -> Tensor:
        """Weight of each pixel of each cell `(T, h, w)`: the smoothed mean error, mixed with the uniform distribution.

        The weights of each frame have mean 1."""
        kernel = SMOOTHING.to(self.sums.device)
        smooth = F.pad(self.mean()[:, None], (2, 2, 2, 2), mode="replicate")  # (T, 1, h + 4, w + 4)
        smooth = F.conv2d(F.conv2d(smooth, kernel.view(1, 1, 1, 5)), kernel.view(1, 1, 5, 1))[:, 0]
        T, h, w = smooth.shape
        return self._with_uniform_share(smooth.view(T, -1)).view(T, h, w) * h * w

    def _with_uniform_share(self, weights: Tensor) -> Tensor:
        """Normalized to sum 1 over the last dimension, mixed with the uniform distribution."""
        share = (weights + 1e-12) / (weights + 1e-12).sum(-1, keepdim=True)  # a map of zeros gives uniform weights
        return (1 - self.uniform_share) * share + self.uniform_share / weights.shape[-1]

    def state_dict(self) -> dict:
        """Sums, counts and the number of evaluations, for the checkpoint."""
        return {"sums": self.sums, "counts": self.counts, "evaluations": self.evaluations}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`."""
        for values, shared, name in zip((self.sums, self.counts), self.shared, ("sums", "counts"), strict=True):
            values.copy_(state[name])
            shared.copy_(state[name])
        self.evaluations = state["evaluations"]
