"""Correlation lookup of RAFT (Teed and Deng, ECCV 2020, section 3.2): two implementations with the same values.

Notation
    B, C      pairs, feature channels
    h, w      size of the feature grid
    l         pyramid level; at level l the features of b are averaged over 2^l x 2^l cells
    r         radius of the lookup
    S         2r + 2: integer positions per side that are needed around a center
    p         position in b of each grid cell of a, (B, 2, h, w) in grid steps
The value of offset (dx, dy) at level l is <features of a, features of b at p / 2^l + (dx, dy)> / sqrt(C), interpolated
bilinearly, 0 outside the grid. All offsets are integers, so all of them share the bilinear weights of p's fractional
part: products are taken at S x S integer positions and blended once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 4
VALUES_PER_PIECE = 1 << 24  # float32 values that OnDemand gathers at a time (64 MiB)


class Lookup:
    """`p -> (B, LEVELS (2r+1)^2, h, w)` float32; the channels are ordered by level, then dx, then dy.

    Subclasses implement `_at_integers`."""

    def __init__(self, features_a: Tensor, features_b: Tensor, radius: int):
        self.a = features_a.flatten(2).transpose(1, 2) / features_a.shape[1] ** 0.5  # (B, h w, C)
        self.radius = radius
        self.levels = [features_b]
        for _ in range(LEVELS - 1):
            self.levels.append(F.avg_pool2d(self.levels[-1], 2))

    def __call__(self, p: Tensor) -> Tensor:
        B, _, h, w = p.shape
        center = p.flatten(2).transpose(1, 2)  # (B, h w, 2)
        out = [self._blend(center / 2 ** level, level) for level in range(LEVELS)]
        return torch.cat(out, dim=-1).transpose(1, 2).reshape(B, -1, h, w)

    def _blend(self, center: Tensor, level: int) -> Tensor:
        """Values `(B, h w, (2r+1)^2)` around the centers `(B, h w, 2)` of one level."""
        corner = center.floor()
        fx, fy = (center - corner)[..., None, None, :].unbind(-1)  # (B, h w, 1, 1) each
        H, W = self.levels[level].shape[-2:]
        steps = torch.arange(-self.radius, self.radius + 2, device=center.device)
        x = corner[..., 0, None].long() + steps  # (B, h w, S)
        y = corner[..., 1, None].long() + steps
        inside = (((x >= 0) & (x < W))[..., :, None] & ((y >= 0) & (y < H))[..., None, :])  # (B, h w, S, S)
        index = y.clamp(0, H - 1)[..., None, :] * W + x.clamp(0, W - 1)[..., :, None]
        values = torch.where(inside, self._at_integers(index.flatten(2), level).view(index.shape), 0)
        values = values[..., :-1, :] * (1 - fx) + values[..., 1:, :] * fx
        return (values[..., :-1] * (1 - fy) + values[..., 1:] * fy).flatten(2)

    def _at_integers(self, index: Tensor, level: int) -> Tensor:
        """Products `(B, h w, S^2)` at flat indices of grid cells `(B, h w, S^2)` of one level."""
        raise NotImplementedError


class AllPairs(Lookup):
    """Stores the products of all cells of a and b, 4/3 (h w)^2 numbers per pair. Faster than OnDemand."""

    def __init__(self, features_a: Tensor, features_b: Tensor, radius: int):
        super().__init__(features_a, features_b, radius)
        self.volumes = [self.a @ b.flatten(2) for b in self.levels]  # (B, h w, H W) each

    def _at_integers(self, index: Tensor, level: int) -> Tensor:
        return self.volumes[level].gather(-1, index)


class OnDemand(Lookup):
    """Computes the products at each lookup, so memory does not grow with (h w)^2."""

    def __init__(self, features_a: Tensor, features_b: Tensor, radius: int):
        super().__init__(features_a, features_b, radius)
        self.rows = [b.flatten(2).transpose(1, 2).contiguous() for b in self.levels]  # (B, H W, C) each

    def _at_integers(self, index: Tensor, level: int) -> Tensor:
        B, N, S2 = index.shape
        step = max(VALUES_PER_PIECE // (S2 * self.a.shape[-1]), 1)
        out = self.a.new_empty(B, N, S2)
        for k in range(B):
            for n in range(0, N, step):
                near = self.rows[level][k][index[k, n: n + step]]  # (step, S^2, C)
                out[k, n: n + step] = (near @ self.a[k, n: n + step, :, None])[..., 0]
        return out
