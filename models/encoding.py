"""Periodic (positional) encodings, computed in one pass over all columns.

Notation
    v        input coordinates                                   (..., D)
    w        angular frequencies, w_k = scale * 2^k, k = 0..L-1   (L,)
    e        code: v itself if `identity`, then for each coordinate L sines and L cosines
             (..., [D if identity] + 2 D L)

Canonical field: D = 3, L = 11, scale 1, no identity: 3 x 2 x 11 = 66 columns.
Coupling layers: D = 2, L = 4, scale pi, with identity: 2 + 2 x 2 x 4 = 18 columns, in the order of OmniMotion's code.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


def periodic_encoding(v: Tensor, num_octaves: int, scale: float = 1.0, identity: bool = False) -> Tensor:
    """Encode `(..., D)` -> `(..., [D if identity] + 2 D num_octaves)`; column order as in the module's notation."""
    return _PeriodicEncoding.apply(v, num_octaves, scale, identity)


class _PeriodicEncoding(torch.autograd.Function):
    """Computes all columns with one sine call, by cos(a) = sin(a + pi/2). The backward pass reuses the code: the
    derivative of each sine column is a multiple of its cosine column, and vice versa."""

    @staticmethod
    def forward(ctx, v, num_octaves, scale, identity):
        D = v.shape[-1]
        columns = _columns(D, num_octaves, scale, identity, v.dtype, v.device)
        e = torch.addcmul(columns.phase, v[..., columns.coordinate], columns.frequency).sin_()
        if identity:
            e[..., :D] = v
        ctx.save_for_backward(e)
        ctx.columns, ctx.D = columns, D if identity else 0
        return e

    @staticmethod
    def backward(ctx, grad):
        (e,) = ctx.saved_tensors
        grad_v = (grad * e[..., ctx.columns.partner]) @ ctx.columns.slope  # (..., D)
        if ctx.D:
            grad_v += grad[..., :ctx.D]
        return grad_v, None, None, None


class _Columns(NamedTuple):
    """Arguments of the sine, and derivatives, of the C columns of a code."""
    coordinate: Tensor  # (C,) index of the coordinate
    frequency: Tensor   # (C,) angular frequency, radians per unit; 1 for identity columns
    phase: Tensor       # (C,) radians: pi/2 for a cosine, else 0
    partner: Tensor     # (C,) index of the column that is proportional to this column's derivative
    slope: Tensor       # (C, D) the factor between them, at the column's coordinate; 0 elsewhere and for the identity


@cache
def _columns(D: int, L: int, scale: float, identity: bool, dtype: torch.dtype, device: torch.device) -> _Columns:
    waves = [(d, wave, k) for d in range(D) for wave in (0, 1) for k in range(L)]  # wave 0: sine, 1: cosine
    start = D if identity else 0
    own = [(d, 1.0, 0.0) for d in range(start)] + [(d, scale * 2.0**k, wave * torch.pi / 2) for d, wave, k in waves]
    coordinate, frequency, phase = zip(*own, strict=True)
    partner = list(range(start)) + [start + (2 * d + 1 - wave) * L + k for d, wave, k in waves]
    slope = torch.zeros(len(own), D, dtype=dtype)
    for column, (d, wave, k) in enumerate(waves, start):
        slope[column, d] = scale * 2.0**k * (-1 if wave else 1)
    floats = (torch.tensor(values, dtype=dtype, device=device) for values in (frequency, phase))
    return _Columns(torch.tensor(coordinate, device=device), *floats, torch.tensor(partner, device=device),
                    slope.to(device))
