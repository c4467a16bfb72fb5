"""Memory for time: activations that are computed again in the backward pass instead of being kept."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable, *tensors: Tensor):
    """`function(*tensors)`, of which only inputs and results are kept for the backward pass. The function must draw
    nothing random."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def stored(function: Callable, *tensors: Tensor):
    """`function(*tensors)`: the twin of `recomputed` that keeps its activations."""
    return function(*tensors)
