"""Composed displacement grids: a map of the plane that is one-to-one by construction, its inverse, and their gradients.

In C++ on a CPU with g++ (native/warp.cpp, transfer.cpp, bounded_sum.cpp); otherwise in PyTorch.

Notation
    B, M, S     frames, points of a frame, layers
    level l     a grid of R_l x R_l vertices over [-extent, extent]^2; levels are in the order in which they are applied
    v           free values of a level's vertices: a sum of grids in time, each (moments, C, R_l, R_l)
    tables      of each level, the displacements (x, y) of the vertices of every frame and layer  (B, S, 2, R_l, R_l):
                v / sqrt(1 + (v / b)^2), whose absolute value is below b, the largest displacement
    d_l(x)      displacement at x, interpolated linearly; outside the grid, that of the nearest border point
    phi_l       x + d_l(x)
    warp        phi_L o ... o phi_1
    J           Jacobian of d_l: (dx/dx, dx/dy, dy/dx, dy/dy), one-sided on the edges of cells

A level whose displacements are at most a quarter of a cell, in both coordinates, changes distances by less than their
own size: it is a contraction c with |c| < 1 in the maximum norm. Therefore phi_l is one-to-one, and the iteration
x <- y - d_l(x) converges to its inverse. Newton's method is used where it is faster.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.kernels import native

TOLERANCE = 2e-7           # normalized units: residual at which the iteration ends
MAX_ITERATIONS = 200
SUFFICIENT_DECREASE = 0.5  # of the residual, for a Newton step to be taken


def warp(points: Tensor, layer: Tensor, tables: Sequence[Tensor], extent: float) -> Tensor:
    """Points `(B, M, 2)` of layers `(B, M)` int64 after all levels, `(B, M, 2)`."""
    if has_kernels(points):
        return _Warp.apply(points.contiguous(), layer.contiguous(), extent, False, *tables)
    return warp_plain(points, layer, tables, extent)


def unwarp(points: Tensor, layer: Tensor, tables: Sequence[Tensor], extent: float) -> Tensor:
    """Inverse of `warp`. Its gradient is that of the solution (implicit function theorem)."""
    if has_kernels(points):
        return _Warp.apply(points.contiguous(), layer.contiguous(), extent, True, *tables)
    return unwarp_plain(points, layer, tables, extent)


@dataclass
class TimeGrids:
    """The values v of all levels in the frames `ids`, as grids in time, those of the first level first."""
    ids: Tensor               # (B,) int64
    grids: Sequence[Tensor]   # (moments, 2 S, R, R)
    before: Sequence[Tensor]  # of the grids of any level: see `bounded_sum`
    share: Sequence[Tensor]   # the same
    scales: Sequence[float]   # factor of each grid's values
    largest: Sequence[float]  # of each level: b

    def tables(self) -> list[Tensor]:
        """Tables `(B, S, 2, R, R)` of each level."""
        n = len(self.before)
        out = []
        for level, largest in enumerate(self.largest):
            own = slice(level * n, (level + 1) * n)
            out.append(bounded_sum(self.ids, self.grids[own], self.before, self.share, self.scales[own], largest))
        return [table.unflatten(1, (-1, 2)) for table in out]


def transfer(points: Tensor, layer: Tensor, affine: Tensor, levels: TimeGrids, extent: float) -> tuple[Tensor, Tensor]:
    """Points `(B, M, 2)` of the first B of the 2 B frames of `levels`: canonical ones, and those of the last B frames.

    The same as `warp`, affine maps, their inverses and `unwarp` with the tables of `levels`, but tables are in memory
    for one frame and layer at a time. Only for points that `has_kernels` is true for.
    affine: coefficients (a, b, c, d, tx, ty) `(2 B, S, 6)` of the maps from warped points to canonical ones."""
    return _Transfer.apply(points.contiguous(), layer.contiguous(), affine.contiguous(), extent, levels, *levels.grids)


def bounded_sum(ids: Tensor, grids: Sequence[Tensor], before: Sequence[Tensor], share: Sequence[Tensor],
                scales: Sequence[float], largest: float) -> Tensor:
    """Displacements of a level in frames `ids` `(B,)`, `(B, C, R, R)`, from `grids` `(moments, C, R, R)`. Without a
    bound (b infinite), grids can have any shape `(moments, C, ...)`.

    before, share: for each grid, of every frame of the video, the moment before it and the weight of the next moment,
    `(T,)`. scales: factor of each grid's values. largest: b."""
    if ids.device.type == "cpu" and grids[0].dtype == torch.float32 and native.warp_kernels() is not None:
        return _BoundedSum.apply(ids.contiguous(), before, share, scales, largest, *grids)
    return bounded_sum_plain(ids, grids, before, share, scales, largest)


