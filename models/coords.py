"""Coordinates of the local and the canonical volume (OmniMotion, section 3.1).

Notation
    p        pixel (x, y) of a frame with H x W pixels; pixel centers are integers  (..., 2)
    z        depth in [min_depth, max_depth], no unit (quasi-3D, orthographic)      (..., 1)
    x        local point (x, y, z): p normalized to [-1, 1] by (W-1, H-1), then z   (..., 3)
    u        canonical point, unbounded before contraction                          (..., 3)
"""

import torch
from torch import Tensor


def normalize_pixels(p: Tensor, size: tuple[int, int]) -> Tensor:
    """Map pixels `(..., 2)` of a frame of `size` = (H, W) pixels to [-1, 1]; x = 0 maps to -1, x = W-1 to 1."""
    return p / p.new_tensor([size[1] - 1, size[0] - 1]) * 2 - 1


def denormalize_pixels(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Inverse of `normalize_pixels`: `(..., 2)` in [-1, 1] to pixels."""
    return (x + 1) * x.new_tensor([size[1] - 1, size[0] - 1]) / 2


def contract(u: Tensor) -> Tensor:
    """Contract R^3 into the ball of radius 2, `(..., 3)` -> `(..., 3)`; identity inside the unit ball (mip-NeRF 360,
    eq. 10)."""
    norm = u.norm(dim=-1, keepdim=True)
    outside = norm.clamp(min=1)  # keeps the unused branch of `where` and its gradient finite
    return torch.where(norm <= 1, u, (2 - 1 / outside) * (u / outside))
