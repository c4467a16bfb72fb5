"""Invertible network of space-time grids: what MLPs compute in `models.invertible` is interpolated here.

Multilevel free-form deformations register images this way (Rueckert et al., IEEE TMI 1999); CaDeX++ (Song et al., ECCV
2024) brought local space-time features to OmniMotion's couplings. Here the grids hold (s, o) and the affine map's
parameters themselves, so that a point costs a few multiplications instead of a hundred thousand.

Notation
    T, L     frames, coupling layers
    level    a grid of R x R vertices, R = 3, 5, 9, ...; a level's vertices are among those of the next
    moment   a time at which a grid has values: every frame, or every fourth; linear between two moments
    sheet    (B, 2 L, R, R): s and o of all layers in B frames on the finest level's vertices, all levels and moments
             together
    theta    (B, 5, Z): the affine map's parameters at Z depths, linear between them
    a        the two coordinates that a layer keeps, in units in which the grid spans [-1, 1]   (B, M, 2)
    layer k  forward  y_c = (x_c - o) exp(-s)        inverse  x_c = y_c exp(s) + o
On the way forward the couplings come before the affine map, so that the grids always lie over the frame.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.invertible import S_MAX, apply_affine, invert_affine

FRAMES_A_MOMENT = (4, 1)  # slow motion is shared by neighbouring frames, the rest is each frame's own
THETA_DEPTHS = (2, 5)  # depths of the affine map's levels
MARGIN = (1.2, 1.2, 1.1)  # half the sides of the grids, in units of half the frame and half the range of depths


def level_sides(num_levels: int) -> list[int]:
    """R of each level."""
    return [2 ** (level + 1) + 1 for level in range(num_levels)]


def hats(num_frames: int, num_moments: int) -> Tensor:
    """Share of each moment in each frame's value, `(num_frames, num_moments)`; rows sum to 1."""
    frame = torch.linspace(0, num_moments - 1, num_frames)
    return (1 - (frame[:, None] - torch.arange(num_moments)).abs()).clamp(min=0)


