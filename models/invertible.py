"""Invertible network: local volume of frame i <-> canonical volume (OmniMotion, section 4.1; docs/method.md).

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

from models.activation_checkpoint import stored
from models.encoding import periodic_encoding
from models.kernels.backend import Products
from models.kernels.constants import NEGATIVE_SLOPE, S_MAX
from models.kernels.fused_mlp import Layers, chain
from models.kernels.triton_coupling import coupling_stack
from third_party.tcnn import TcnnMlp


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
                 octaves: int, backend: str = "torch"):
        super().__init__()
        self.octaves, self.kept = octaves, [d for d in range(3) if d != coordinate]
        self.coordinate, self.first_slope = coordinate, NEGATIVE_SLOPE if projection_layers == 1 else 0.0
        sizes = [2 + 2 * 2 * octaves] + [width] * projection_layers
        self.projection = mlp(sizes, nn.ReLU)
        self.latent = mlp([latent_dim] * 3, nn.LeakyReLU)
        self.mlp = (TcnnMlp(latent_dim + width, width, hidden_layers, 2) if backend == "tcnn" else
                    mlp([latent_dim + width] + [width] * hidden_layers + [2], nn.LeakyReLU))

    def scale_shift_plain(self, a: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """s and o `(B, M)` for kept coordinates `(B, M, 2)` and latents `(B, C)`, by the definition."""
        projected = self.projection(periodic_encoding(a, self.octaves, torch.pi, identity=True))  # (B, M, width)
        if len(self.projection) == 1:
            projected = F.leaky_relu(projected, NEGATIVE_SLOPE)
        latent = self.latent(f)[:, None].expand(-1, a.shape[1], -1)  # (B, M, C)
        s, o = self.mlp(torch.cat([latent, projected], dim=-1)).unbind(-1)
        return s.clamp(-S_MAX, S_MAX), o

    def scale_shift(self, a: Tensor, layers: Layers, products: Products) -> tuple[Tensor, Tensor]:
        """The same by the chain of `fuse`, with `products`."""
        code = periodic_encoding(a.flatten(0, 1), self.octaves, torch.pi, identity=True)  # (B M, 2 + 4 octaves)
        slopes = [self.first_slope] + [NEGATIVE_SLOPE] * (len(layers) - 2)
        s, o = chain(code, layers, slopes, products).view(*a.shape[:2], 2).unbind(-1)
        return s.clamp(-S_MAX, S_MAX), o

    def fuse(self, f: Tensor) -> Layers:
        """The equivalent chain of layers for latents `(B, C)`: the bias of the layer that meets the latent is
        `(B, 1, width)`, one a frame; P's last Linear and the MLP's first are one matrix."""
        first = self.mlp[0]
        C = f.shape[-1]
        weight, bias = first.weight[:, C:], F.linear(self.latent(f), first.weight[:, :C], first.bias)  # (B, width)
        if len(self.projection) > 1:
            bias = bias + weight @ self.projection[2].bias
            weight = weight @ self.projection[2].weight
        layers = [(self.projection[0].weight, self.projection[0].bias), (weight, bias[:, None])]
        return layers + [(layer.weight, layer.bias) for layer in self.mlp[2::2]]


class Affine(nn.Module):
    """Affine map of (x, y) whose angle, two log-scales and two shifts come from an MLP on (t, z)."""

    def __init__(self, width: int = 256, num_layers: int = 8, octaves: int = 4):
        super().__init__()
        self.octaves = octaves
        self.mlp = mlp([2 + 2 * octaves] + [width] * (num_layers - 1) + [5], nn.ReLU)

    def theta_plain(self, t: Tensor, z: Tensor) -> Tensor:
        """(angle, log-scale x, shift x, log-scale y, shift y), `(B, M, 5)`, at times `(B, 1)`, depths `(B, M)`."""
        code = periodic_encoding(z[..., None], self.octaves, torch.pi)  # (B, M, 2L), sines then cosines
        code = code.unflatten(-1, (2, self.octaves)).transpose(-1, -2).flatten(-2)  # published order: octave by octave
        return self.mlp(torch.cat([code, t[..., None].expand(*z.shape, 1), z[..., None]], dim=-1))

    def theta(self, z: Tensor, layers: Layers, products: Products) -> Tensor:
        """The same by the chain of `fuse`, with `products`."""
        code = periodic_encoding(z.reshape(-1, 1), self.octaves, torch.pi, identity=True)  # (B M, 1 + 2L)
        return chain(code, layers, [0.0] * (len(layers) - 1), products).view(*z.shape, 5)

    def fuse(self, t: Tensor) -> Layers:
        """The MLP on (z, sines, cosines) for times `(B, 1)`: the time's share of the first layer is a bias."""
        first, L = self.mlp[0], self.octaves
        order = [2 * L + 1, *range(0, 2 * L, 2), *range(1, 2 * L, 2)]  # of the columns: z, sines, cosines
        layers = [(first.weight[:, order], (first.bias + t * first.weight[:, 2 * L])[:, None])]
        return layers + [(layer.weight, layer.bias) for layer in self.mlp[2::2]]


