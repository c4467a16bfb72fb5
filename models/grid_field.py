"""Canonical field of grids: colors and densities interpolated, not computed by a network (Fridovich-Keil et al.,
"Plenoxels", CVPR 2022; Sun et al., "Direct Voxel Grid Optimization", CVPR 2022).

Notation
    u        canonical point; c(u) contracts each coordinate by itself: itself inside [-1, 1], then 2 - 1 / |u|
    level    a grid (4, D, R, R): color logits and density at R x R x D vertices over c(u) in +-EXTENT
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXTENT = (1.6, 1.6, 1.2)  # of the grids; c(u) reaches it at u = (2.5, 2.5, 1.25), outside the border's values hold
SIDES = (9, 17, 33, 65, 129)
DEPTHS = (5, 9, 9, 17, 17)
ON_EDGE = 1e-3   # of half of the depths: a vertex on the edge of two ranges is the farther one's
PARTS = 2  # of the points: on a CPU a thread takes a part, whose gradient is an array of its own
ROUGHNESS = 0.1  # standard deviation of the coarsest level at the start
OPACITY = 2.0  # of a softplus of 1: how quickly places learn to hide what is behind them
THIN, DENSE = -2.0, 2.0  # added to its density at its first and last depth: all of a ray takes part, and more so behind
EMPTY, SHOWN = 3.0, 1.5  # taken from densities where a place is known to be empty; added where something is seen


class GridField(nn.Module):
    """Sum of all levels at a canonical point -> color by a sigmoid, density by OPACITY times a softplus."""

    def __init__(self, depth_range: tuple[float, float] = (0.0, 2.0)):
        super().__init__()
        near, far = depth_range
        self.register_buffer("center", torch.tensor([0, 0, (near + far) / 2]), persistent=False)
        self.register_buffer("scale", torch.tensor([1, 1, (far - near) / 2]), persistent=False)
        self.register_buffer("extent", torch.tensor(EXTENT), persistent=False)
        self.levels = nn.ParameterList(
            nn.Parameter(torch.zeros(1, 4, D, R, R)) for R, D in zip(SIDES, DEPTHS, strict=True))
        nn.init.normal_(self.levels[0], std=ROUGHNESS)
        with torch.no_grad():
            self.levels[0][0, 3] += torch.linspace(THIN, DENSE, DEPTHS[0])[:, None, None]

    @property
    def side(self) -> int:
        """Vertices of the finest level along x and y."""
        return self.levels[-1].shape[-1]

    def place(self, u: Tensor) -> Tensor:
        """Where canonical points `(..., 3)` are in the grids, which span [-1, 1]."""
        return contract_each((u - self.center) / self.scale) / self.extent

    def vertices_of(self, u: Tensor) -> Tensor:
        """x and y `(..., 2)` of canonical points `(..., 3)` as places among the finest level's vertices, in
        [0, side - 1]."""
        return (self.place(u)[..., :2].clamp(-1, 1) + 1) / 2 * (self.side - 1)

    @torch.no_grad()
    def start_at(self, votes: Tensor) -> None:
        """Let a new field know where the first S - 1 of S ranges of depth, all as long, are empty (-1) and where
        something is seen in them (1): `votes` `(S - 1, side, side)`, rows along y. From a range's last vertex to the
        next one's first, densities go over from the one's to the other's."""
        level, S = self.levels[-1], len(votes) + 1
        z = torch.linspace(-1, 1, level.shape[2], device=level.device) * self.extent[2]
        for s, vote in enumerate(votes.to(level.device)):
            first, end = (2 * edge / S - 1 - ON_EDGE for edge in (s if s else -S, s + 1))
            level[0, 3, (z >= first) & (z < end)] += SHOWN * vote.clamp(min=0) + EMPTY * vote.clamp(max=0)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Canonical points `(..., 3)` -> rgb `(..., 3)` in [0, 1] and sigma `(...)` >= 0."""
        v = self.place(u.reshape(-1, 3))  # (M, 3)
        parts = PARTS if v.device.type == "cpu" and len(v) % PARTS == 0 else 1
        v = v.view(parts, 1, 1, -1, 3)
        out = sum(F.grid_sample(level.expand(parts, -1, -1, -1, -1), v, padding_mode="border", align_corners=True)
                  for level in self.levels)  # (parts, 4, 1, 1, M / parts)
        out = out.movedim(1, -1).reshape(*u.shape[:-1], 4)
        return torch.sigmoid(out[..., :3]), OPACITY * F.softplus(out[..., 3] - 1)


def contract_each(v: Tensor) -> Tensor:
    """Every coordinate by itself from all of R into (-2, 2), the identity inside [-1, 1]."""
    size = v.abs().clamp(min=1)
    return torch.where(v.abs() <= 1, v, v.sign() * (2 - 1 / size))
