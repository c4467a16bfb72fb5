"""Activation checkpointing: recompute activations in the backward pass instead of storing them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable, *tensors: Tensor):
    """`function(*tensors)`, storing only its inputs and results for the backward pass. The function must not use random
    numbers, because the random state is not restored."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def recomputed_in_pieces(points: int) -> Callable:
    """Version of `recomputed` for functions of tensors `(B, M, ...)` that process the M points independently.

    Works on pieces of the points: activations of at most about `points` of the B * M points are in memory at a time."""
    def call(function: Callable, *tensors: Tensor) -> Tensor:
        size = max(points // len(tensors[0]), 1)
        parts = zip(*(tensor.split(size, dim=1) for tensor in tensors), strict=True)
        return torch.cat([recomputed(function, *part) for part in parts], dim=1)

    return call


def stored(function: Callable, *tensors: Tensor):
    """`function(*tensors)`: same interface as `recomputed`, but stores the activations."""
    return function(*tensors)
