"""Invertible network of space-time grids: what MLPs compute in `models.invertible` is interpolated here.

Multilevel free-form deformations register images this way (Rueckert et al., IEEE TMI 1999); CaDeX++ (Song et al., ECCV
2024) brought local space-time features to OmniMotion's couplings. Here the grids hold (s, o) and the affine map's
parameters themselves, so that a point costs a few multiplications instead of a hundred thousand.

Notation
    T, L     frames, coupling layers
    level    a grid of R x R vertices, R = 3, 5, 9, ...; a level's vertices are among those of the next
    moment   a time at which a grid has values; linear between two of them. There are grids with a moment a frame, with
             a quarter as many, a quarter of these, and so on, down to eight or less
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
from models.recompute import stored

FEW = 8  # moments, of which a quarter is not worth a grid
THETA_DEPTHS = (2, 5)  # depths of the affine map's levels
MARGIN = (1.2, 1.2, 1.1)  # half the sides of the grids, in units of half the frame and half the range of depths


def level_sides(num_levels: int) -> list[int]:
    """R of each level."""
    return [2 ** (level + 1) + 1 for level in range(num_levels)]


def moment_counts(num_frames: int) -> list[int]:
    """Of the grids of each level, fewest first: slow motion is shared by many frames, the rest is each frame's own."""
    counts = [num_frames]
    while counts[0] > FEW or len(counts) == 1:
        counts.insert(0, max(2, -(-counts[0] // 4)))
    return counts


def hats(num_frames: int, num_moments: int) -> Tensor:
    """Share of each moment in each frame's value, `(num_frames, num_moments)`; rows sum to 1."""
    frame = torch.linspace(0, num_moments - 1, num_frames)
    return (1 - (frame[:, None] - torch.arange(num_moments)).abs()).clamp(min=0)


class Grids(nn.Module):
    """Grids `(moments, C, *side)` of all `sides` (tuples) for each of `moment_counts`; zero at the start."""

    def __init__(self, num_frames: int, channels: int, sides: Iterable[tuple[int, ...]]):
        super().__init__()
        self.sides = list(sides)
        counts = moment_counts(num_frames)
        self.num_grids = len(counts)  # of a level
        self.values = nn.ParameterList(
            nn.Parameter(torch.zeros(count, channels, *side)) for side in self.sides for count in counts)
        for k, count in enumerate(counts):
            place = torch.linspace(0, count - 1, num_frames)
            before = place.long().clamp(max=count - 2)
            self.register_buffer(f"before_{k}", before, persistent=False)  # the moment before each frame
            self.register_buffer(f"share_{k}", place - before, persistent=False)  # of the moment after it

    def forward(self, ids: Tensor) -> Tensor:
        """Values of frames `(B,)` on the finest level `(B, C, *side)`."""
        n, total = self.num_grids, None
        for level, side in enumerate(self.sides):
            grids = self.values[level * n:(level + 1) * n]
            here = sum(self._at(k, grid, ids) for k, grid in enumerate(grids))  # (B, C, *side)
            if total is not None:  # the coarser levels' interpolation, at this level's vertices
                here = here + F.interpolate(
                    total, size=side, mode="linear" if len(side) == 1 else "bilinear", align_corners=True)
            total = here
        return total

    def _at(self, k: int, grid: Tensor, ids: Tensor) -> Tensor:
        """A grid of the k-th kind at the times of frames `(B,)`: `(B, C, *side)`. No product of matrices, which might
        be rounded to tf32."""
        before = getattr(self, f"before_{k}")[ids]
        share = getattr(self, f"share_{k}")[ids].view(-1, *[1] * (grid.dim() - 1))
        return torch.lerp(grid.index_select(0, before), grid.index_select(0, before + 1), share)

    def plain(self, ids: Tensor, a: Tensor) -> Tensor:
        """Values `(B, C, M)` at points `a` `(B, M, D)` of frames `(B,)` by the definition, every level interpolated by
        itself: the twin of `sample(self(ids), a)` that tests compare with."""
        num_frames = len(self.before_0)
        at_frames = (torch.einsum("tm,m...->t...", hats(num_frames, len(grid)), grid)[ids] for grid in self.values)
        return sum(sample(grid, a) for grid in at_frames)


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
        self.call = stored  # or models.recompute.recomputed: how the backward pass gets at activations

    def select(self, index: Tensor) -> "GridMaps":
        """The maps of some of the frames, `index` `(B',)` into the bound ones."""
        out = GridMaps(self.network, self.sheets[index], self.thetas[index])
        out.call = self.call
        return out

    def to_canonical(self, x: Tensor) -> Tensor:
        """Local points to canonical ones (forward)."""
        return self.call(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
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
        return self.call(self._inverse, u)

    def _inverse(self, u: Tensor) -> Tensor:
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