def affine_matrix(theta: Tensor) -> tuple[Tensor, ...]:
    """(a, b, c, d, tx, ty), each `(...)`, of x' = a x + b y + tx, y' = c x + d y + ty from `(..., 5)`."""
    angle, log_scale_x, tx, log_scale_y, ty = theta.unbind(-1)
    cos, sin, sx, sy = angle.cos(), angle.sin(), log_scale_x.exp(), log_scale_y.exp()
    return cos * sx, -sin * sx, sin * sy, cos * sy, tx, ty


def apply_affine(theta: Tensor, x: Tensor) -> Tensor:
    """Local points `(..., 3)` to the couplings' input."""
    px, py, z = x.unbind(-1)
    a, b, c, d, tx, ty = affine_matrix(theta)
    return torch.stack([a * px + b * py + tx, c * px + d * py + ty, z], dim=-1)


def invert_affine(theta: Tensor, y: Tensor) -> Tensor:
    """Inverse of `apply_affine`: z is unchanged by it, so that the same coefficients are inverted in closed form."""
    px, py, z = y.unbind(-1)
    a, b, c, d, tx, ty = affine_matrix(theta)
    px, py, determinant = px - tx, py - ty, a * d - b * c
    return torch.stack([(d * px - b * py) / determinant, (a * py - c * px) / determinant, z], dim=-1)


class InvertibleNetwork(nn.Module):
    """Affine map and coupling layers; `bind` fixes the frames, the result maps points both ways."""

    def __init__(self, coordinates: tuple[int, ...] = (0, 1, 2, 0, 1, 2), latent_dim: int = 128, width: int = 256,
                 hidden_layers: int = 2, projection_layers: int = 2, octaves: int = 4, affine: bool = True,
                 affine_width: int = 256, affine_layers: int = 8, backend: str = "torch"):
        super().__init__()
        self.layers = nn.ModuleList(
            CouplingLayer(c, latent_dim, width, hidden_layers, projection_layers, octaves, backend)
            for c in coordinates)
        self.affine = Affine(affine_width, affine_layers, octaves) if affine else None
        self.fused = True  # False: every layer by its definition, the twin that tests and benchmarks compare with
        self.backend = backend  # of the coupling layers (models.kernels.dispatch); torch and triton may be exchanged
        self.products = Products()  # of the fused layers

    def bind(self, f: Tensor, t: Tensor) -> "FrameMaps":
        """The maps of the frames with latents `(B, C)` and times `(B, 1)`; weights are fused once, here."""
        chains = [layer.fuse(f) for layer in self.layers] if self.fused and self.backend != "tcnn" else None
        return FrameMaps(self, f, t, chains, self.affine.fuse(t) if self.fused and self.affine is not None else None)


