"""Invertible maps as free-form deformations: what MLPs compute in `models.invertible` is interpolated here.

Multilevel displacement grids register images this way (Rueckert et al., IEEE TMI 1999; one-to-one while no cell folds:
Choi & Lee, Graphical Models 2000). A point costs a few multiplications instead of a hundred thousand, and moves a place
of one frame and depth and nothing else.

Notation
    T        frames
    level    a grid of R x R vertices over the frame, R = 3, 5, 9, ...; a level's vertices are among those of the next
    moment   a time at which a grid has values; linear between two of them. There are grids with a moment a frame, with
             a quarter as many, a quarter of these, and so on, down to eight or less
    sheet    the displacement at one depth, on the finest level's vertices, all levels and moments together; of B frames
             (B, 3, S, R, R). S sheets are evenly spaced, the first just before the nearest depth, the last just behind
             the farthest one, where a is -1 and 1
    theta    (B, 5, Z): the affine map's parameters at Z depths, linear between them
    a        a point in units in which the grids span [-1, 1]
    f(x)     displacement: interpolated over the frame in the sheets, and linear in depth between two of them
    A        the affine map of (x, y), by theta at the point's depth
    forward  u = A(x + f(x))       inverse  x + f(x) = A^-1(u), solved by Newton's method
    J        derivative of f (3 displacements, 3 coordinates); x -> x + f(x) is one-to-one where det(I + J) > 0
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.invertible import apply_affine, invert_affine
from models.recompute import stored

SHEETS = 4  # two layers of motion, two sheets each: what lies in one layer moves alike wherever a ray is sampled
VISITS = 8_192  # of vertices in a step of configs/fast.txt: 16 pairs, 64 points, 2 frames, 4 corners
FEW = 8  # moments, of which a quarter is not worth a grid
THETA_DEPTHS = (2, 5)  # depths of the affine map's levels
MARGIN = (1.2, 1.2, 1.1)  # half the sides of the grids, in units of half the frame and half the range of depths
NEWTON = (1, 6)  # steps after the first guess and before the last step: in training, at inference
LEAST, REACH = 0.2, 1 / 6  # least det(I + J) and largest step (of a): near a fold without solution nothing runs away


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
    """Grids `(moments, C, *side)` of all `sides` (tuples) for each of `moment_counts`; zero at the start.

    What Adam moves a value by at a visit grows with the square root of the steps between visits: the parameters of
    grids that have more than VISITS values a channel are multiplied by a scale that takes this back."""

    def __init__(self, num_frames: int, channels: int, sides: Iterable[tuple[int, ...]]):
        super().__init__()
        self.sides = list(sides)
        counts = moment_counts(num_frames)
        self.num_grids = len(counts)  # of a level
        self.values = nn.ParameterList(
            nn.Parameter(torch.zeros(count, channels, *side)) for side in self.sides for count in counts)
        self.scales = [min(1.0, (VISITS / grid[:, 0].numel()) ** 0.5) for grid in self.values]
        for k, count in enumerate(counts):
            place = torch.linspace(0, count - 1, num_frames)
            before = place.long().clamp(max=count - 2)
            self.register_buffer(f"before_{k}", before, persistent=False)  # the moment before each frame
            self.register_buffer(f"share_{k}", place - before, persistent=False)  # of the moment after it

    def forward(self, ids: Tensor) -> Tensor:
        """Values of frames `(B,)` on the finest level `(B, C, *side)`."""
        n, total = self.num_grids, None
        for level, side in enumerate(self.sides):
            here = sum(self._at(k, level * n + k, ids) for k in range(n))  # (B, C, *side)
            if total is not None:  # the coarser levels' interpolation, at this level's vertices
                here = here + F.interpolate(
                    total, size=side, mode="linear" if len(side) == 1 else "bilinear", align_corners=True)
            total = here
        return total

    def _at(self, k: int, number: int, ids: Tensor) -> Tensor:
        """A grid of the k-th kind at the times of frames `(B,)`: `(B, C, *side)`. No product of matrices, which might
        be rounded to tf32."""
        grid, scale = self.values[number], self.scales[number]
        if len(grid) == len(self.before_0):
            here = grid.index_select(0, ids)
        else:
            before = getattr(self, f"before_{k}")[ids]
            share = getattr(self, f"share_{k}")[ids].view(-1, *[1] * (grid.dim() - 1))
            here = torch.lerp(grid.index_select(0, before), grid.index_select(0, before + 1), share)
        return here if scale == 1 else here * scale

    def plain(self, ids: Tensor, a: Tensor) -> Tensor:
        """Values `(B, C, M)` at points `a` `(B, M, D)` of frames `(B,)` by the definition, every level interpolated by
        itself: the twin of `sample(self(ids), a)` that tests compare with."""
        num_frames = len(self.before_0)
        at_frames = (torch.einsum("tm,m...->t...", hats(num_frames, len(grid)), grid * scale)[ids]
                     for grid, scale in zip(self.values, self.scales, strict=True))
        return sum(sample(grid, a) for grid in at_frames)


def sample(grid: Tensor, a: Tensor) -> Tensor:
    """Linear interpolation of `(B, C, R)` or `(B, C, R_2, R_1)` at `a` `(B, M, 1 or 2)` in [-1, 1], the values at the
    border outside it -> `(B, C, M)`. The first coordinate of `a` runs along the grid's last dimension."""
    if a.shape[-1] == 1:
        grid, a = grid[:, :, None], torch.cat([a, torch.zeros_like(a)], dim=-1)
    return F.grid_sample(grid, a[:, None], padding_mode="border", align_corners=True)[:, :, 0]


