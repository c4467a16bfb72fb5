"""Canonical field as voxel grids: colors and densities are interpolated, without a network (Fridovich-Keil et al.,
"Plenoxels", CVPR 2022; Sun et al., "Direct Voxel Grid Optimization", CVPR 2022).

Notation
    u        canonical point; c(u) contracts each coordinate separately: identity inside [-1, 1], 2 - 1 / |u| beyond
    level    a grid (4, D, R, R): color logits and density at R x R x D vertices over c(u) in +-FIELD_EXTENT
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIELD_EXTENT = (1.6, 1.6, 1.2)  # in units of c(u), reached at u = (2.5, 2.5, 1.25); beyond it border values are used
SIDES = (9, 17, 33, 65, 129)    # R of each level, vertices along x and along y
DEPTHS = (5, 9, 9, 17, 17)      # D of each level, vertices along z
RANGE_EDGE_MARGIN = 1e-3   # share of half the depth range: a vertex between two layers belongs to the farther one
CPU_PARTS = 2              # parts of a batch of points on a CPU, one a thread, each with a gradient array of its own
INITIAL_STD = 0.1          # standard deviation of the coarsest level's initial values
DENSITY_SCALE = 2.0        # density = DENSITY_SCALE * softplus(value - 1); larger values learn occlusion faster
NEAR_DENSITY_BIAS = -2.0   # initial density bias at the nearest depth, before the softplus
FAR_DENSITY_BIAS = 2.0     # the same at the farthest depth: the bias rises linearly, so all samples get some weight
EMPTY_DENSITY_BIAS = -3.0  # initial density bias where a layer is known to be empty
SEEN_DENSITY_BIAS = 1.5    # the same where a layer is known to be visible


class GridField(nn.Module):
    """Sum over all levels at a canonical point; color = sigmoid, density = DENSITY_SCALE * softplus."""

    def __init__(self, depth_range: tuple[float, float] = (0.0, 2.0)):
        super().__init__()
        near, far = depth_range
        self.register_buffer("center", torch.tensor([0, 0, (near + far) / 2]), persistent=False)
        self.register_buffer("scale", torch.tensor([1, 1, (far - near) / 2]), persistent=False)
        self.register_buffer("extent", torch.tensor(FIELD_EXTENT), persistent=False)
        self.levels = nn.ParameterList(
            nn.Parameter(torch.zeros(1, 4, D, R, R)) for R, D in zip(SIDES, DEPTHS, strict=True))
        nn.init.normal_(self.levels[0], std=INITIAL_STD)
        with torch.no_grad():
            self.levels[0][0, 3] += torch.linspace(NEAR_DENSITY_BIAS, FAR_DENSITY_BIAS, DEPTHS[0])[:, None, None]

    @property
    def side(self) -> int:
        """Vertices of the finest level along x and y."""
        return self.levels[-1].shape[-1]

    def place(self, u: Tensor) -> Tensor:
        """Grid coordinates `(..., 3)`, in [-1, 1] inside the grids, of canonical points `(..., 3)`."""
        return contract_each((u - self.center) / self.scale) / self.extent

    def vertices_of(self, u: Tensor) -> Tensor:
        """x and y `(..., 2)` of canonical points `(..., 3)` in units of the finest level's vertices, [0, side - 1]."""
        return (self.place(u)[..., :2].clamp(-1, 1) + 1) / 2 * (self.side - 1)

    @torch.no_grad()
    def start_at(self, votes: Tensor) -> None:
        """Initialize the densities of the first S - 1 of S equal depth ranges (motion layers) of a new field.

        `votes` `(S - 1, side, side)`, rows along y: -1 where the layer is known to be empty, 1 where it is known to be
        visible, 0 unknown. Between the last vertex of a range and the first of the next, densities are interpolated."""
        level = self.levels[-1]
        S = len(votes) + 1
        z = torch.linspace(-1, 1, level.shape[2], device=level.device) * self.extent[2]
        for s, vote in enumerate(votes.to(level.device)):
            start = 2 * s / S - 1 - RANGE_EDGE_MARGIN if s else -torch.inf  # the first range has no near end
            end = 2 * (s + 1) / S - 1 - RANGE_EDGE_MARGIN
            level[0, 3, (z >= start) & (z < end)] += (
                SEEN_DENSITY_BIAS * vote.clamp(min=0) - EMPTY_DENSITY_BIAS * vote.clamp(max=0))

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Canonical points `(..., 3)` -> rgb `(..., 3)` in [0, 1] and sigma `(...)` >= 0."""
        v = self.place(u.reshape(-1, 3))  # (M, 3)
        parts = CPU_PARTS if v.device.type == "cpu" and len(v) % CPU_PARTS == 0 else 1
        v = v.view(parts, 1, 1, -1, 3)
        out = sum(F.grid_sample(level.expand(parts, -1, -1, -1, -1), v, padding_mode="border", align_corners=True)
                  for level in self.levels)  # (parts, 4, 1, 1, M / parts)
        out = out.movedim(1, -1).reshape(*u.shape[:-1], 4)
        return torch.sigmoid(out[..., :3]), DENSITY_SCALE * F.softplus(out[..., 3] - 1)


def contract_each(v: Tensor) -> Tensor:
    """Contract each coordinate separately from R into (-2, 2); the identity inside [-1, 1]."""
    size = v.abs().clamp(min=1)
    return torch.where(v.abs() <= 1, v, v.sign() * (2 - 1 / size))