class FrameMaps:
    """Maps of B frames between their local volumes and the canonical one, `(B, M, 3)` -> `(B, M, 3)`."""

    def __init__(self, network: InvertibleNetwork, f: Tensor, t: Tensor, chains: list[Layers] | None,
                 affine: Layers | None):
        self.network, self.f, self.t, self.chains, self.affine = network, f, t, chains, affine
        self.call = stored  # or activation_checkpoint.recomputed: how the backward pass gets each layer's activations

    def select(self, index: Tensor | slice) -> "FrameMaps":
        """The maps of some of the frames, `index` `(B',)` or a slice into the bound ones; no repeat is fused again."""
        chains = self.chains and [_select(layers, index) for layers in self.chains]
        out = FrameMaps(self.network, self.f[index], self.t[index], chains, self.affine and _select(self.affine, index))
        out.call = self.call
        return out

    def to_canonical(self, x: Tensor) -> Tensor:
        """Local points to canonical ones (forward)."""
        if self.network.affine is not None:
            x = self.call(lambda x: apply_affine(self._theta(x[..., 2]), x), x)
        return self._couplings(x, inverse=False)

    def rays_to_canonical(self, x: Tensor) -> Tensor:
        """`to_canonical` of samples `(B, N, K, 3)` whose depths are those of the first ray, on every ray of a frame:
        the affine map, which depends on time and depth alone, is evaluated on one ray a frame."""
        if self.network.affine is not None:
            x = apply_affine(self._theta(x[:, 0, :, 2])[:, None], x)  # (B, 1, K, 5) meets (B, N, K, 3)
        return self._couplings(x.flatten(1, 2), inverse=False).view_as(x)

    def to_local(self, u: Tensor) -> Tensor:
        """Canonical points to local ones (inverse)."""
        u = self._couplings(u, inverse=True)
        if self.network.affine is None:
            return u
        return self.call(lambda u: invert_affine(self._theta(u[..., 2]), u), u)

    def _couplings(self, x: Tensor, inverse: bool) -> Tensor:
        """All coupling layers, `(B, M, 3)`; Triton's are one kernel and keep no activations, whatever `call` is."""
        layers = self.network.layers
        if self.network.backend == "triton" and self.chains is not None:
            precision = "bf16" if self.network.products.dtype == torch.bfloat16 else "fp32"
            return coupling_stack(x, self.chains, tuple(layer.coordinate for layer in layers), layers[0].octaves,
                                  layers[0].first_slope, inverse, precision)
        x, order = list(x.unbind(-1)), list(enumerate(layers))
        for k, layer in reversed(order) if inverse else order:
            x[layer.coordinate] = self.call(partial(self._couple, k, layer, inverse), *x)
        return torch.stack(x, dim=-1)

    def _theta(self, z: Tensor) -> Tensor:
        """The affine map's parameters `(B, M, 5)` at depths `(B, M)`."""
        if self.affine is not None:
            return self.network.affine.theta(z, self.affine, self.network.products)
        return self.network.affine.theta_plain(self.t, z)

    def _couple(self, k: int, layer: CouplingLayer, inverse: bool, *x: Tensor) -> Tensor:
        """The coordinate that layer k changes, after it, from the three before it, `(B, M)` each."""
        changed, kept = x[layer.coordinate], torch.stack([x[d] for d in layer.kept], dim=-1)  # (B, M), (B, M, 2)
        if self.chains is not None:
            s, o = layer.scale_shift(kept, self.chains[k], self.network.products)
        else:
            s, o = layer.scale_shift_plain(kept, self.f)
        return changed * torch.exp(s) + o if inverse else (changed - o) * torch.exp(-s)


def _select(layers: Layers, index: Tensor | slice) -> Layers:
    """A chain whose biases are those of frames `index` where they are one a frame."""
    return [(weight, bias[index] if bias.dim() == 3 else bias) for weight, bias in layers]
