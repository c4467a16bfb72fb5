"""Muon optimizer (Jordan et al., 2024): momentum with orthogonalized updates of matrices.

Notation
    G, B     gradient of a matrix and its running mean                         (rows, columns)
    U        Nesterov momentum, lerp(G, B, momentum)                           (rows, columns)
    X        Newton-Schulz iterates of U / |U|, of n matrices of equal shape  (n, rows, columns), rows <= columns
    a, b, c  coefficients of an iteration X <- a X + (b X X^T + c (X X^T)^2) X

`torch.optim.Muon` always iterates in bfloat16, one matrix at a time. On CPUs without bfloat16 products that takes
longer than the rest of a training step. This version batches matrices of equal shape and uses float32 on such CPUs.
The update rule and the optimizer state are the same; the tests compare both.
"""

from collections import defaultdict

import torch
from torch import Tensor

from models.kernels.backend import bf16_units

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c
ITERATIONS = 5  # of Newton-Schulz


class Muon(torch.optim.Optimizer):
    """Muon for 2-dimensional parameters. Updates are scaled to the typical size of Adam's updates (Liu et al., "Muon is
    scalable for LLM training", 2025), so that the same learning rate suits both optimizers."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """One step on all parameters that have a gradient."""
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for (rows, columns), params in shapes.items():
                updates = orthogonalize(torch.stack([self._momentum(p, group["momentum"]) for p in params]))
                size = 0.2 * max(rows, columns) ** 0.5
                for p, update in zip(params, updates, strict=True):
                    p.add_(update, alpha=-group["lr"] * size)

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)


def orthogonalize(u: Tensor) -> Tensor:
    """Move the singular values of each matrix of `u` `(n, rows, columns)` near 1 (0.7 to 1.2); same shape and dtype."""
    a, b, c = COEFFICIENTS
    fast = u.is_cuda or bf16_units()
    tall = u.shape[1] > u.shape[2]
    x = u.mT if tall else u
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    x = x.bfloat16() if fast else x
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(u.dtype)
