"""Canonical colour and density field (OmniMotion, section 4.2; DESIGN.md section 5).

Notation
    u        canonical point; c(u) its contraction to the ball of radius 2   (M, 3)
    e        66-d periodic code of c(u)                                      (M, 66)
    rgb      colour in [0, 1]                                                (M, 3)
    sigma    density >= 0                                                    (M,)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.coords import contract
from models.encoding import periodic_encoding
from models.gabor import GaborNet

NUM_OCTAVES = 11  # 3 coordinates x (sine, cosine) x 11 octaves = 66 columns
GAMMA_SCALE = 0.1  # of the filters' inverse squared width
FALLOFF = 1.0      # of the filters' weights with the octave


class CanonicalField(nn.Module):
    """Gabor network on the 66-d code, or on the raw coordinates (`encoding` = "none", as published)."""

    def __init__(self, width: int = 256, num_layers: int = 3, encoding: str = "periodic"):
        super().__init__()
        self.encoding = encoding
        in_dim = 3 if encoding == "none" else 3 * 2 * NUM_OCTAVES
        self.net = GaborNet(in_dim, width, 4, num_layers, alpha=3.0)
        if encoding == "periodic":
            for filter_ in self.net.filters:
                initialise_for_code(filter_, alpha=3.0 / (num_layers + 1))

    def code(self, u: Tensor) -> Tensor:
        """What the network sees of canonical points `(M, 3)`: `(M, 66)`, or `(M, 3)` without encoding."""
        c = contract(u)
        return c if self.encoding == "none" else periodic_encoding(c, NUM_OCTAVES)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Canonical points `(..., 3)` -> rgb `(..., 3)` and sigma `(...)`."""
        out = self.net(self.code(u.reshape(-1, 3))).reshape(*u.shape[:-1], 4)
        return torch.sigmoid(out[..., :3]), F.softplus(out[..., 3] - 1)


@torch.no_grad()
def initialise_for_code(filter_: nn.Module, alpha: float, gamma_scale: float = GAMMA_SCALE,
                        falloff: float = FALLOFF) -> None:
    """Centre, width and frequency of the filters for the 66-d code; docs/encoding.md has the measurements.

    Centres are codes of points of the volume: a random centre of [-1, 1]^66 is far from every code. Squared distances
    grow with the number of inputs, so gamma shrinks by it and by `gamma_scale`. The code already carries frequencies
    up to 2^10: weights fall as 2^(-falloff k) with the octave k, else the highest octaves make the density so rough
    that its gradient drowns the flow's and the deformation diverges. The argument of the sine varies by about one
    period over the volume instead of OmniMotion's 256 of raw coordinates.
    """
    F_, D = filter_.mu.shape
    filter_.mu.copy_(periodic_encoding(torch.rand(F_, 3) * 2 - 1, NUM_OCTAVES))
    gamma = torch.distributions.Gamma(alpha, 1.0).sample((F_,))
    filter_.gamma.copy_(gamma * gamma_scale * 2.5 / D)
    octave = torch.arange(NUM_OCTAVES).repeat(D // NUM_OCTAVES)  # column order: coordinate, sine/cosine, octave
    share = 2.0 ** (-falloff * octave)
    filter_.linear.weight.copy_(torch.randn(F_, D) * share / share.norm() * math.pi * math.sqrt(2))
    filter_.linear.bias.uniform_(-math.pi, math.pi)
