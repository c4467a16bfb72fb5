"""Invertible network: local volume of frame i <-> canonical volume (OmniMotion, section 4.1; docs/method.md).

Notation
    B        number of frames in the batch, with M points per frame   x: (B, M, 3)
    f        time latents of these frames                             (B, C)
    t        times of these frames                                    (B, 1)
    layer k  coupling layer: changes coordinate c_k and keeps the other two, a = x without c_k   (B, M, 2)
             (s, o) = MLP_k([latent_k(f), P_k(code(a))]), log-scale s clamped to [-8, 8], offset o
             code is the periodic encoding of models.encoding, P_k the projection
             forward  y_c = (x_c - o) exp(-s)        inverse  x_c = y_c exp(s) + o
    affine   (x, y) -> A(t, z) (x, y) + b(t, z), applied before layer 0 in the forward direction
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
    """Network that predicts the log-scale s and the offset o of one coupling layer.

    `projection_layers` = 2: the projection is Linear, ReLU, Linear (the default of this project). No activation
    follows the second Linear, so `fuse` can merge it with the first Linear of the MLP.
    `projection_layers` = 1: the projection is Linear, LeakyReLU (OmniMotion's code).
    """

    def __init__(self, coordinate: int, latent_dim: int, width: int, hidden_layers: int, projection_layers: int,
                 octaves: int, backend: str = "torch"):
        super().__init__()
        self.octaves = octaves
        self.coordinate = coordinate
        self.kept = [d for d in range(3) if d != coordinate]
        self.first_slope = NEGATIVE_SLOPE if projection_layers == 1 else 0.0  # of the projection's activation
        sizes = [2 + 2 * 2 * octaves] + [width] * projection_layers
        self.projection = mlp(sizes, nn.ReLU)
        self.latent = mlp([latent_dim] * 3, nn.LeakyReLU)
        if backend == "tcnn":
            self.mlp = TcnnMlp(latent_dim + width, width, hidden_layers, 2)
        else:
            self.mlp = mlp([latent_dim + width] + [width] * hidden_layers + [2], nn.LeakyReLU)

    def scale_shift_plain(self, a: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """Reference version: s and o, `(B, M)` each, from kept coordinates `(B, M, 2)` and latents `(B, C)`."""
        projected = self.projection(periodic_encoding(a, self.octaves, torch.pi, identity=True))  # (B, M, width)
        if len(self.projection) == 1:
            projected = F.leaky_relu(projected, NEGATIVE_SLOPE)
        latent = self.latent(f)[:, None].expand(-1, a.shape[1], -1)  # (B, M, C)
        s, o = self.mlp(torch.cat([latent, projected], dim=-1)).unbind(-1)
        return s.clamp(-S_MAX, S_MAX), o

    def scale_shift(self, a: Tensor, layers: Layers, products: Products) -> tuple[Tensor, Tensor]:
        """Fast version of `scale_shift_plain`: `layers` come from `fuse`, `products` sets the precision and kernels."""
        code = periodic_encoding(a.flatten(0, 1), self.octaves, torch.pi, identity=True)  # (B M, 2 + 4 octaves)
        slopes = [self.first_slope] + [NEGATIVE_SLOPE] * (len(layers) - 2)
        s, o = chain(code, layers, slopes, products).view(*a.shape[:2], 2).unbind(-1)
        return s.clamp(-S_MAX, S_MAX), o

    def fuse(self, f: Tensor) -> Layers:
        """Equivalent chain of linear layers for latents `(B, C)`.

        The latents' contribution to the MLP's first layer becomes a bias per frame, `(B, 1, width)`. With two
        projection layers, the second one is multiplied into the MLP's first layer."""
        first = self.mlp[0]
        C = f.shape[-1]
        weight = first.weight[:, C:]
        bias = F.linear(self.latent(f), first.weight[:, :C], first.bias)  # (B, width)
        if len(self.projection) > 1:
            bias = bias + weight @ self.projection[2].bias
            weight = weight @ self.projection[2].weight
        layers = [(self.projection[0].weight, self.projection[0].bias), (weight, bias[:, None])]
        return layers + [(layer.weight, layer.bias) for layer in self.mlp[2::2]]


class Affine(nn.Module):
    """Affine map of (x, y). An MLP on (t, z) predicts its angle, two log-scales and two shifts."""

    def __init__(self, width: int = 256, num_layers: int = 8, octaves: int = 4):
        super().__init__()
        self.octaves = octaves
        self.mlp = mlp([2 + 2 * octaves] + [width] * (num_layers - 1) + [5], nn.ReLU)

    def theta_plain(self, t: Tensor, z: Tensor) -> Tensor:
        """Reference version: (angle, log-scale x, shift x, log-scale y, shift y), `(B, M, 5)`, from times `(B, 1)` and
        depths `(B, M)`."""
        code = periodic_encoding(z[..., None], self.octaves, torch.pi)  # (B, M, 2L), sines then cosines
        # OmniMotion's column order: sine and cosine of octave 0, of octave 1, ...
        code = code.unflatten(-1, (2, self.octaves)).transpose(-1, -2).flatten(-2)
        return self.mlp(torch.cat([code, t[..., None].expand(*z.shape, 1), z[..., None]], dim=-1))

    def theta(self, z: Tensor, layers: Layers, products: Products) -> Tensor:
        """Fast version of `theta_plain`: `layers` come from `fuse`, `products` sets the precision and kernels."""
        code = periodic_encoding(z.reshape(-1, 1), self.octaves, torch.pi, identity=True)  # (B M, 1 + 2L)
        return chain(code, layers, [0.0] * (len(layers) - 1), products).view(*z.shape, 5)

    def fuse(self, t: Tensor) -> Layers:
        """Equivalent MLP on (z, sines, cosines) for times `(B, 1)`: the contribution of t to the first layer becomes a
        bias per frame, `(B, 1, width)`."""
        first = self.mlp[0]
        L = self.octaves
        order = [2 * L + 1, *range(0, 2 * L, 2), *range(1, 2 * L, 2)]  # new column order: z, sines, cosines
        layers = [(first.weight[:, order], (first.bias + t * first.weight[:, 2 * L])[:, None])]
        return layers + [(layer.weight, layer.bias) for layer in self.mlp[2::2]]


def affine_matrix(theta: Tensor) -> tuple[Tensor, ...]:
    """Coefficients (a, b, c, d, tx, ty), `(...)` each, of x' = a x + b y + tx, y' = c x + d y + ty; `theta` is
    `(..., 5)` in the order of `Affine.theta_plain`."""
    angle, log_scale_x, tx, log_scale_y, ty = theta.unbind(-1)
    cos = angle.cos()
    sin = angle.sin()
    sx = log_scale_x.exp()
    sy = log_scale_y.exp()
    return cos * sx, -sin * sx, sin * sy, cos * sy, tx, ty


def solve_affine(coefficients: tuple[Tensor, ...], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinates, `(...)` each, that the affine map with the `coefficients` of `affine_matrix` maps to x and y."""
    a, b, c, d, tx, ty = coefficients
    x = x - tx
    y = y - ty
    determinant = a * d - b * c
    return (d * x - b * y) / determinant, (a * y - c * x) / determinant


def apply_affine(theta: Tensor, x: Tensor) -> Tensor:
    """Apply the affine map to local points `(..., 3)`; the result is the input of the coupling layers."""
    px, py, z = x.unbind(-1)
    a, b, c, d, tx, ty = affine_matrix(theta)
    return torch.stack([a * px + b * py + tx, c * px + d * py + ty, z], dim=-1)


def invert_affine(theta: Tensor, y: Tensor) -> Tensor:
    """Closed-form inverse of `apply_affine`. The map leaves z unchanged, so `theta` is the same in both directions."""
    px, py, z = y.unbind(-1)
    px, py = solve_affine(affine_matrix(theta), px, py)
    return torch.stack([px, py, z], dim=-1)


class InvertibleNetwork(nn.Module):
    """Affine map followed by coupling layers. `bind` returns the maps of given frames, in both directions."""

    def __init__(self, coordinates: tuple[int, ...] = (0, 1, 2, 0, 1, 2), latent_dim: int = 128, width: int = 256,
                 hidden_layers: int = 2, projection_layers: int = 2, octaves: int = 4, affine: bool = True,
                 affine_width: int = 256, affine_layers: int = 8, backend: str = "torch"):
        super().__init__()
        self.layers = nn.ModuleList(
            CouplingLayer(c, latent_dim, width, hidden_layers, projection_layers, octaves, backend)
            for c in coordinates)
        self.affine = Affine(affine_width, affine_layers, octaves) if affine else None
        self.fused = True  # False: use the reference versions (for tests and benchmarks)
        self.backend = backend  # torch | triton | tcnn (models.kernels.backend); torch and triton share their weights
        self.products = Products()  # precision and kernels of the fused layers

    def bind(self, f: Tensor, t: Tensor) -> "FrameMaps":
        """Maps of the frames with latents `(B, C)` and times `(B, 1)`. The weights are fused here, once per call."""
        chains = [layer.fuse(f) for layer in self.layers] if self.fused and self.backend != "tcnn" else None
        affine = self.affine.fuse(t) if self.fused and self.affine is not None else None
        return FrameMaps(self, f, t, chains, affine)


class FrameMaps:
    """Maps between the local volumes of B frames and the canonical volume, `(B, M, 3)` -> `(B, M, 3)`."""

    def __init__(self, network: InvertibleNetwork, f: Tensor, t: Tensor, chains: list[Layers] | None,
                 affine: Layers | None):
        self.network = network
        self.f = f
        self.t = t
        self.chains = chains  # fused coupling layers; None: use the reference version
        self.affine = affine  # fused affine map's MLP, or None
        self.call = stored  # or `recomputed` (models.activation_checkpoint): whether activations are kept

    def select(self, index: Tensor | slice) -> "FrameMaps":
        """Maps of a subset of the frames. `index`: `(B',)` positions in this object's frames, or a slice; repeats are
        allowed. The fused weights are reused."""
        chains = self.chains and [_select(layers, index) for layers in self.chains]
        affine = self.affine and _select(self.affine, index)
        out = FrameMaps(self.network, self.f[index], self.t[index], chains, affine)
        out.call = self.call
        return out

    def to_canonical(self, x: Tensor) -> Tensor:
        """Local points `(B, M, 3)` to canonical points (forward)."""
        if self.network.affine is not None:
            x = self.call(lambda x: apply_affine(self._theta(x[..., 2]), x), x)
        return self._couplings(x, inverse=False)

    def rays_to_canonical(self, x: Tensor) -> Tensor:
        """`to_canonical` for samples `(B, N, K, 3)` on rays. All rays of a frame must have the same K depths: the
        affine map depends only on time and depth, so its MLP is evaluated on the first ray of each frame."""
        if self.network.affine is not None:
            x = apply_affine(self._theta(x[:, 0, :, 2])[:, None], x)  # (B, 1, K, 5) broadcasts to N rays
        return self._couplings(x.flatten(1, 2), inverse=False).view_as(x)

    def to_local(self, u: Tensor) -> Tensor:
        """Canonical points `(B, M, 3)` to local points (inverse)."""
        u = self._couplings(u, inverse=True)
        if self.network.affine is None:
            return u
        return self.call(lambda u: invert_affine(self._theta(u[..., 2]), u), u)

    def _couplings(self, x: Tensor, inverse: bool) -> Tensor:
        """Apply all coupling layers to `(B, M, 3)`. The Triton backend runs them as one kernel; it stores no
        activations and ignores `call`."""
        layers = self.network.layers
        if self.network.backend == "triton" and self.chains is not None:
            precision = "bf16" if self.network.products.dtype == torch.bfloat16 else "fp32"
            return coupling_stack(x, self.chains, tuple(layer.coordinate for layer in layers), layers[0].octaves,
                                  layers[0].first_slope, inverse, precision)
        x = list(x.unbind(-1))
        order = range(len(layers))
        for k in reversed(order) if inverse else order:
            layer = layers[k]
            x[layer.coordinate] = self.call(partial(self._couple, k, layer, inverse), *x)
        return torch.stack(x, dim=-1)

    def _theta(self, z: Tensor) -> Tensor:
        """Parameters `(B, M, 5)` of the affine map at depths `(B, M)`."""
        if self.affine is not None:
            return self.network.affine.theta(z, self.affine, self.network.products)
        return self.network.affine.theta_plain(self.t, z)

    def _couple(self, k: int, layer: CouplingLayer, inverse: bool, *x: Tensor) -> Tensor:
        """New value `(B, M)` of the coordinate that layer k changes; `x` are the layer's three input coordinates,
        `(B, M)` each."""
        changed = x[layer.coordinate]
        kept = torch.stack([x[d] for d in layer.kept], dim=-1)  # (B, M, 2)
        if self.chains is not None:
            s, o = layer.scale_shift(kept, self.chains[k], self.network.products)
        else:
            s, o = layer.scale_shift_plain(kept, self.f)
        return changed * torch.exp(s) + o if inverse else (changed - o) * torch.exp(-s)


def _select(layers: Layers, index: Tensor | slice) -> Layers:
    """The same chain for frames `index`: biases per frame `(B, 1, out)` are indexed, shared biases are kept."""
    return [(weight, bias[index] if bias.dim() == 3 else bias) for weight, bias in layers]