class GridNetwork(nn.Module):
    """Displacements and affine map of a video of `num_frames` frames as grids, the identity at the start."""

    def __init__(self, num_frames: int, depth_range: tuple[float, float] = (0.0, 2.0), num_levels: int = 6):
        super().__init__()
        near, far = depth_range
        self.register_buffer("centre", torch.tensor([0, 0, (near + far) / 2]), persistent=False)
        self.register_buffer("extent", torch.tensor([1, 1, (far - near) / 2]) * torch.tensor(MARGIN), persistent=False)
        last = [2 ** num_levels, 2 ** num_levels, SHEETS - 1]  # of the finest vertices along x, y and depth
        self.register_buffer("last", torch.tensor(last)[:, None], persistent=False)
        self.sheets = Grids(num_frames, 3 * SHEETS, [(R, R) for R in level_sides(num_levels)])
        self.thetas = Grids(num_frames, 5, [(Z,) for Z in THETA_DEPTHS])

    def vertices(self) -> Tensor:
        """Where the finest level's vertices are, `(R, R, 2)` (x, y) in normalised coordinates."""
        side = torch.linspace(-1, 1, self.sheets.sides[-1][0])
        y, x = torch.meshgrid(side, side, indexing="ij")
        return torch.stack([x, y], dim=-1) * self.extent[:2].cpu()

    @torch.no_grad()
    def start_at(self, near: Tensor, far: Tensor) -> None:
        """Displace the vertices of every frame by `near` `(T, R, R, 2)`, normalised, in the nearer half of the sheets,
        and by `far` in the others; depths stay. Only a new network's grids, which are zero, are then what is given."""
        finest = self.sheets.values[-1].unflatten(1, (3, SHEETS))  # (T, 3, S, R, R)
        for some, displacement in ((slice(SHEETS // 2), near), (slice(SHEETS // 2, None), far)):
            finest[:, :2, some] = displacement.movedim(-1, 1)[:, :, None] / self.sheets.scales[-1]

    def bind(self, ids: Tensor) -> "GridMaps":
        """The maps of frames `(B,)`; all levels are added up once, here."""
        return GridMaps(self, self.sheets(ids).unflatten(1, (3, SHEETS)), self.thetas(ids))


class GridMaps:
    """Maps of B frames between their local volumes and the canonical one, `(B, M, 3)` -> `(B, M, 3)`; what
    `models.invertible.FrameMaps` offers."""

    def __init__(self, network: GridNetwork, sheets: Tensor, thetas: Tensor):
        self.network, self.sheets, self.thetas = network, sheets, thetas
        self._table: Tensor | None = None  # the sheets (3, B S R R), for `displacement_and_slope`
        self.call = stored  # or models.recompute.recomputed: how the backward pass gets at activations

    def select(self, index: Tensor | slice) -> "GridMaps":
        """The maps of some of the frames, `index` `(B',)` or a slice into the bound ones."""
        out = GridMaps(self.network, self.sheets[index], self.thetas[index])
        out.call = self.call
        return out

    def to_canonical(self, x: Tensor) -> Tensor:
        """Local points to canonical ones (forward)."""
        return self.call(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        x = x + self.displacement(x)
        return apply_affine(self._theta(x[..., 2]), x)

    def rays_to_canonical(self, x: Tensor) -> Tensor:
        """`to_canonical` of samples `(B, N, K, 3)`."""
        return self.to_canonical(x.flatten(1, 2)).view_as(x)

    def to_local(self, u: Tensor) -> Tensor:
        """Canonical points to local ones (inverse): two Newton steps where gradients are wanted, which leaves 0.002 of
        half a frame in a hundredth of the points of a steep map; else seven. Where the map folds, there may be no such
        point, and this one means nothing."""
        return self.call(self._inverse, u)

    def _inverse(self, u: Tensor) -> Tensor:
        y, reach = invert_affine(self._theta(u[..., 2]), u), REACH * self.network.extent
        with torch.no_grad():
            x = y - self.displacement(y)
            for _ in range(NEWTON[0] if u.requires_grad else NEWTON[1]):
                f, J = self.displacement_and_slope(x)
                x = x + along(inverse_of(J), y - x - f).clamp(-reach, reach)
            step = inverse_of(self.displacement_and_slope(x)[1])
        # The last step: its derivatives are those of the solution (implicit function theorem).
        return x + along(step, y - x - self.displacement(x)).clamp(-reach, reach)

    def displacement(self, x: Tensor) -> Tensor:
        """f at points `(B, M, 3)`, the same shape."""
        a = (x - self.network.centre) / self.network.extent
        values = sample(self.sheets.flatten(1, 2), a[..., :2]).unflatten(1, (3, -1))  # (B, 3, S, M)
        # A CPU interpolates in a plane many times faster than in a volume: all sheets, and then between two of them.
        return (values * sheet_shares(a[..., 2])[:, None]).sum(2).transpose(1, 2)

    def displacement_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f `(B, M, 3)` and J `(B, M, 3, 3)` at points, without gradients. Between vertices f has one of both sides'
        slopes."""
        B, _, S, R, _ = self.sheets.shape
        if self._table is None:
            self._table = self.sheets.detach().transpose(0, 1).reshape(3, -1)
        a = (x - self.network.centre) / self.network.extent
        last = self.network.last
        place = (a.reshape(-1, 3).T + 1) / 2 * last  # (3, B M), in cells
        clamped = place.clamp(min=0).minimum(last)
        cell = clamped.long().clamp(min=0).minimum(last - 1)  # of a point that is not finite, too
        share = clamped - cell
        frame = torch.arange(B, device=x.device).repeat_interleave(x.shape[1])
        corner = ((frame * S + cell[2]) * R + cell[1]) * R + cell[0]
        corners = torch.stack([corner, corner + 1, corner + R, corner + R + 1])
        corners = torch.cat([corners, corners + R * R])  # (8, B M)
        v = self._table.index_select(1, corners.flatten()).view(3, 2, 2, 2, -1)  # displacement, depth, y, x
        by_x = v[..., 1, :] - v[..., 0, :]
        v = v[..., 0, :] + share[0] * by_x  # (3, 2, 2, B M)
        by_y = v[:, :, 1] - v[:, :, 0]
        v, by_x = v[:, :, 0] + share[1] * by_y, torch.lerp(by_x[:, :, 0], by_x[:, :, 1], share[1])  # (3, 2, B M)
        by_z = v[:, 1] - v[:, 0]
        f, by_x, by_y = (torch.lerp(g[:, 0], g[:, 1], share[2]) for g in (v, by_x, by_y))  # (3, B M)
        cells = last / 2 / self.network.extent[:, None] * (place == clamped)  # per unit of x, y and z
        J = torch.stack([by_x * cells[0], by_y * cells[1], by_z * cells[2]])  # coordinate, displacement, B M
        return f.T.view_as(x), J.permute(2, 1, 0).view(*x.shape, 3)

    def _theta(self, z: Tensor) -> Tensor:
        """The affine map's parameters `(B, M, 5)` at depths `(B, M)`."""
        a = ((z - self.network.centre[2]) / self.network.extent[2])[..., None]
        return sample(self.thetas, a).transpose(1, 2)


def sheet_shares(a: Tensor) -> Tensor:
    """Share of each sheet at depths `a` `(B, M)`: `(B, S, M)`, none but that of two neighbours above 0."""
    place = (a.clamp(-1, 1) + 1) / 2 * (SHEETS - 1)
    return (1 - (place[:, None] - torch.arange(SHEETS, device=a.device)[:, None]).abs()).clamp(min=0)


def inverse_of(J: Tensor) -> Tensor:
    """(I + J)^-1 of `(..., 3, 3)` by cofactors, with a determinant of at least LEAST in size."""
    a, b, c = (J + torch.eye(3, dtype=J.dtype, device=J.device)).unbind(-1)  # columns
    rows = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], dim=-2)
    det = (a * rows[..., 0, :]).sum(-1)
    det = torch.where(det.abs() < LEAST, torch.where(det < 0, -LEAST, LEAST), det)
    return rows / det[..., None, None]


def along(matrix: Tensor, vector: Tensor) -> Tensor:
    """Products `(..., 3)` of matrices `(..., 3, 3)` and vectors, in float32 (a matrix product might be in tf32)."""
    return (matrix * vector[..., None, :]).sum(-1)
