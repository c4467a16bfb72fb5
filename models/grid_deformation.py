"""Invertible maps as free-form deformations: displacement grids instead of the MLPs of `models.invertible`.

Multilevel displacement grids register images this way (Rueckert et al., IEEE TMI 1999; one-to-one while no cell folds:
Choi & Lee, Graphical Models 2000). Evaluating a point takes a few multiplications instead of about 100,000, and its
gradient changes only the vertices around it (docs/fast.md).

Notation
    T        frames
    level    a grid of R x R vertices over the frame, R = 3, 5, 9, ...; a level's vertices are among those of the next
    moment   a time at which a grid has values, linear interpolation between moments. The finest grid has one moment a
             frame, each coarser one a quarter as many, down to MAX_COARSEST_MOMENTS or fewer
    layer    motion layer: displacements (x, y) for one of S equal depth ranges, on the finest level's vertices, summed
             over levels and interpolated to a frame. The displacement is constant over a layer's depths. Maps keep
             depths, so a layer is in front of the next one in all frames. For B frames, layers stacked along y:
             (B, 2, S R, R)
    theta    (B, 5, Z): the affine map's parameters at Z depths, linear between them
    a        coordinates scaled so that the grid spans [-1, 1]
    f(x)     displacement (x, y), interpolated in the layer that contains the point's depth
    A        affine map of (x, y) with the parameters theta at the point's depth
    forward  u = A(x + f(x))       inverse  x + f(x) = A^-1(u), solved by Newton's method
    J        Jacobian of f in (x, y), (2 displacements, 2 coordinates); maps are one-to-one where det(I + J) > 0
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.activation_checkpoint import stored
from models.invertible import apply_affine, invert_affine

PLANE = slice(2)           # index of x and y in a point's coordinates
VERTICES_PER_STEP = 8_192  # vertices that a step of configs/fast.txt reads: 16 pairs x 64 points x 2 frames x 4 corners
MAX_COARSEST_MOMENTS = 8   # no coarser grid in time is added once a grid has at most this many moments
THETA_DEPTHS = (2, 5)      # number of depths of each level of the affine map
GRID_EXTENT = 1.2          # the layers' grids span [-GRID_EXTENT, GRID_EXTENT] in normalized x and y
THETA_EXTENT = 1.1         # the affine map's grids span THETA_EXTENT times the depth range, around its center
NEWTON_STEPS_TRAINING = 1   # Newton steps between the initial guess and the differentiable last step, in training
NEWTON_STEPS_INFERENCE = 6  # the same at inference
LAYER_EDGE_MARGIN = 1e-4   # share of a layer's depth: a sample at a boundary is in the farther layer, on every machine
MIN_DETERMINANT = 0.2      # smallest |det(I + J)| that a Newton step divides by
MAX_NEWTON_STEP = 0.2      # normalized units; keeps the iteration bounded where the map folds and has no solution


def level_sides(num_levels: int) -> list[int]:
    """R of each level."""
    return [2 ** (level + 1) + 1 for level in range(num_levels)]


def moment_counts(num_frames: int) -> list[int]:
    """Number of moments of each grid of a level, fewest first. Grids with few moments share slow motion between frames;
    the last grid has one moment a frame."""
    counts = [num_frames]
    while counts[0] > MAX_COARSEST_MOMENTS or len(counts) == 1:
        counts.insert(0, max(2, -(-counts[0] // 4)))
    return counts


class Grids(nn.Module):
    """Grids `(moments, C, *side)` for each of `sides` (tuples) and each of `moment_counts`; initialized to zero.

    The change that Adam makes to a value whose gradient is rarely nonzero grows with the square root of the steps
    between nonzero gradients. Grids with more than VERTICES_PER_STEP values a channel are therefore multiplied by a
    constant scale below 1 that compensates this."""

    def __init__(self, num_frames: int, channels: int, sides: Iterable[tuple[int, ...]]):
        super().__init__()
        self.sides = list(sides)
        counts = moment_counts(num_frames)
        self.num_grids = len(counts)  # grids a level
        self.values = nn.ParameterList(
            nn.Parameter(torch.zeros(count, channels, *side)) for side in self.sides for count in counts)
        self.scales = [min(1.0, (VERTICES_PER_STEP / grid[:, 0].numel()) ** 0.5) for grid in self.values]
        for k, count in enumerate(counts):
            place = torch.linspace(0, count - 1, num_frames)
            before = place.long().clamp(max=count - 2)
            self.register_buffer(f"before_{k}", before, persistent=False)  # index of the last moment before each frame
            self.register_buffer(f"share_{k}", place - before, persistent=False)  # weight of the moment after it

    def levels(self, ids: Tensor) -> list[Tensor]:
        """Of each level, the values of frames `(B,)`: `(B, C, *side)`."""
        n = self.num_grids
        return [sum(self._at(k, level * n + k, ids) for k in range(n)) for level in range(len(self.sides))]

    def forward(self, ids: Tensor) -> Tensor:
        """Sum over the levels of the values of frames `(B,)`, on the finest level: `(B, C, *side)`."""
        total = None
        for side, here in zip(self.sides, self.levels(ids), strict=True):
            if total is not None:  # add the sum of the coarser levels, interpolated at this level's vertices
                here = here + F.interpolate(
                    total, size=side, mode="linear" if len(side) == 1 else "bilinear", align_corners=True)
            total = here
        return total

    def _at(self, k: int, number: int, ids: Tensor) -> Tensor:
        """Grid `number`, which has the k-th of `moment_counts`, at the times of frames `(B,)`: `(B, C, *side)`. Uses no
        matrix product, which might be computed in tf32."""
        grid = self.values[number]
        scale = self.scales[number]
        if len(grid) == len(self.before_0):
            here = grid.index_select(0, ids)
        else:
            before = getattr(self, f"before_{k}")[ids]
            share = getattr(self, f"share_{k}")[ids].view(-1, *[1] * (grid.dim() - 1))
            here = torch.lerp(grid.index_select(0, before), grid.index_select(0, before + 1), share)
        return here if scale == 1 else here * scale


def sample(grid: Tensor, a: Tensor) -> Tensor:
    """Linear interpolation of `(B, C, R)` or `(B, C, R_2, R_1)` at `a` `(B, M, 1 or 2)` in [-1, 1] -> `(B, C, M)`.
    Outside [-1, 1] the nearest border value is used. The first coordinate of `a` runs along the grid's last
    dimension."""
    if a.shape[-1] == 1:
        grid, a = grid[:, :, None], torch.cat([a, torch.zeros_like(a)], dim=-1)
    return F.grid_sample(grid, a[:, None], padding_mode="border", align_corners=True)[:, :, 0]


class GridNetwork(nn.Module):
    """Displacements and affine map of a video of `num_frames` frames as grids; initialized to the identity."""

    def __init__(self, num_frames: int, depth_range: tuple[float, float] = (0.0, 2.0), num_levels: int = 6,
                 num_layers: int = 2):
        super().__init__()
        self.near = depth_range[0]
        self.range = depth_range[1] - depth_range[0]
        self.num_layers = num_layers
        self.layers = Grids(num_frames, 2 * num_layers, [(R, R) for R in level_sides(num_levels)])
        self.thetas = Grids(num_frames, 5, [(Z,) for Z in THETA_DEPTHS])

    def vertices(self) -> Tensor:
        """Positions of the finest level's vertices `(R, R, 2)`, (x, y) in normalized coordinates."""
        side = torch.linspace(-1, 1, self.layers.sides[-1][0])
        y, x = torch.meshgrid(side, side, indexing="ij")
        return torch.stack([x, y], dim=-1) * GRID_EXTENT

    @torch.no_grad()
    def start_at(self, displacement: Tensor) -> None:
        """Initialize the displacements of the vertices of every frame and layer to `(T, S, R, R, 2)`, normalized
        coordinates. For a new network only: the other grids must still be zero."""
        self.layers.values[-1].copy_(displacement.movedim(-1, 1).flatten(1, 2) / self.layers.scales[-1])

    def bind(self, ids: Tensor) -> "GridMaps":
        """The maps of frames `(B,)`. The sum over levels is computed once, here."""
        layers = self.layers(ids).unflatten(1, (2, self.num_layers)).flatten(2, 3)
        return GridMaps(self, layers, self.thetas(ids))


