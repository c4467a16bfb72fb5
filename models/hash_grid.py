"""Multiresolution hash grid, a PyTorch version of tiny-cuda-nn's `HashGrid` (Mueller et al., "Instant NGP", 2022).

Notation
    v        input in [0, 1]^D                                                   (M, D)
    l        level, with scale s_l = base * growth^l - 1 and resolution r_l = ceil(s_l) + 1
    table_l  E_l x F features; E_l = min(r_l^D rounded up to a multiple of 8, 2^log2_entries)
    corner   integer lattice point; its row in the table is the dense index if r_l^D <= E_l, else a hash
The features of the 2^D corners around v * s_l + 1/2 are interpolated linearly. The features of all levels are
concatenated: (M, levels * F).
"""

import itertools
import math

import torch
from torch import Tensor, nn

PRIMES = (1, 2654435761, 805459861)  # factors of the spatial hash, one per dimension, no unit (Instant NGP, eq. 4)


class HashGrid(nn.Module):
    """Trainable hash grid, `(M, in_dim)` -> `(M, num_levels * num_features)`.

    One parameter contains the tables of all levels in tiny-cuda-nn's order, so tiny-cuda-nn's parameters can be copied
    without conversion."""

    def __init__(self, in_dim: int = 2, num_levels: int = 16, num_features: int = 2, log2_entries: int = 15,
                 base_resolution: int = 16, growth: float = 1.5):
        super().__init__()
        self.in_dim, self.num_features = in_dim, num_features
        scales = [base_resolution * growth**level - 1 for level in range(num_levels)]
        resolutions = [math.ceil(scale) + 1 for scale in scales]
        entries = [min(-(-(r**in_dim) // 8) * 8, 2**log2_entries) for r in resolutions]
        self.out_dim = num_levels * num_features
        self.table = nn.Parameter(torch.empty(sum(entries), num_features).uniform_(-1e-4, 1e-4))
        constants = {"scales": torch.tensor(scales), "entries": torch.tensor(entries),
                     "strides": torch.tensor([[r**d for d in range(in_dim)] for r in resolutions]),
                     "dense": torch.tensor([r**in_dim <= e for r, e in zip(resolutions, entries, strict=True)]),
                     "first": torch.tensor([0, *entries[:-1]]).cumsum(0), "primes": torch.tensor(PRIMES[:in_dim]),
                     "corners": torch.tensor(list(itertools.product((0, 1), repeat=in_dim)))}
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, v: Tensor) -> Tensor:
        """`(M, in_dim)` -> `(M, num_levels * num_features)`."""
        position = v[:, None] * self.scales[:, None] + 0.5  # (M, levels, D)
        low = position.floor()
        fraction = (position - low)[:, :, None]  # (M, levels, 1, D)
        weight = torch.where(self.corners.bool(), fraction, 1 - fraction).prod(-1)  # (M, levels, 2^D)
        rows = self._rows(low.long()[:, :, None] + self.corners)  # (M, levels, 2^D)
        return (weight[..., None] * self.table[rows]).sum(-2).flatten(1)

    def _rows(self, corner: Tensor) -> Tensor:
        """Table rows `(M, levels, 2^D)` of lattice points `(M, levels, 2^D, D)`: dense index if it fits, else hash."""
        dense = (corner * self.strides[:, None]).sum(-1)
        hashed = corner * self.primes & 0xFFFFFFFF
        for d in range(1, self.in_dim):
            hashed[..., 0] ^= hashed[..., d]
        index = torch.where(self.dense[:, None], dense, hashed[..., 0])
        return self.first[:, None] + index % self.entries[:, None]