def bounded_sum_plain(ids: Tensor, grids: Sequence[Tensor], before: Sequence[Tensor], share: Sequence[Tensor],
                      scales: Sequence[float], largest: float) -> Tensor:
    """`bounded_sum` in PyTorch."""
    v = 0
    for grid, first, weight, scale in zip(grids, before, share, scales, strict=True):
        first = first[ids]
        second = (first + 1).clamp(max=len(grid) - 1)
        v = v + scale * torch.lerp(grid[first], grid[second], weight[ids].view(-1, *[1] * (grid.dim() - 1)))
    return v / torch.sqrt(1 + (v / largest).square())


class _BoundedSum(torch.autograd.Function):
    """The C++ kernels of `bounded_sum`."""

    @staticmethod
    def forward(ctx, ids, before, share, scales, largest, *grids):
        arguments = (before, share, scales, largest)
        out = native.warp_kernels().bounded_sum(ids, grids, *arguments)
        ctx.save_for_backward(ids, out, *grids)
        ctx.arguments = arguments
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ids, out, *grids = ctx.saved_tensors
        of_grids = native.warp_kernels().bounded_sum_backward(ids, grids, *ctx.arguments, out, gradient.contiguous())
        return None, None, None, None, None, *of_grids


def has_kernels(points: Tensor) -> bool:
    """Whether `points` are mapped by the C++ kernels."""
    return points.device.type == "cpu" and points.dtype == torch.float32 and native.warp_kernels() is not None


class _Warp(torch.autograd.Function):
    """The C++ kernels. Only positions are stored for the backward pass."""

    @staticmethod
    def forward(ctx, points: Tensor, layer: Tensor, extent: float, inverted: bool, *tables: Tensor) -> Tensor:
        kernels = native.warp_kernels()
        tables = [table.contiguous() for table in tables]
        out = (kernels.unwarp if inverted else kernels.warp)(points, layer, tables, extent)
        ctx.save_for_backward(out if inverted else points, layer, *tables)
        ctx.settings = (extent, inverted)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        local, layer, *tables = ctx.saved_tensors
        extent, inverted = ctx.settings
        of_points, of_tables = native.warp_kernels().backward(
            local, layer, tables, extent, gradient.contiguous(), inverted)
        return of_points, None, None, None, *of_tables


class _Transfer(torch.autograd.Function):
    """The C++ kernels of `transfer`."""

    @staticmethod
    def forward(ctx, points: Tensor, layer: Tensor, affine: Tensor, extent: float, levels: TimeGrids, *grids: Tensor):
        ids = levels.ids.contiguous()
        in_time = (levels.before, levels.share, levels.scales, levels.largest)
        out = native.warp_kernels().transfer(points, layer, affine, extent, ids, grids, *in_time)
        ctx.save_for_backward(points, layer, affine, *out, ids, *grids)
        ctx.settings = (extent, in_time)
        return out

    @staticmethod
    def backward(ctx, of_canonical: Tensor, of_target: Tensor):
        points, layer, affine, canonical, target, ids, *grids = ctx.saved_tensors
        extent, in_time = ctx.settings
        of_points, of_affine, of_grids = native.warp_kernels().transfer_backward(
            points, layer, affine, extent, ids, grids, *in_time, canonical, target, of_canonical.contiguous(),
            of_target.contiguous())
        return of_points, None, of_affine, None, None, *of_grids


