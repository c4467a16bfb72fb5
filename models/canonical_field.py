"""Canonical color and density field (OmniMotion, section 4.2; docs/method.md).

Notation
    u        canonical point; c(u) its contraction to the ball of radius 2   (M, 3)
    e        encoding of c(u): D = 66 ("periodic"), 63 ("nerf") or 3 ("none") (M, D)
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

OCTAVES = {"periodic": 11, "nerf": 10}  # columns: 3 x 2 x 11 = 66 ("periodic"), 3 + 3 x 2 x 10 = 63 ("nerf")
GAMMA_SCALE = 0.1  # factor on the initial inverse squared width gamma of the filters, no unit
FALLOFF = 1.0      # initial filter weights fall as 2^(-FALLOFF k) with octave k; log2 per octave


class CanonicalField(nn.Module):
    """Gabor network on encoded canonical points.

    `encoding`: "periodic" is the 66-column code without the coordinates, "nerf" is the coordinates and 10 octaves,
    "none" is the contracted coordinates alone (OmniMotion's code)."""

    def __init__(self, width: int = 256, num_layers: int = 3, encoding: str = "periodic"):
        super().__init__()
        self.encoding = encoding
        columns = field_code(torch.zeros(1, 3), encoding).shape[1]
        self.net = GaborNet(columns, width, 4, num_layers, alpha=3.0)
        if encoding != "none":
            for filter_ in self.net.filters:
                initialize_for_code(filter_, 3.0 / (num_layers + 1), encoding=encoding)

    def code(self, u: Tensor) -> Tensor:
        """Network input `(M, D)` for canonical points `(M, 3)`: contraction, then encoding."""
        return field_code(contract(u), self.encoding)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Canonical points `(..., 3)` -> rgb `(..., 3)` and sigma `(...)`."""
        out = self.net(self.code(u.reshape(-1, 3))).reshape(*u.shape[:-1], 4)
        return torch.sigmoid(out[..., :3]), F.softplus(out[..., 3] - 1)


def field_code(c: Tensor, encoding: str) -> Tensor:
    """Encode contracted points, `(M, 3)` -> `(M, D)`."""
    return c if encoding == "none" else periodic_encoding(c, OCTAVES[encoding], identity=encoding == "nerf")


@torch.no_grad()
def initialize_for_code(filter_: nn.Module, alpha: float, gamma_scale: float = GAMMA_SCALE, falloff: float = FALLOFF,
                        encoding: str = "periodic") -> None:
    """Initialize centers, widths and frequencies of Gabor filters on a periodic code, in place.

    Measurements are in docs/encoding.md.

    Centers mu: codes of random points in [-1, 1]^3. Random centers in [-1, 1]^66 would be far from every code.
    Widths: gamma ~ Gamma(alpha, 1) * gamma_scale * 2.5 / D, because squared distances grow with the dimension D.
    Frequencies: the code already contains frequencies up to 2^10, so the weights fall as 2^(-falloff k) with octave k.
    Otherwise the highest octaves make the density so rough that its gradient dominates the flow gradient, and the
    deformation diverges. The argument of the sine varies by about one period over the volume (in OmniMotion's code,
    on raw coordinates, by 256).
    """
    F_, D = filter_.mu.shape
    filter_.mu.copy_(field_code(torch.rand(F_, 3) * 2 - 1, encoding))
    gamma = torch.distributions.Gamma(alpha, 1.0).sample((F_,))
    filter_.gamma.copy_(gamma * gamma_scale * 2.5 / D)
    octave = torch.arange(OCTAVES[encoding]).repeat(6)  # column order: coordinate, sine/cosine, octave
    octave = torch.cat([octave.new_zeros(D - len(octave)), octave])  # identity columns ("nerf") come first, octave 0
    share = 2.0 ** (-falloff * octave)
    filter_.linear.weight.copy_(torch.randn(F_, D) * share / share.norm() * math.pi * math.sqrt(2))
    filter_.linear.bias.uniform_(-math.pi, math.pi)