class Grids(nn.Module):
    """Grids `(moments, C, *side)` of all `sides` (tuples) for each of FRAMES_A_MOMENT; zero at the start."""

    def __init__(self, num_frames: int, channels: int, sides: Iterable[tuple[int, ...]]):
        super().__init__()
        self.sides = list(sides)
        moments = [max(2, -(-num_frames // frames)) for frames in FRAMES_A_MOMENT]
        self.values = nn.ParameterList(
            nn.Parameter(torch.zeros(count, channels, *side)) for side in self.sides for count in moments)
        for k, count in enumerate(moments):
            self.register_buffer(f"hats_{k}", hats(num_frames, count), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Values of frames `(B,)` on the finest level `(B, C, *side)`."""
        n, total = len(FRAMES_A_MOMENT), None
        for level, side in enumerate(self.sides):
            grids = self.values[level * n:(level + 1) * n]
            here = sum(getattr(self, f"hats_{k}")[ids] @ grid.flatten(1) for k, grid in enumerate(grids))
            here = here.view(len(ids), -1, *side)
            if total is not None:  # the coarser levels' interpolation, at this level's vertices
                here = here + F.interpolate(
                    total, size=side, mode="linear" if len(side) == 1 else "bilinear", align_corners=True)
            total = here
        return total

    def plain(self, ids: Tensor, a: Tensor) -> Tensor:
        """Values `(B, C, M)` at points `a` `(B, M, D)` of frames `(B,)` by the definition, every level interpolated by
        itself: the twin of `sample(self(ids), a)` that tests compare with."""
        n = len(FRAMES_A_MOMENT)
        return sum(sample((getattr(self, f"hats_{k % n}")[ids] @ grid.flatten(1)).view(len(ids), *grid.shape[1:]), a)
                   for k, grid in enumerate(self.values))


def sample(grid: Tensor, a: Tensor) -> Tensor:
    """Linear interpolation of `(B, C, R)` or `(B, C, R_2, R_1)` at `a` `(B, M, 1 or 2)` in [-1, 1], the values at the
    border outside it -> `(B, C, M)`. The first coordinate of `a` runs along the grid's last dimension."""
    if a.shape[-1] == 1:
        grid, a = grid[:, :, None], torch.cat([a, torch.zeros_like(a)], dim=-1)
    return F.grid_sample(grid, a[:, None], padding_mode="border", align_corners=True)[:, :, 0]


class GridNetwork(nn.Module):
    """Couplings and affine map of a video of `num_frames` frames as grids, the identity at the start."""

    def __init__(self, num_frames: int, depth_range: tuple[float, float] = (0.0, 2.0),
                 coordinates: tuple[int, ...] = (0, 1, 2, 0, 1, 2), num_levels: int = 5):
        super().__init__()
        self.coordinates = coordinates
        near, far = depth_range
        self.register_buffer("centre", torch.tensor([0, 0, (near + far) / 2]), persistent=False)
        self.register_buffer("extent", torch.tensor([1, 1, (far - near) / 2]) * torch.tensor(MARGIN), persistent=False)
        self.sheets = Grids(num_frames, 2 * len(coordinates), [(R, R) for R in level_sides(num_levels)])
        self.thetas = Grids(num_frames, 5, [(Z,) for Z in THETA_DEPTHS])

    def bind(self, ids: Tensor) -> "GridMaps":
        """The maps of frames `(B,)`; all levels are added up once, here."""
        return GridMaps(self, self.sheets(ids), self.thetas(ids))


class GridMaps:
    """Maps of B frames between their local volumes and the canonical one, `(B, M, 3)` -> `(B, M, 3)`; what
    `models.invertible.FrameMaps` offers."""

    def __init__(self, network: GridNetwork, sheets: Tensor, thetas: Tensor):
        self.network, self.sheets, self.thetas = network, sheets, thetas
        self.call = None  # how FrameMaps recomputes; here so little is stored that nothing has to be

    def select(self, index: Tensor) -> "GridMaps":
        """The maps of some of the frames, `index` `(B',)` into the bound ones."""
        return GridMaps(self.network, self.sheets[index], self.thetas[index])

    def to_canonical(self, x: Tensor) -> Tensor:
        """Local points to canonical ones (forward)."""
        x = list(x.unbind(-1))
        for k, c in enumerate(self.network.coordinates):
            s, o = self._scale_shift(k, x)
            x[c] = (x[c] - o) * torch.exp(-s)
        return apply_affine(self._theta(x[2]), torch.stack(x, dim=-1))

    def rays_to_canonical(self, x: Tensor) -> Tensor:
        """`to_canonical` of samples `(B, N, K, 3)`."""
        return self.to_canonical(x.flatten(1, 2)).view_as(x)

    def to_local(self, u: Tensor) -> Tensor:
        """Canonical points to local ones (inverse)."""
        x = list(invert_affine(self._theta(u[..., 2]), u).unbind(-1))
        for k, c in reversed(list(enumerate(self.network.coordinates))):
            s, o = self._scale_shift(k, x)
            x[c] = x[c] * torch.exp(s) + o
        return torch.stack(x, dim=-1)

    def _scale_shift(self, k: int, x: list[Tensor]) -> tuple[Tensor, Tensor]:
        """s and o `(B, M)` of layer k at points given as three `(B, M)`."""
        network = self.network
        kept = [d for d in range(3) if d != network.coordinates[k]]
        a = torch.stack([(x[d] - network.centre[d]) / network.extent[d] for d in kept], dim=-1)  # (B, M, 2)
        s, o = sample(self.sheets[:, 2 * k:2 * k + 2], a).unbind(1)
        return s.clamp(-S_MAX, S_MAX), o

    def _theta(self, z: Tensor) -> Tensor:
        """The affine map's parameters `(B, M, 5)` at depths `(B, M)`."""
        a = ((z - self.network.centre[2]) / self.network.extent[2])[..., None]
        return sample(self.thetas, a).transpose(1, 2)
