"""Memory for time: activations that are computed again in the backward pass instead of being kept."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable, *tensors: Tensor):
    """`function(*tensors)`, of which only inputs and results are kept for the backward pass. The function must draw
    nothing random."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def recomputed_in_pieces(points: int) -> Callable:
    """`recomputed` for functions of tensors `(B, M, ...)` that treat each of the M points by itself: activations of at
    most about `points` of all B * M points are in memory at a time."""
    return partial(_pieces, points)


def _pieces(points: int, function: Callable, *tensors: Tensor) -> Tensor:
    size = max(points // len(tensors[0]), 1)
    parts = zip(*(tensor.split(size, dim=1) for tensor in tensors), strict=True)
    return torch.cat([recomputed(function, *part) for part in parts], dim=1)


def stored(function: Callable, *tensors: Tensor):
    """`function(*tensors)`: the twin of `recomputed` that keeps its activations."""
    return function(*tensors)