class GridMaps:
    """Maps of B frames between their local volumes and the canonical one, `(B, M, 3)` -> `(B, M, 3)`; same interface
    as `models.invertible.FrameMaps`."""

    def __init__(self, network: GridNetwork, layers: Tensor, thetas: Tensor):
        self.network = network
        self.layers = layers
        self.thetas = thetas
        self._table: Tensor | None = None  # the layers (2, B S R R), for `displacement_and_slope`
        self.call = stored  # or `recomputed` (models.activation_checkpoint): whether activations are kept

    def select(self, index: Tensor | slice) -> "GridMaps":
        """The maps of some of the frames, `index` `(B',)` or a slice into the bound ones."""
        out = GridMaps(self.network, self.layers[index], self.thetas[index])
        out.call = self.call
        return out

    def to_canonical(self, x: Tensor) -> Tensor:
        """Local points to canonical ones (forward)."""
        return self.call(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        return apply_affine(self._theta(x[..., 2]), shifted(x, self.displacement(x)))

    def rays_to_canonical(self, x: Tensor) -> Tensor:
        """`to_canonical` of samples `(B, N, K, 3)` on N rays. The samples of a ray differ in depth only, and all rays
        have the same depths: each layer is interpolated once a ray, the affine map's parameters once a depth."""
        return self.call(self._rays_forward, x)

    def _rays_forward(self, x: Tensor) -> Tensor:
        B, N = x.shape[:2]
        S = self.network.num_layers
        z = x[:, 0, :, 2]  # (B, K)
        xy = x[:, :, :1, PLANE].expand(-1, -1, S, -1).flatten(1, 2)  # (B, N S, 2): each ray once a layer
        layer = torch.arange(S, device=x.device).repeat(N).expand(B, -1)  # (B, N S)
        in_layers = self._layers_at(xy, layer).unflatten(2, (N, S))  # (B, 2, N, S)
        f = in_layers.gather(3, self._layer(z)[:, None, None].expand(-1, 2, N, -1))  # (B, 2, N, K)
        return apply_affine(self._theta(z)[:, None], shifted(x, f.movedim(1, -1)))

    def to_local(self, u: Tensor) -> Tensor:
        """Canonical points to local ones (inverse): two Newton steps where gradients are required, else seven. After
        two steps the error of the worst 1% of points of a steep map is 0.002 (normalized units). Where the map folds,
        an inverse may not exist; the result is then finite but arbitrary."""
        return self.call(self._inverse, u)

    def _inverse(self, u: Tensor) -> Tensor:
        y = invert_affine(self._theta(u[..., 2]), u)
        with torch.no_grad():
            x = shifted(y, -self.displacement(y))
            for _ in range(NEWTON_STEPS_TRAINING if u.requires_grad else NEWTON_STEPS_INFERENCE):
                f, J = self.displacement_and_slope(x)
                step = along(inverse_of(J), (y - x)[..., PLANE] - f)
                x = shifted(x, step.clamp(-MAX_NEWTON_STEP, MAX_NEWTON_STEP))
            inverse = inverse_of(self.displacement_and_slope(x)[1])
        # The last step is differentiable; its gradient is that of the solution (implicit function theorem).
        x = torch.cat([x[..., PLANE], y[..., 2:]], dim=-1)
        step = along(inverse, (y - x)[..., PLANE] - self.displacement(x))
        return shifted(x, step.clamp(-MAX_NEWTON_STEP, MAX_NEWTON_STEP))

    def displacement(self, x: Tensor) -> Tensor:
        """f at points `(B, M, 3)`, `(B, M, 2)`."""
        return self._layers_at(x[..., PLANE], self._layer(x[..., 2])).transpose(1, 2)

    def _layers_at(self, xy: Tensor, layer: Tensor) -> Tensor:
        """Displacements `(B, 2, M)` of the layers `(B, M)` at positions `(B, M, 2)`. One 2D interpolation in the
        stacked layers, on a CPU many times faster than a 3D one."""
        last = self.layers.shape[3] - 1
        x, y = (xy / GRID_EXTENT).unbind(-1)
        rows = (y.clamp(-1, 1) + 1) / 2 * last + layer * (last + 1)  # clamped: border values outside
        return sample(self.layers, torch.stack([x, rows * (2 / (self.layers.shape[2] - 1)) - 1], dim=-1))

    def _layer(self, z: Tensor) -> Tensor:
        return layer_index(z, self.network.near, self.network.range, self.network.num_layers)

    def displacement_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f `(B, M, 2)` and J `(B, M, 2, 2)` at points `(B, M, 3)`, without gradients. On an edge between two cells, J
        is that of one of them."""
        B = len(self.layers)
        R = self.layers.shape[-1]
        S = self.network.num_layers
        if self._table is None:
            self._table = self.layers.detach().transpose(0, 1).reshape(2, -1)
        place = (x[..., PLANE].reshape(-1, 2).T / GRID_EXTENT + 1) / 2 * (R - 1)  # (2, B M), in cells
        clamped = place.clamp(0, R - 1)
        cell = clamped.long().clamp(0, R - 2)  # clamped again: a valid index even for NaN
        share = clamped - cell
        frame = torch.arange(B, device=x.device).repeat_interleave(x.shape[1])
        corner = ((frame * S + self._layer(x[..., 2]).flatten()) * R + cell[1]) * R + cell[0]
        corners = torch.cat([corner, corner + 1, corner + R, corner + R + 1])  # (4 B M)
        v = self._table.index_select(1, corners).view(2, 2, 2, -1)  # displacement, y, x
        by_x = v[:, :, 1] - v[:, :, 0]  # (2, 2, B M): differences along x at both y
        v = v[:, :, 0] + share[0] * by_x  # (2, 2, B M)
        by_x = torch.lerp(by_x[:, 0], by_x[:, 1], share[1])  # (2, B M)
        by_y = v[:, 1] - v[:, 0]
        f = v[:, 0] + share[1] * by_y
        cells = (R - 1) / 2 / GRID_EXTENT * (place == clamped)  # per unit of x and y; 0 outside the grid
        J = torch.stack([by_x * cells[0], by_y * cells[1]])  # coordinate, displacement, B M
        return f.T.reshape(*x.shape[:-1], 2), J.permute(2, 1, 0).reshape(*x.shape[:-1], 2, 2)

    def _theta(self, z: Tensor) -> Tensor:
        """The affine map's parameters `(B, M, 5)` at depths `(B, M)`."""
        a = ((z - self.network.near) * (2 / self.network.range) - 1) / THETA_EXTENT
        return sample(self.thetas, a[..., None]).transpose(1, 2)


def shifted(x: Tensor, step: Tensor) -> Tensor:
    """Points `(..., 3)` moved by steps `(..., 2)` of (x, y)."""
    return torch.cat([x[..., PLANE] + step, x[..., 2:]], dim=-1)


def inverse_of(J: Tensor) -> Tensor:
    """(I + J)^-1 of J `(..., 2, 2)`, with |det(I + J)| clamped to at least MIN_DETERMINANT."""
    a, b, c, d = (J + torch.eye(2, dtype=J.dtype, device=J.device)).flatten(-2).unbind(-1)
    det = a * d - b * c
    det = torch.where(det.abs() < MIN_DETERMINANT, torch.where(det < 0, -MIN_DETERMINANT, MIN_DETERMINANT), det)
    return torch.stack([d, -b, -c, a], dim=-1).unflatten(-1, (2, 2)) / det[..., None, None]


def along(matrix: Tensor, vector: Tensor) -> Tensor:
    """Products `(..., 2)` of matrices `(..., 2, 2)` and vectors, in float32 (a matrix product might be in tf32)."""
    return (matrix * vector[..., None, :]).sum(-1)


def layer_index(z: Tensor, near: float, depth_range: float, num_layers: int) -> Tensor:
    """Index 0, 1, ... of the layer that contains each depth, same shape. A valid index even for NaN."""
    place = (z - near) * (num_layers / depth_range) + LAYER_EDGE_MARGIN
    return place.clamp(0, num_layers - 1).long().clamp(0, num_layers - 1)
