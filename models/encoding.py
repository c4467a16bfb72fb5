"""Periodic encodings, written in one pass.

Notation
    v        input coordinates                                   (..., D)
    w        frequencies, w_k = scale * 2^k, k = 0..L-1           (L,)
    e        code: the identity (optional), then per coordinate L sines and L cosines
             (..., D * include_identity + 2 D L)

The canonical field's code has D = 3, L = 11, scale 1 and no identity: 3 x 2 x 11 = 66 columns.
The coupling layers' code has D = 2, L = 4, scale pi and the identity: 18 columns (OmniMotion's order).
"""

import torch
from torch import Tensor


def periodic_encoding(v: Tensor, num_octaves: int, scale: float = 1.0, identity: bool = False) -> Tensor:
    """`(..., D)` -> `(..., D [if identity] + 2 D num_octaves)`; see the module's notation for the column order."""
    return _PeriodicEncoding.apply(v, num_octaves, scale, identity)


def periodic_encoding_plain(v: Tensor, num_octaves: int, scale: float = 1.0, identity: bool = False) -> Tensor:
    """The same code by the definition, for the tests and for reading."""
    angles = v[..., None] * frequencies(num_octaves, scale, v)  # (..., D, L)
    code = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # (..., D * 2L)
    return torch.cat([v, code], dim=-1) if identity else code


def frequencies(num_octaves: int, scale: float, like: Tensor) -> Tensor:
    """`(num_octaves,)` angular frequencies scale * 2^k, of the dtype and device of `like`."""
    return scale * 2.0 ** torch.arange(num_octaves, dtype=like.dtype, device=like.device)


class _PeriodicEncoding(torch.autograd.Function):
    """One sine call over all columns, cos(a) = sin(a + pi/2); the backward pass reuses the code itself,
    because a sine's derivative is the cosine that stands beside it."""

    @staticmethod
    def forward(ctx, v, num_octaves, scale, identity):
        D = v.shape[-1]
        w = frequencies(num_octaves, scale, v)
        start = D if identity else 0
        e = v.new_empty(*v.shape[:-1], start + 2 * D * num_octaves)
        waves = e[..., start:].unflatten(-1, (D, 2, num_octaves))  # (..., D, 2, L), a view of e
        torch.mul(v[..., None], w, out=waves[..., 0, :])
        torch.add(waves[..., 0, :], torch.pi / 2, out=waves[..., 1, :])
        e[..., start:].sin_()
        if identity:
            e[..., :D] = v
        ctx.save_for_backward(e, w)
        ctx.start, ctx.D = start, D
        return e

    @staticmethod
    def backward(ctx, grad):
        e, w = ctx.saved_tensors
        shape = (ctx.D, 2, len(w))
        waves, g = (a[..., ctx.start:].unflatten(-1, shape) for a in (e, grad))
        grad_v = (g[..., 0, :] * waves[..., 1, :] - g[..., 1, :] * waves[..., 0, :]) @ w  # (..., D)
        if ctx.start:
            grad_v = grad_v + grad[..., :ctx.start]
        return grad_v, None, None, None
