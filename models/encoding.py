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
        ctx.columns = columns
        ctx.identity = identity
        return e

    @staticmethod
    def backward(ctx, grad):
        (e,) = ctx.saved_tensors
        columns = ctx.columns
        grad_v = (grad * e[..., columns.partner]) @ columns.slope  # (..., D)
        if ctx.identity:
            grad_v += grad[..., :grad_v.shape[-1]]
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
    start = D if identity else 0  # first sine column
    coordinate = list(range(start))
    frequency = [1.0] * start
    phase = [0.0] * start
    partner = list(range(start))
    slope = torch.zeros(start + 2 * D * L, D, dtype=dtype)
    for d in range(D):
        for is_cosine in (False, True):
            for k in range(L):
                w = scale * 2.0**k
                slope[len(coordinate), d] = -w if is_cosine else w
                partner.append(len(coordinate) - L if is_cosine else len(coordinate) + L)
                coordinate.append(d)
                frequency.append(w)
                phase.append(torch.pi / 2 if is_cosine else 0.0)
    return _Columns(
        torch.tensor(coordinate, device=device), torch.tensor(frequency, dtype=dtype, device=device),
        torch.tensor(phase, dtype=dtype, device=device), torch.tensor(partner, device=device), slope.to(device))
