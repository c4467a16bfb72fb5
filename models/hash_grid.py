"""Multiresolution hash grid, a PyTorch version of tiny-cuda-nn's `HashGrid` (Mueller et al., "Instant NGP", 2022).

Notation
    v        input in [0, 1]^D, D = 2                                            (M, D)
    l        level, with scale s_l = BASE_RESOLUTION * GROWTH^l - 1 and resolution r_l = ceil(s_l) + 1
    table_l  E_l x FEATURES numbers; E_l = min(r_l^D rounded up to a multiple of 8, 2^LOG2_ENTRIES)
    corner   integer lattice point; its row in the table is the dense index if r_l^D <= E_l, else a hash
The features of the 2^D corners around v * s_l + 1/2 are interpolated linearly. The features of all levels are
concatenated: (M, LEVELS * FEATURES).
"""

import math

import torch
from torch import Tensor, nn

from third_party.tcnn import ENCODING

# All without units
DIMENSIONS = 2
LEVELS = ENCODING["n_levels"]
FEATURES = ENCODING["n_features_per_level"]      # numbers per table row
LOG2_ENTRIES = ENCODING["log2_hashmap_size"]     # log2 of the largest number of rows of a level
BASE_RESOLUTION = ENCODING["base_resolution"]
GROWTH = ENCODING["per_level_scale"]             # ratio of the resolutions of successive levels
PRIME = 2_654_435_761  # factor of the second coordinate in the spatial hash (Instant NGP, eq. 4)


class HashGrid(nn.Module):
    """Trainable hash grid, `(M, DIMENSIONS)` -> `(M, LEVELS * FEATURES)`.

    One parameter contains the tables of all levels in tiny-cuda-nn's order, so tiny-cuda-nn's parameters can be copied
    without conversion."""

    def __init__(self):
        super().__init__()
        self.out_dim = LEVELS * FEATURES
        scales = [BASE_RESOLUTION * GROWTH**level - 1 for level in range(LEVELS)]
        resolutions = [math.ceil(scale) + 1 for scale in scales]
        entries = [min(-(-(r**DIMENSIONS) // 8) * 8, 2**LOG2_ENTRIES) for r in resolutions]
        dense = [r**DIMENSIONS <= e for r, e in zip(resolutions, entries, strict=True)]
        self.table = nn.Parameter(torch.empty(sum(entries), FEATURES).uniform_(-1e-4, 1e-4))
        constants = {
            "scales": torch.tensor(scales),
            "entries": torch.tensor(entries),
            "resolutions": torch.tensor(resolutions),
            "dense": torch.tensor(dense),
            "first": torch.tensor([0, *entries[:-1]]).cumsum(0),  # first row of each level
            "corners": torch.tensor([(0, 0), (0, 1), (1, 0), (1, 1)]),
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, v: Tensor) -> Tensor:
        """`(M, DIMENSIONS)` -> `(M, LEVELS * FEATURES)`."""
        position = v[:, None] * self.scales[:, None] + 0.5  # (M, levels, 2)
        low = position.floor()
        fraction = (position - low)[:, :, None]  # (M, levels, 1, 2)
        weight = torch.where(self.corners.bool(), fraction, 1 - fraction).prod(-1)  # (M, levels, 4)
        rows = self._rows(low.long()[:, :, None] + self.corners)  # (M, levels, 4)
        return (weight[..., None] * self.table[rows]).sum(-2).flatten(1)

    def _rows(self, corner: Tensor) -> Tensor:
        """Table rows `(M, levels, 4)` of lattice points `(M, levels, 4, 2)`: dense index if it fits, else hash."""
        x, y = corner.unbind(-1)
        dense = x + y * self.resolutions[:, None]
        hashed = x ^ (y * PRIME & 0xFFFFFFFF)
        index = torch.where(self.dense[:, None], dense, hashed)
        return self.first[:, None] + index % self.entries[:, None]
