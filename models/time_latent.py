"""Latent code of each frame (docs/method.md; OmniMotion, section 4.1).

Notation
    T        number of frames; frame i = 0..T-1 has time t_i = (i + 1) / T     (T, 1)
    latent   one vector per frame                                              (T, C), C = 128
"""

import torch
from torch import Tensor, nn

from models.gabor import GaborNet
from models.hash_grid import HashGrid
from third_party.tcnn import TcnnHashLatent


def frame_times(num_frames: int) -> Tensor:
    """Times t_i = (i + 1) / T, `(T, 1)`."""
    return torch.arange(1, num_frames + 1, dtype=torch.float32)[:, None] / num_frames


class HashLatent(nn.Module):
    """Hash grid on (t, log(t + 1)), then a ReLU MLP without biases and with two hidden layers of 64 units.

    Same architecture as tiny-cuda-nn's `NetworkWithInputEncoding`."""

    def __init__(self, dim: int = 128):
        super().__init__()
        width = 64
        self.grid = HashGrid()
        self.mlp = nn.Sequential(
            nn.Linear(self.grid.out_dim, width, bias=False), nn.ReLU(),
            nn.Linear(width, width, bias=False), nn.ReLU(),
            nn.Linear(width, dim, bias=False))
        for layer in self.mlp[::2]:
            nn.init.xavier_uniform_(layer.weight)  # as tiny-cuda-nn; PyTorch's default makes the latents 10x smaller

    def forward(self, t: Tensor) -> Tensor:
        """`(T, 1)` -> `(T, dim)`."""
        return self.mlp(self.grid(torch.cat([t, torch.log(t + 1)], dim=-1)))


class GaborLatent(GaborNet):
    """Gabor network on t with two hidden layers of 256 units, as in OmniMotion's code."""

    def __init__(self, dim: int = 128):
        super().__init__(in_dim=1, width=256, out_dim=dim, num_layers=2, alpha=4.5)


class TableLatent(nn.Module):
    """One trainable vector per frame and no weights shared between frames; baseline of the ablation."""

    def __init__(self, num_frames: int, dim: int = 128):
        super().__init__()
        self.table = nn.Parameter(1e-2 * torch.randn(num_frames, dim))

    def forward(self, t: Tensor) -> Tensor:
        return self.table


class TimeLatent(nn.Module):
    """Latents of all frames.

    `kind`: "hash", "gabor" or "table" selects the network. "none" gives frozen latents of shape `(T, 0)`; the times
    `t` are available as usual. After `freeze()` the latents are a constant buffer and the network is not used."""

    def __init__(self, num_frames: int, kind: str = "hash", dim: int = 128, backend: str = "torch"):
        super().__init__()
        if kind == "none":
            self.network = nn.Identity()
        elif kind == "table":
            self.network = TableLatent(num_frames, dim)
        elif kind == "gabor":
            self.network = GaborLatent(dim)
        elif kind == "hash":
            self.network = TcnnHashLatent(dim) if backend == "tcnn" else HashLatent(dim)
        else:
            raise ValueError(f"there is no time latent {kind}")
        self.register_buffer("t", frame_times(num_frames), persistent=False)
        self.register_buffer("frozen", torch.zeros(num_frames, 0) if kind == "none" else None)

    def forward(self) -> Tensor:
        """`(T, dim)`."""
        return self.network(self.t) if self.frozen is None else self.frozen

    @torch.no_grad()
    def freeze(self) -> None:
        """Evaluate the network for all frames, store the result as a buffer, stop training the network. Idempotent."""
        if self.frozen is not None:
            return
        self.frozen = self.network(self.t)
        self.network.requires_grad_(False)
        for parameter in self.network.parameters():
            parameter.grad = None  # otherwise it would count in the norm of gradient clipping
