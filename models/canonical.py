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
EXTENT = 2.0  # radius of the contracted volume


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
def initialise_for_code(filter_: nn.Module, alpha: float) -> None:
    """Centre, width and frequency of the filters for the 66-d code.

    Centres are codes of points of the volume: a random centre of [-1, 1]^66 is far from every code.
    Two codes are about 66 apart in squared distance where raw points are about 66 / 2.5 times closer, so gamma shrinks
    by that factor and as many filters are alive as on raw coordinates (docs/encoding.md has the measurement).
    The code already carries frequencies up to 2^10: weights fall by octave, so that low frequencies lead, and the
    argument of the sine varies by about one period over the volume instead of OmniMotion's 256 of raw coordinates.
    """
    F_, D = filter_.mu.shape
    points = torch.rand(F_, 3) * 2 - 1
    filter_.mu.copy_(periodic_encoding(points, NUM_OCTAVES))
    gamma = torch.distributions.Gamma(alpha, 1.0).sample((F_,))
    filter_.gamma.copy_(gamma * 2.5 / D)
    octave = torch.arange(NUM_OCTAVES).repeat(D // NUM_OCTAVES)  # column order: coordinate, sine/cosine, octave
    falloff = 2.0 ** (-0.5 * octave)
    filter_.linear.weight.copy_(torch.randn(F_, D) * falloff * math.pi / falloff.norm() * math.sqrt(2))
    filter_.linear.bias.uniform_(-math.pi, math.pi)
