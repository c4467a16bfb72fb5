"""Latent code of each frame (docs/method.md; OmniMotion, section 4.1).

Notation
    T        number of frames; frame i = 0..T-1 has time t_i = (i + 1) / T     (T, 1)
    latent   one code a frame                                                  (T, C), C = 128
"""

import torch
from torch import Tensor, nn

from models.gabor import GaborNet
from models.hash_grid import HashGrid
from third_party.tcnn import TcnnHashLatent


def frame_times(num_frames: int) -> Tensor:
    """t_i = (i + 1) / T as `(T, 1)`."""
    return torch.arange(1, num_frames + 1, dtype=torch.float32)[:, None] / num_frames


class HashLatent(nn.Module):
    """Hash grid on (t, log(t + 1)) and a bias-free 64-64 ReLU MLP, as tiny-cuda-nn's `NetworkWithInputEncoding`."""

    def __init__(self, dim: int = 128, width: int = 64):
        super().__init__()
        self.grid = HashGrid(in_dim=2)
        self.mlp = nn.Sequential(
            nn.Linear(self.grid.out_dim, width, bias=False), nn.ReLU(),
            nn.Linear(width, width, bias=False), nn.ReLU(),
            nn.Linear(width, dim, bias=False))
        for layer in self.mlp[::2]:
            nn.init.xavier_uniform_(layer.weight)  # tiny-cuda-nn's; torch's default shrinks the latents tenfold

    def forward(self, t: Tensor) -> Tensor:
        """`(T, 1)` -> `(T, dim)`."""
        return self.mlp(self.grid(torch.cat([t, torch.log(t + 1)], dim=-1)))


class GaborLatent(GaborNet):
    """OmniMotion's: a Gabor network of two hidden layers of 256 on t."""

    def __init__(self, dim: int = 128):
        super().__init__(in_dim=1, width=256, out_dim=dim, num_layers=2, alpha=4.5)


class TableLatent(nn.Module):
    """One free vector a frame, without any sharing between frames: the plain alternative, for the ablation."""

    def __init__(self, num_frames: int, dim: int = 128):
        super().__init__()
        self.table = nn.Parameter(1e-2 * torch.randn(num_frames, dim))

    def forward(self, t: Tensor) -> Tensor:
        return self.table


class TimeLatent(nn.Module):
    """Latents of all frames; after `freeze()` they are a constant buffer and the network stands idle. Of `kind` "none"
    they have no entries, are frozen, and only the frames' times are there."""

    def __init__(self, num_frames: int, kind: str = "hash", dim: int = 128, backend: str = "torch"):
        super().__init__()
        if kind == "none":
            self.network = nn.Identity()
            self.register_buffer("t", frame_times(num_frames), persistent=False)
            self.register_buffer("frozen", torch.zeros(num_frames, 0))
            return
        hashed = TcnnHashLatent if backend == "tcnn" else HashLatent
        kinds = {"hash": hashed, "gabor": GaborLatent, "table": lambda dim: TableLatent(num_frames, dim)}
        self.network = kinds[kind](dim)
        self.register_buffer("t", frame_times(num_frames), persistent=False)
        self.register_buffer("frozen", None)

    def forward(self) -> Tensor:
        """`(T, dim)`."""
        return self.network(self.t) if self.frozen is None else self.frozen

    @torch.no_grad()
    def freeze(self) -> None:
        """Evaluate the network once for all frames and keep the result instead of the network. Twice is once."""
        if self.frozen is not None:
            return
        self.frozen = self.network(self.t)
        self.network.requires_grad_(False)
        for parameter in self.network.parameters():
            parameter.grad = None  # a stale gradient would count in the norm that clipping looks at
