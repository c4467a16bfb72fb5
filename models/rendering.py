"""Rays and compositing (OmniMotion, section 4.2).

Notation
    K        number of samples per ray, from near (0) to far (K-1)
    z        depths of the samples                                                              (..., K)
    sigma    density per sample spacing, so alpha = 1 - exp(-sigma), as in OmniMotion's code    (..., K)
    w        compositing weights, w_k = alpha_k * prod_{l<k} (1 - alpha_l); sum at most 1       (..., K)
"""

import torch
from torch import Tensor


def ray_depths(num_samples: int, min_depth: float, max_depth: float, like: Tensor) -> Tensor:
    """`(K,)` depths, linearly spaced from `min_depth` to `max_depth` inclusive; dtype and device of `like`."""
    return torch.linspace(min_depth, max_depth, num_samples, dtype=like.dtype, device=like.device)


def jitter_depths(z: Tensor, u: Tensor) -> Tensor:
    """Stratified depths `(..., K)` from depths z `(K,)` and numbers `u` in [0, 1], `(..., K)`. Each sample stays
    between the midpoints to its two neighbors."""
    middle = (z[1:] + z[:-1]) / 2
    lower = torch.cat([z[:1], middle])
    upper = torch.cat([middle, z[-1:]])
    return lower + (upper - lower) * u


def compositing_weights(alpha: Tensor) -> Tensor:
    """Compositing weights w `(..., K)` from alpha = 1 - exp(-sigma), `(..., K)` (Mildenhall et al., NeRF, eq. 3)."""
    through = torch.cumprod(1 - alpha[..., :-1] + 1e-10, dim=-1)  # transmittance after sample k
    return alpha * torch.cat([torch.ones_like(alpha[..., :1]), through], dim=-1)


def composite(weights: Tensor, values: Tensor) -> Tensor:
    """Weighted sum along the ray: `(..., K)` and `(..., K, C)` -> `(..., C)`."""
    return torch.einsum("...k,...kc->...c", weights, values)


def take_sample(values: Tensor, index: Tensor) -> Tensor:
    """Select one sample per ray: `values` `(..., K, C)` at sample `index` `(...)` -> `(..., C)`."""
    index = index[..., None, None].expand(*index.shape, 1, values.shape[-1])
    return values.gather(-2, index).squeeze(-2)
