"""Multiresolution hash grid, the PyTorch twin of tiny-cuda-nn's `HashGrid` (Mueller et al., "Instant NGP", 2022).

Notation
    v        input in [0, 1]^D                                                   (M, D)
    l        level, of scale s_l = base * growth^l - 1 and resolution r_l = ceil(s_l) + 1
    table_l  E_l x F features; E_l = min(r_l^D rounded up to 8, 2^log2_entries)
    corner   integer lattice point; its row in the table is the dense index while r_l^D fits, else a hash
The features of the 2^D corners around v * s_l + 1/2 are interpolated linearly, levels side by side: (M, levels * F).
"""

import itertools
import math

import torch
from torch import Tensor, nn

PRIMES = (1, 2654435761, 805459861)


class HashGrid(nn.Module):
    """Trainable hash grid on `(M, in_dim)` -> `(M, num_levels * num_features)`; `num_levels` tables in one parameter,
    in tiny-cuda-nn's order, so that its parameters can be copied as they are."""

    def __init__(self, in_dim: int = 2, num_levels: int = 16, num_features: int = 2, log2_entries: int = 15,
                 base_resolution: int = 16, growth: float = 1.5):
        super().__init__()
        self.in_dim, self.num_features = in_dim, num_features
        self.scales = [base_resolution * growth**level - 1 for level in range(num_levels)]
        self.resolutions = [math.ceil(scale) + 1 for scale in self.scales]
        self.entries = [min(-(-(r**in_dim) // 8) * 8, 2**log2_entries) for r in self.resolutions]
        self.table = nn.Parameter(torch.empty(sum(self.entries), num_features).uniform_(-1e-4, 1e-4))

    def forward(self, v: Tensor) -> Tensor:
        features, first = [], 0
        for scale, resolution, entries in zip(self.scales, self.resolutions, self.entries, strict=True):
            position = v * scale + 0.5
            corner = position.floor()
            fraction = position - corner  # (M, D)
            level = 0
            for offset in itertools.product((0, 1), repeat=self.in_dim):
                weight = torch.ones_like(fraction[:, 0])
                for d, step in enumerate(offset):
                    weight = weight * (fraction[:, d] if step else 1 - fraction[:, d])
                row = self._row(corner.long() + torch.tensor(offset, device=v.device), resolution, entries)
                level = level + weight[:, None] * self.table[first + row]  # (M, F)
            features.append(level)
            first += entries
        return torch.cat(features, dim=-1)  # (M, levels * F)

    def _row(self, corner: Tensor, resolution: int, entries: int) -> Tensor:
        """Row of the level's table for lattice points `(M, D)` -> `(M,)`."""
        if resolution**self.in_dim <= entries:
            index = sum(corner[:, d] * resolution**d for d in range(self.in_dim))
        else:
            index = 0
            for d in range(self.in_dim):
                index = index ^ (corner[:, d] * PRIMES[d] & 0xFFFFFFFF)
        return index % entries
