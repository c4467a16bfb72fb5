"""Coordinates of the local and the canonical volume (OmniMotion, section 3.1).

Notation
    p        pixel (x, y) of a frame of H x W pixels, centers at integers       (..., 2)
    z        depth in [min_depth, max_depth], no unit (quasi-3D, orthographic)  (..., 1)
    x        local point (x, y, z): p normalized to [-1, 1] by (W-1, H-1), then z  (..., 3)
    u        canonical point, any real number before contraction                (..., 3)
"""

import torch
from torch import Tensor


def normalize_pixels(p: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels `(..., 2)` of a frame of `size` = (H, W) to [-1, 1]; pixel 0 is -1 and pixel W-1 is 1."""
    return p / p.new_tensor([size[1] - 1, size[0] - 1]) * 2 - 1


def denormalize_pixels(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Inverse of `normalize_pixels`: `(..., 2)` in [-1, 1] to pixels."""
    return (x + 1) * x.new_tensor([size[1] - 1, size[0] - 1]) / 2


def contract(u: Tensor) -> Tensor:
    """Map all of R^3 into the ball of radius 2, the identity inside radius 1 (mip-NeRF 360, eq. 10)."""
    norm = u.norm(dim=-1, keepdim=True)
    outside = norm.clamp(min=1)  # keeps the unused branch of `where` finite, in its gradient too
    return torch.where(norm <= 1, u, (2 - 1 / outside) * (u / outside))
