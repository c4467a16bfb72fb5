"""Invertible network: local volume of frame i <-> canonical volume (OmniMotion, section 4.1; DESIGN.md section 5).

Notation
    B        frames in the batch, M points of each                    x: (B, M, 3)
    f        time latents of these frames                             (B, C)
    t        their times                                              (B, 1)
    layer k  changes coordinate c_k and keeps the other two, a = x without c_k   (B, M, 2)
             (s, o) = MLP_k([latent_k(f), P_k(code(a))]), s clamped to [-8, 8]
             forward  y_c = (x_c - o) exp(-s)        inverse  x_c = y_c exp(s) + o
    affine   (x, y) -> A(t, z) (x, y) + b(t, z), before layer 0 on the way forward
"""

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoding import periodic_encoding
from models.fused import NEGATIVE_SLOPE, S_MAX, couple
from models.recompute import stored


def mlp(sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers of the given sizes with `activation` between them."""
    layers = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1])


class CouplingLayer(nn.Module):
    """The (s, o) network of one coupling layer.

    `projection_layers` = 2 is Linear ReLU Linear (ours; the second Linear has no activation after it, so that it and
    the MLP's first Linear are one matrix); 1 is Linear LeakyReLU (OmniMotion as published).
    """

    def __init__(self, coordinate: int, latent_dim: int, width: int, hidden_layers: int, projection_layers: int,
                 octaves: int):
        super().__init__()
        self.octaves, self.kept = octaves, [d for d in range(3) if d != coordinate]
        self.coordinate, self.first_slope = coordinate, NEGATIVE_SLOPE if projection_layers == 1 else 0.0
        sizes = [2 + 2 * 2 * octaves] + [width] * projection_layers
        self.projection = mlp(sizes, nn.ReLU)
        self.latent = mlp([latent_dim] * 3, nn.LeakyReLU)
        self.mlp = mlp([latent_dim + width] + [width] * hidden_layers + [2], nn.LeakyReLU)

    def scale_shift_plain(self, a: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """s and o `(B, M)` for kept coordinates `(B, M, 2)` and latents `(B, C)`, by the definition."""
        projected = self.projection(periodic_encoding(a, self.octaves, torch.pi, identity=True))  # (B, M, width)
        if len(self.projection) == 1:
            projected = F.leaky_relu(projected, NEGATIVE_SLOPE)
        latent = self.latent(f)[:, None].expand(-1, a.shape[1], -1)  # (B, M, C)
        s, o = self.mlp(torch.cat([latent, projected], dim=-1)).unbind(-1)
        return s.clamp(-S_MAX, S_MAX), o

    def fuse(self, f: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights and biases of the equivalent chain of layers for latents `(B, C)`: the bias of the layer that meets
        the latent is `(B, 1, width)`, one a frame; P's last Linear and the MLP's first are one matrix."""
        first = self.mlp[0]
        C = f.shape[-1]
        weight, bias = first.weight[:, C:], F.linear(self.latent(f), first.weight[:, :C], first.bias)  # (B, width)
        if len(self.projection) > 1:
            bias = bias + weight @ self.projection[2].bias
            weight = weight @ self.projection[2].weight
        chain = [(self.projection[0].weight, self.projection[0].bias), (weight, bias[:, None])]
        return chain + [(layer.weight, layer.bias) for layer in self.mlp[2::2]]


class Affine(nn.Module):
    """Affine map of (x, y) whose angle, two log-scales and two shifts come from an MLP on (t, z)."""

    def __init__(self, width: int = 256, num_layers: int = 8, octaves: int = 4):
        super().__init__()
        self.octaves = octaves
        self.mlp = mlp([2 + 2 * octaves] + [width] * (num_layers - 1) + [5], nn.ReLU)

    def coefficients(self, t: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        """(a, b, c, d, tx, ty), each `(B, M)`, of x' = a x + b y + tx, y' = c x + d y + ty at times `(B, 1)`, depths
        `(B, M)`."""
        code = periodic_encoding(z[..., None], self.octaves, torch.pi)  # (B, M, 2L), sines then cosines
        code = code.unflatten(-1, (2, self.octaves)).transpose(-1, -2).flatten(-2)  # published order: octave by octave
        theta = self.mlp(torch.cat([code, t[..., None].expand(*z.shape, 1), z[..., None]], dim=-1))  # (B, M, 5)
        angle, log_scale_x, tx, log_scale_y, ty = theta.unbind(-1)
        cos, sin, sx, sy = angle.cos(), angle.sin(), log_scale_x.exp(), log_scale_y.exp()
        return cos * sx, -sin * sx, sin * sy, cos * sy, tx, ty

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Local `(B, M, 3)` to the couplings' input."""
        px, py, z = x.unbind(-1)
        a, b, c, d, tx, ty = self.coefficients(t, z)
        return torch.stack([a * px + b * py + tx, c * px + d * py + ty, z], dim=-1)

    def inverse(self, t: Tensor, y: Tensor) -> Tensor:
        """Inverse of `forward`: z is unchanged by it, so that the same coefficients are inverted in closed form."""
        px, py, z = y.unbind(-1)
        a, b, c, d, tx, ty = self.coefficients(t, z)
        px, py, determinant = px - tx, py - ty, a * d - b * c
        return torch.stack([(d * px - b * py) / determinant, (a * py - c * px) / determinant, z], dim=-1)


class InvertibleNetwork(nn.Module):
    """Affine map and coupling layers; `bind` fixes the frames, the result maps points both ways."""

    def __init__(self, coordinates: tuple[int, ...] = (0, 1, 2, 0, 1, 2), latent_dim: int = 128, width: int = 256,
                 hidden_layers: int = 2, projection_layers: int = 2, octaves: int = 4, affine: bool = True,
                 affine_width: int = 256, affine_layers: int = 8):
        super().__init__()
        self.layers = nn.ModuleList(
            CouplingLayer(c, latent_dim, width, hidden_layers, projection_layers, octaves) for c in coordinates)
        self.affine = Affine(affine_width, affine_layers, octaves) if affine else None
        self.fused = True  # False: every layer by its definition, the twin that tests and benchmarks compare with

    def bind(self, f: Tensor, t: Tensor) -> "FrameMaps":
        """The maps of the frames with latents `(B, C)` and times `(B, 1)`; weights are fused once, here."""
        return FrameMaps(self, f, t)


class FrameMaps:
    """Maps of B frames between their local volumes and the canonical one, `(B, M, 3)` -> `(B, M, 3)`."""

    def __init__(self, network: InvertibleNetwork, f: Tensor, t: Tensor):
        self.network, self.f, self.t = network, f, t
        self.call = stored  # or models.recompute.recomputed: how the backward pass gets at each layer's activations
        self.chains = [layer.fuse(f) for layer in network.layers] if network.fused else None

    def select(self, index: Tensor) -> "FrameMaps":
        """The maps of some of the frames, `index` `(B',)` into the bound ones; repeats are free of new fusing."""
        out = FrameMaps.__new__(FrameMaps)
        out.network, out.f, out.t, out.call = self.network, self.f[index], self.t[index], self.call
        out.chains = self.chains and [
            [chain[0], (chain[1][0], chain[1][1][index]), *chain[2:]] for chain in self.chains]
        return out

    def to_canonical(self, x: Tensor) -> Tensor:
        """Local points to canonical ones (forward)."""
        if self.network.affine is not None:
            x = self.call(self.network.affine, self.t, x)
        x = list(x.unbind(-1))
        for k, layer in enumerate(self.network.layers):
            x[layer.coordinate] = self.call(partial(self._couple, k, layer, False), *x)
        return torch.stack(x, dim=-1)

    def to_local(self, u: Tensor) -> Tensor:
        """Canonical points to local ones (inverse)."""
        u = list(u.unbind(-1))
        for k, layer in reversed(list(enumerate(self.network.layers))):
            u[layer.coordinate] = self.call(partial(self._couple, k, layer, True), *u)
        u = torch.stack(u, dim=-1)
        return u if self.network.affine is None else self.call(self.network.affine.inverse, self.t, u)

    def _couple(self, k: int, layer: CouplingLayer, inverse: bool, *x: Tensor) -> Tensor:
        """The coordinate that layer k changes, after it, from the three before it, `(B, M)` each."""
        changed, kept = x[layer.coordinate], torch.stack([x[d] for d in layer.kept], dim=-1)  # (B, M), (B, M, 2)
        if self.chains is not None:
            return couple(changed, kept, self.chains[k], layer.octaves, layer.first_slope, inverse)
        s, o = layer.scale_shift_plain(kept, self.f)
        return changed * torch.exp(s) + o if inverse else (changed - o) * torch.exp(-s)
