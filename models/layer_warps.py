"""Invertible maps of configs/fast.txt: per motion layer and frame, an affine map and composed displacement grids.

Multilevel displacement grids register images this way (Rueckert et al., IEEE TMI 1999); a composition of small
displacements is one-to-one (Choi & Lee, Graphical Models 2000). The affine maps take out the motion of the camera, so
that the displacements stay small. Evaluating a point takes a few multiplications (docs/fast.md).

Notation
    T, S       frames, motion layers: S equal ranges of depth. Maps keep depths, so a layer is in front of the next one
               in all frames. The map is the same at all depths of a layer
    level      a grid of R x R vertices over the frame, R = 3, 5, 9, ..., with displacements (x, y)
    v          free values of a level's vertices, a sum of grids in time (models.grid_deformation.Grids)
    b          largest displacement, MAX_CELL_SHARE times the size of a cell
    d          displacement at the vertices: v / sqrt(1 + (v / b)^2), below b
    W          all levels, one after the other, coarsest first (models.kernels.warp): one-to-one for any v
    theta      affine map of a layer and frame: angle, log-scale of x, shift of x, log-scale of y, shift of y
    A          affine map with these parameters; angles and scales are those of pixels, shifts are normalized
    forward    u = A(W(x))       inverse  x = W^-1(A^-1(u))
"""

import math
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from models.activation_checkpoint import stored
from models.grid_deformation import GRID_EXTENT, Grids, layer_index, level_sides
from models.invertible import affine_matrix, solve_affine
from models.kernels.warp import TimeGrids, bounded_sum, has_kernels, transfer, unwarp, warp

MAX_CELL_SHARE = 0.22     # largest displacement, in cells; below 1/4 every level is one-to-one
START_SHARE = 0.95        # share of the largest displacement that initial values use at most
THETA = 5                 # number of parameters of an affine map


class LayerWarps(nn.Module):
    """Maps of a video of `num_frames` frames of `size` (H, W); initialized to the identity."""

    def __init__(self, num_frames: int, size: tuple[int, int], depth_range: tuple[float, float] = (0.0, 2.0),
                 num_levels: int = 6, num_layers: int = 2):
        super().__init__()
        self.near = depth_range[0]
        self.range = depth_range[1] - depth_range[0]
        self.num_layers = num_layers
        self.aspect = (size[0] - 1) / (size[1] - 1)  # pixels per normalized unit of y, divided by those of x
        self.layers = Grids(num_frames, 2 * num_layers, [(R, R) for R in level_sides(num_levels)])
        self.thetas = Grids(num_frames, THETA * num_layers, [(1,)])
        self.largest = [MAX_CELL_SHARE * 2 * GRID_EXTENT / (R - 1) for R in level_sides(num_levels)]  # b

    def vertices(self, level: int = -1) -> Tensor:
        """Positions of a level's vertices `(R, R, 2)`, (x, y) in normalized coordinates."""
        side = torch.linspace(-1, 1, self.layers.sides[level][0])
        y, x = torch.meshgrid(side, side, indexing="ij")
        return torch.stack([x, y], dim=-1) * GRID_EXTENT

    @torch.no_grad()
    def start_at(self, thetas: Tensor, target: Tensor) -> None:
        """Initialize a new network.

        `thetas` `(T, S, 5)`; `target` `(T, S, R, R, 2)`: canonical (x, y) of the finest level's vertices. Of what the
        affine maps leave, each level in turn takes the part that it can hold."""
        self.thetas.values[-1].copy_(thetas.flatten(1)[..., None] / self.thetas.scales[-1])
        device = target.device
        T, S, R, _, _ = target.shape
        n = self.layers.num_grids
        layer = torch.arange(S, device=device).expand(T, S)
        every_layer = layer.repeat_interleave(R * R, dim=1)
        y = self.without_affine(target.flatten(1, 3), every_layer, thetas).view_as(target)
        wanted = [(y - self.vertices().to(device)).movedim(-1, 2).contiguous()]  # one level that holds all
        tables: list[Tensor] = []
        for level, largest in enumerate(self.largest):
            y = self.vertices(level).to(device)  # (R, R, 2)
            R = len(y)
            points = y.expand(T, S, R, R, 2).flatten(1, 3)  # (T, S R R, 2)
            of_layer = layer.repeat_interleave(R * R, dim=1)
            x = unwarp(points, of_layer, tables, GRID_EXTENT) if tables else points
            d = warp(x, of_layer, wanted, GRID_EXTENT) - points  # (T, S R R, 2)
            d = d.clamp(-START_SHARE * largest, START_SHARE * largest)
            d = d.unflatten(1, (S, R, R)).movedim(-1, 2).contiguous()  # (T, S, 2, R, R)
            tables.append(d)
            values = d / torch.sqrt(1 - (d / largest).square())
            number = (level + 1) * n - 1  # the grid with one moment a frame
            self.layers.values[number].copy_(values.flatten(1, 2) / self.layers.scales[number])

    def coefficients(self, thetas: Tensor) -> Tensor:
        """Coefficients as `models.invertible.affine_matrix` `(B, S, 6)`, of parameters `(B, S, 5)`."""
        a, b, c, d, tx, ty = affine_matrix(thetas)
        return torch.stack([a, b * self.aspect, c / self.aspect, d, tx, ty], dim=-1)

    def affine(self, layer: Tensor, thetas: Tensor) -> tuple[Tensor, ...]:
        """`coefficients` at points of layers `(B, M)`, `(B, M)` each."""
        return tuple(x.gather(1, layer) for x in self.coefficients(thetas).unbind(-1))

    def without_affine(self, u: Tensor, layer: Tensor, thetas: Tensor) -> Tensor:
        """A^-1 of canonical (x, y) `(B, M, 2)` in layers `(B, M)`."""
        return torch.stack(solve_affine(self.affine(layer, thetas), *u.unbind(-1)), dim=-1)

    def bind(self, ids: Tensor) -> "WarpMaps":
        """The maps of frames `(B,)`."""
        grids = self.layers
        before = [getattr(grids, f"before_{k}") for k in range(grids.num_grids)]
        share = [getattr(grids, f"share_{k}") for k in range(grids.num_grids)]
        levels = TimeGrids(ids, list(grids.values), before, share, grids.scales, self.largest)
        thetas = bounded_sum(ids, list(self.thetas.values), before, share, self.thetas.scales, math.inf)
        return WarpMaps(self, levels, thetas.view(-1, self.num_layers, THETA))


