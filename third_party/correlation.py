"""Correlation lookup of RAFT (Teed and Deng, ECCV 2020, section 3.2), in two twins that give the same values.

Notation
    B, C      pairs, feature channels
    h, w, l   grid of the features, level: the features of b are averaged over 2^l x 2^l cells
    r, S      radius of the lookup, S = 2r + 2 whole positions a side around a center
    p         where each grid cell of a is in b, (B, 2, h, w) in grid steps
Value of offset (dx, dy) at level l: <features of a, features of b at p / 2^l + (dx, dy)> / sqrt(C), bilinear, with 0
outside. All offsets are whole, so the bilinear weights are those of p's fraction: look up S x S positions, blend once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 4
PIECE = 1 << 24  # numbers gathered at a time on demand: 64 MiB


class Lookup:
    """`p -> (B, LEVELS (2r+1)^2, h, w)` float32: levels, then offsets dx, then dy; the twins differ in `_whole`."""

    def __init__(self, features_a: Tensor, features_b: Tensor, radius: int):
        self.a, self.radius = features_a.flatten(2).transpose(1, 2) / features_a.shape[1] ** 0.5, radius  # (B, h w, C)
        self.levels = [features_b]
        for _ in range(LEVELS - 1):
            self.levels.append(F.avg_pool2d(self.levels[-1], 2))

    def __call__(self, p: Tensor) -> Tensor:
        B, _, h, w = p.shape
        center = p.flatten(2).transpose(1, 2)  # (B, h w, 2)
        out = [self._blend(center / 2 ** level, level) for level in range(LEVELS)]
        return torch.cat(out, dim=-1).transpose(1, 2).reshape(B, -1, h, w)

    def _blend(self, center: Tensor, level: int) -> Tensor:
        """Values around centers `(B, h w, 2)` of a level, `(B, h w, (2r+1)^2)`."""
        corner = center.floor()
        fx, fy = (center - corner)[..., None, None, :].unbind(-1)  # (B, h w, 1, 1) each
        H, W = self.levels[level].shape[-2:]
        steps = torch.arange(-self.radius, self.radius + 2, device=center.device)
        x = corner[..., 0, None].long() + steps  # (B, h w, S)
        y = corner[..., 1, None].long() + steps
        inside = (((x >= 0) & (x < W))[..., :, None] & ((y >= 0) & (y < H))[..., None, :])  # (B, h w, S, S)
        index = y.clamp(0, H - 1)[..., None, :] * W + x.clamp(0, W - 1)[..., :, None]
        values = torch.where(inside, self._whole(index.flatten(2), level).view(index.shape), 0)
        values = values[..., :-1, :] * (1 - fx) + values[..., 1:, :] * fx
        return (values[..., :-1] * (1 - fy) + values[..., 1:] * fy).flatten(2)

    def _whole(self, index: Tensor, level: int) -> Tensor:
        """Values at flat whole positions `(B, h w, S^2)` of a level."""
        raise NotImplementedError


class AllPairs(Lookup):
    """Keeps the products of all cells of a and b: 4/3 (h w)^2 numbers a pair, the fast twin."""

    def __init__(self, features_a: Tensor, features_b: Tensor, radius: int):
        super().__init__(features_a, features_b, radius)
        self.volumes = [self.a @ b.flatten(2) for b in self.levels]  # (B, h w, H W) each

    def _whole(self, index: Tensor, level: int) -> Tensor:
        return self.volumes[level].gather(-1, index)


class OnDemand(Lookup):
    """Computes the products that are looked up each time: memory does not grow with (h w)^2."""

    def __init__(self, features_a: Tensor, features_b: Tensor, radius: int):
        super().__init__(features_a, features_b, radius)
        self.rows = [b.flatten(2).transpose(1, 2).contiguous() for b in self.levels]  # (B, H W, C) each

    def _whole(self, index: Tensor, level: int) -> Tensor:
        B, N, S2 = index.shape
        step = max(PIECE // (S2 * self.a.shape[-1]), 1)
        out = self.a.new_empty(B, N, S2)
        for k in range(B):
            for n in range(0, N, step):
                near = self.rows[level][k][index[k, n: n + step]]  # (step, S^2, C)
                out[k, n: n + step] = (near @ self.a[k, n: n + step, :, None])[..., 0]
        return out
