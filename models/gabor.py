"""Gabor (multiplicative filter) network: Fathony et al., "Multiplicative Filter Networks", ICLR 2021, section 3.2.

Notation
    v        input                                                     (M, D)
    mu, gamma  centers (F, D) and inverse squared widths (F,) of F filters
    g_i(v)   = sin(A_i v + b_i) * exp(-gamma_i |v - mu_i|^2 / 2)        (M, F)
    h_0 = g_0(v),  h_i = g_i(v) * (W_i h_{i-1} + c_i),  out = V h_L + d
"""

import math

import torch
from torch import Tensor, nn

from models.kernels.backend import Products
from models.kernels.fused_gabor import gabor


class GaborFilter(nn.Module):
    """One layer of F Gabor filters on D inputs, initialized as in the code of Fathony et al."""

    def __init__(self, in_dim: int, num_filters: int, weight_scale: float, alpha: float):
        super().__init__()
        self.linear = nn.Linear(in_dim, num_filters)
        self.mu = nn.Parameter(2 * torch.rand(num_filters, in_dim) - 1)
        self.gamma = nn.Parameter(torch.distributions.Gamma(alpha, 1.0).sample((num_filters,)))
        with torch.no_grad():
            self.linear.weight.mul_(weight_scale * self.gamma.sqrt()[:, None])
            self.linear.bias.uniform_(-math.pi, math.pi)

    def forward(self, v: Tensor) -> Tensor:
        """`(M, D)` -> `(M, F)`."""
        squared_distance = v.square().sum(-1, keepdim=True) + self.mu.square().sum(-1) - 2 * v @ self.mu.T
        return torch.sin(self.linear(v)) * torch.exp(-0.5 * squared_distance * self.gamma)


class GaborNet(nn.Module):
    """Gabor network `(M, in_dim)` -> `(M, out_dim)` with `num_layers` hidden layers of `width` units, that is
    `num_layers` + 1 filter layers."""

    def __init__(self, in_dim: int, width: int, out_dim: int, num_layers: int, alpha: float,
                 input_scale: float = 256.0):
        super().__init__()
        count = num_layers + 1
        self.filters = nn.ModuleList(
            GaborFilter(in_dim, width, input_scale / math.sqrt(count), alpha / count) for _ in range(count))
        self.linear = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        self.output_linear = nn.Linear(width, out_dim)
        for layer in self.linear:
            nn.init.uniform_(layer.weight, -math.sqrt(1 / width), math.sqrt(1 / width))

        self.fused = True  # False: use the reference version, layer by layer (for tests and benchmarks)
        self.products = Products()  # precision and kernels of the fused version

    def forward(self, v: Tensor) -> Tensor:
        """`(M, in_dim)` -> `(M, out_dim)`."""
        if self.fused:
            return gabor(self, v, self.products)
        h = self.filters[0](v)  # (M, F)
        for filter_, linear in zip(self.filters[1:], self.linear, strict=True):
            h = filter_(v) * linear(h)
        return self.output_linear(h)  # (M, out_dim)
