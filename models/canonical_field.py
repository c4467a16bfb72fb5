"""Canonical color and density field (OmniMotion, section 4.2; docs/method.md).

Notation
    u        canonical point; c(u) its contraction to the ball of radius 2   (M, 3)
    e        periodic code of c(u); "periodic" has 66 columns, "nerf" has 63  (M, D)
    rgb      color in [0, 1]                                                (M, 3)
    sigma    density >= 0                                                    (M,)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.coords import contract
from models.encoding import periodic_encoding
from models.gabor import GaborNet

OCTAVES = {"periodic": 11, "nerf": 10}  # 3 coordinates x (sine, cosine) x 11 = 66 columns; "nerf": 3 + 3 x 2 x 10 = 63
GAMMA_SCALE = 0.1  # of the filters' inverse squared width
FALLOFF = 1.0      # of the filters' weights with the octave


class CanonicalField(nn.Module):
    """Gabor network on the 66-d code, on the coordinates beside their 10 octaves (`encoding` = "nerf"), or on the
    coordinates alone ("none", as published)."""

    def __init__(self, width: int = 256, num_layers: int = 3, encoding: str = "periodic"):
        super().__init__()
        self.encoding = encoding
        self.net = GaborNet(code_columns(encoding), width, 4, num_layers, alpha=3.0)
        if encoding != "none":
            for filter_ in self.net.filters:
                initialize_for_code(filter_, 3.0 / (num_layers + 1), encoding=encoding)

    def code(self, u: Tensor) -> Tensor:
        """What the network sees of canonical points `(M, 3)`: `(M, D)`."""
        return field_code(contract(u), self.encoding)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Canonical points `(..., 3)` -> rgb `(..., 3)` and sigma `(...)`."""
        out = self.net(self.code(u.reshape(-1, 3))).reshape(*u.shape[:-1], 4)
        return torch.sigmoid(out[..., :3]), F.softplus(out[..., 3] - 1)


def code_columns(encoding: str) -> int:
    """D of an encoding."""
    return field_code(torch.zeros(1, 3), encoding).shape[1]


def field_code(c: Tensor, encoding: str) -> Tensor:
    """Contracted points `(M, 3)` -> `(M, D)`."""
    return c if encoding == "none" else periodic_encoding(c, OCTAVES[encoding], identity=encoding == "nerf")


@torch.no_grad()
def initialize_for_code(filter_: nn.Module, alpha: float, gamma_scale: float = GAMMA_SCALE, falloff: float = FALLOFF,
                        encoding: str = "periodic") -> None:
    """Center, width and frequency of the filters for a periodic code; docs/encoding.md has the measurements.

    Centers are codes of points of the volume: a random center of [-1, 1]^66 is far from every code. Squared distances
    grow with the number of inputs, so gamma shrinks by it and by `gamma_scale`. The code already carries frequencies
    up to 2^10: weights fall as 2^(-falloff k) with the octave k, else the highest octaves make the density so rough
    that its gradient drowns the flow's and the deformation diverges. The argument of the sine varies by about one
    period over the volume instead of OmniMotion's 256 of raw coordinates.
    """
    F_, D = filter_.mu.shape
    filter_.mu.copy_(field_code(torch.rand(F_, 3) * 2 - 1, encoding))
    gamma = torch.distributions.Gamma(alpha, 1.0).sample((F_,))
    filter_.gamma.copy_(gamma * gamma_scale * 2.5 / D)
    octave = torch.arange(OCTAVES[encoding]).repeat(6)  # column order: coordinate, sine/cosine, octave
    octave = torch.cat([octave.new_zeros(D - len(octave)), octave])  # the coordinates, if they are there, come first
    share = 2.0 ** (-falloff * octave)
    filter_.linear.weight.copy_(torch.randn(F_, D) * share / share.norm() * math.pi * math.sqrt(2))
    filter_.linear.bias.uniform_(-math.pi, math.pi)