class WarpMaps:
    """Maps of B frames between their local volumes and the canonical one, `(B, M, 3)` -> `(B, M, 3)`; same interface
    as `models.invertible.FrameMaps`."""

    def __init__(self, network: LayerWarps, levels: TimeGrids | list[Tensor], thetas: Tensor):
        self.network = network
        self.levels = levels  # values as grids in time, or tables of each level (B, S, 2, R, R)
        self.thetas = thetas  # (B, S, 5)
        self.call = stored  # or `recomputed` (models.activation_checkpoint): whether activations are kept

    def select(self, index: Tensor | slice) -> "WarpMaps":
        """The maps of some of the frames, `index` `(B',)` or a slice into the bound ones."""
        out = WarpMaps(self.network, [table[index] for table in self.tables], self.thetas[index])
        out.call = self.call
        return out

    @cached_property
    def tables(self) -> list[Tensor]:
        """Tables of each level; computed at the first use, before `call`, which must not compute them again."""
        return self.levels.tables() if isinstance(self.levels, TimeGrids) else self.levels

    def to_canonical(self, x: Tensor) -> Tensor:
        """Local points to canonical ones (forward)."""
        return self.call(partial(self._forward, self.tables), x)

    def rays_to_canonical(self, x: Tensor) -> Tensor:
        """`to_canonical` of samples `(B, N, K, 3)` on N rays."""
        return self.to_canonical(x.flatten(1, 2)).view_as(x)

    def to_local(self, u: Tensor) -> Tensor:
        """Canonical points to local ones (inverse)."""
        return self.call(partial(self._inverse, self.tables), u)

    def transfer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Local samples `(B, N, K, 3)` of the first B of 2 B frames to canonical ones, and to local ones of the last B.
        Same result as `rays_to_canonical` and `to_local`."""
        B, N, K, _ = x.shape
        if not isinstance(self.levels, TimeGrids) or self.call is not stored or not has_kernels(x):
            u = self.select(slice(B)).rays_to_canonical(x)
            return u, self.select(slice(B, None)).to_local(u.flatten(1, 2)).view_as(x)
        z = x[..., 2:]
        layer = self.layer_of(z).view(B, N * K)
        ends = transfer(x[..., :2].reshape(B, N * K, 2), layer, self.network.coefficients(self.thetas), self.levels,
                        GRID_EXTENT)
        u, target = (torch.cat([end.view(B, N, K, 2), z], dim=-1) for end in ends)
        return u, target

    def _forward(self, tables: list[Tensor], x: Tensor) -> Tensor:
        layer = self.layer_of(x[..., 2])
        px, py = warp(x[..., :2], layer, tables, GRID_EXTENT).unbind(-1)
        a, b, c, d, tx, ty = self.network.affine(layer, self.thetas)
        return torch.stack([a * px + b * py + tx, c * px + d * py + ty, x[..., 2]], dim=-1)

    def _inverse(self, tables: list[Tensor], u: Tensor) -> Tensor:
        layer = self.layer_of(u[..., 2])
        y = self.network.without_affine(u[..., :2], layer, self.thetas)
        return torch.cat([unwarp(y, layer, tables, GRID_EXTENT), u[..., 2:]], dim=-1)

    def layer_of(self, z: Tensor) -> Tensor:
        """Layer index 0, 1, ... of each depth, same shape. A valid index even for NaN."""
        return layer_index(z, self.network.near, self.network.range, self.network.num_layers)