def warp_plain(points: Tensor, layer: Tensor, tables: Sequence[Tensor], extent: float) -> Tensor:
    """`warp` in PyTorch."""
    for table in tables:
        points = points + displacement(points, layer, table, extent)[0]
    return points


def unwarp_plain(points: Tensor, layer: Tensor, tables: Sequence[Tensor], extent: float) -> Tensor:
    """`unwarp` in PyTorch."""
    for table in reversed(tables):
        with torch.no_grad():
            x = _solution(points, layer, table, extent)
        d, J = displacement(x, layer, table, extent)
        # a step from the solution: no change of value, and the gradient of the solution
        points = x + _solve(J.detach(), points - x - d)
    return points


def _solution(y: Tensor, layer: Tensor, table: Tensor, extent: float) -> Tensor:
    """x with x + d(x) = y, `(B, M, 2)`."""
    x = y
    d, J = displacement(x, layer, table, extent)
    residual = y - x - d
    tolerance = TOLERANCE * y.abs().amax(-1, keepdim=True).clamp(min=1)
    for _ in range(MAX_ITERATIONS):
        error = residual.abs().amax(-1, keepdim=True)
        if not (error > tolerance).any():
            break
        guess = x + _solve(J, residual)
        left = y - guess - displacement(guess, layer, table, extent)[0]
        newton = left.abs().amax(-1, keepdim=True) <= SUFFICIENT_DECREASE * error
        moved = torch.where(newton, guess, x + residual)  # a fixed-point step always reduces the residual
        x = torch.where(error > tolerance, moved, x)
        d, J = displacement(x, layer, table, extent)
        residual = y - x - d
    return x


def displacement(points: Tensor, layer: Tensor, table: Tensor, extent: float) -> tuple[Tensor, Tensor]:
    """d_l `(B, M, 2)` and J `(B, M, 4)` at points `(B, M, 2)` of layers `(B, M)`, for the `table` of one level."""
    B, S, _, R, _ = table.shape
    cells = (R - 1) / (2 * extent)
    place = (points + extent) * cells  # (B, M, 2)
    clamped = torch.where(place >= 0, place.clamp(max=R - 1), torch.zeros_like(place))  # 0 for NaN
    cell = clamped.detach().long().clamp(max=R - 2)
    right, down = (clamped - cell).unbind(-1)
    frame = torch.arange(B, device=points.device)[:, None]
    corner = ((frame * S + layer) * 2 * R + cell[..., 1]) * R + cell[..., 0]  # (B, M), of the x component
    next_one = torch.arange(2, device=points.device)  # made on the device: a copy to it would wait for all work there
    offsets = (next_one[:, None, None] * R + next_one[:, None]) * R + next_one  # (component, y, x)
    v = table.flatten()[corner[..., None, None, None] + offsets]  # (B, M, component, y, x)
    along_x = v[..., 1] - v[..., 0]  # (B, M, component, y)
    rows = v[..., 0] + right[..., None, None] * along_x
    along_y = rows[..., 1] - rows[..., 0]  # (B, M, component)
    d = rows[..., 0] + down[..., None] * along_y
    inside = (clamped == place).to(points.dtype) * cells
    slope_x = torch.lerp(along_x[..., 0], along_x[..., 1], down[..., None]) * inside[..., :1]
    slope_y = along_y * inside[..., 1:]
    return d, torch.stack([slope_x, slope_y], dim=-1).flatten(-2)


def _solve(J: Tensor, v: Tensor) -> Tensor:
    """(I + J)^-1 v, for J `(..., 4)` and v `(..., 2)`."""
    a, b, c, d = J.unbind(-1)
    a = 1 + a
    d = 1 + d
    x, y = v.unbind(-1)
    return torch.stack([d * x - b * y, a * y - c * x], dim=-1) / (a * d - b * c)[..., None]
