"""The whole representation of one video (OmniMotion, section 4; docs/method.md).

Notation
    B, N, K  pairs of frames, pixels a pair, samples a ray
    ids      frame numbers (B,); p1 pixels of frame ids1 (B, N, 2); p2 where they are in frame ids2
    x1, u, x2  local samples of frame ids1, canonical samples, local samples of frame ids2   (B, N, K, 3)
    w        compositing weights of u along the ray                                          (B, N, K)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.activation_checkpoint import recomputed, recomputed_in_pieces
from models.canonical_field import CanonicalField
from models.coords import denormalize_pixels, normalize_pixels
from models.grid_deformation import GridMaps, GridNetwork
from models.grid_field import GridField
from models.invertible import FrameMaps, InvertibleNetwork
from models.rendering import composite, compositing_weights, jitter_depths, ray_depths, take_sample
from models.time_latent import TimeLatent

FIELD_PIECE = 1 << 13  # points whose field activations are in memory at a time, unless told otherwise


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the model's shape; it is stored in the checkpoint."""
    num_frames: int
    height: int
    width: int
    num_samples_ray: int = 32
    min_depth: float = 0.0
    max_depth: float = 2.0
    deform: str = "mlp"                # mlp | grid
    grid_levels: int = 6               # of deform = grid, which uses none of the following but grid_layers
    grid_layers: int = 2
    time_latent: str = "hash"          # hash | gabor | table
    latent_dim: int = 128
    coordinates: tuple[int, ...] = (0, 1, 2, 0, 1, 2)  # changed by the coupling layers, in turn
    coupling_width: int = 256
    coupling_layers: int = 2           # hidden layers of a coupling's MLP
    projection_layers: int = 2         # 1: OmniMotion's
    pe_freq: int = 4
    use_affine: bool = True
    affine_width: int = 256
    affine_layers: int = 8
    field: str = "gabor"               # gabor | grid, which uses none of the following
    field_width: int = 256
    field_layers: int = 3
    field_encoding: str = "periodic"   # periodic | nerf | none


@dataclass
class PairPrediction:
    """What the losses look at; shapes in the module's notation."""
    depths: Tensor       # (B, N, K) of x1
    local: Tensor        # x1
    canonical: Tensor    # u
    target: Tensor       # x2
    weights: Tensor      # w with the samples whose mapped depth leaves the range taken out
    rgb: Tensor          # (B, N, 3) rendered color at p1, in [0, 1]
    pixels: Tensor       # (B, N, 2) predicted p2


class OmniMotion(nn.Module):
    """Time latents, invertible network and canonical field of one video."""

    def __init__(self, config: ModelConfig, mlp_backend: str = "torch"):
        """`mlp_backend`: see models.kernels.dispatch. State dicts do not depend on it."""
        super().__init__()
        self.config = config
        self.size = (config.height, config.width)
        depth_range, grids = (config.min_depth, config.max_depth), config.deform == "grid"
        kind = "none" if grids else config.time_latent
        self.time_latent = TimeLatent(config.num_frames, kind, config.latent_dim, mlp_backend)
        self.deform = GridNetwork(
            config.num_frames, depth_range, config.grid_levels, config.grid_layers) if grids else InvertibleNetwork(
            config.coordinates, config.latent_dim, config.coupling_width, config.coupling_layers,
            config.projection_layers, config.pe_freq, config.use_affine, config.affine_width, config.affine_layers,
            mlp_backend)
        self.field = GridField(depth_range) if config.field == "grid" else CanonicalField(
            config.field_width, config.field_layers, config.field_encoding)
        self._bound: FrameMaps | GridMaps | None = None
        self.recompute_above = 1 << 15  # samples a step from which on activations are recomputed, not stored
        self.piece = 0  # points whose activations are then in memory at a time; 0: all of a layer's
        self.field_piece = FIELD_PIECE  # the same of the field, and at inference

    @property
    def sample_spacing(self) -> float:
        """(max_depth - min_depth) / K, the unit of the occlusion test, as published."""
        return (self.config.max_depth - self.config.min_depth) / self.config.num_samples_ray

    @contextmanager
    def bound(self) -> Iterator[None]:
        """Within it the weights do not change: the maps of all frames are fused once, `maps` selects among them."""
        self._bound = self.maps(torch.arange(self.config.num_frames, device=self.time_latent.t.device))
        try:
            yield
        finally:
            self._bound = None

    def maps(self, ids: Tensor) -> FrameMaps | GridMaps:
        """Maps between the local volumes of frames `(B,)` and the canonical volume."""
        if self._bound is not None:
            return self._bound.select(ids)
        if self.config.deform == "grid":
            return self.deform.bind(ids)
        return self.deform.bind(self.time_latent()[ids], self.time_latent.t[ids])

    def lift(self, pixels: Tensor, jitter: torch.Generator | Tensor | None = None) -> Tensor:
        """Pixels `(B, N, 2)` to local samples on their rays `(B, N, K, 3)`; stratified jitter in training only, drawn
        from a generator or given as numbers in [0, 1], `(B, 1, K)`.

        All rays of a frame get the same depths, also jittered ones: what depends on time and depth alone is then
        evaluated once a frame and depth."""
        z = ray_depths(self.config.num_samples_ray, self.config.min_depth, self.config.max_depth, pixels)
        shape = pixels.shape[:-1]
        if isinstance(jitter, torch.Generator):
            jitter = torch.rand(shape[0], 1, len(z), device=z.device, generator=jitter)
        if jitter is not None:
            z = jitter_depths(z, jitter)  # (B, 1, K)
        xy = normalize_pixels(pixels, self.size)[..., None, :].expand(*shape, self.config.num_samples_ray, 2)
        return torch.cat([xy, z.expand(*shape, -1)[..., None]], dim=-1)  # (B, N, K, 3)

    def render(self, canonical: Tensor, near_share: float = 0.0) -> tuple[Tensor, Tensor]:
        """Colors `(..., K, 3)` and compositing weights `(..., K)` of canonical samples `(..., K, 3)`.

        The nearest `near_share` of the samples is transparent (OmniMotion's remedy for a wrong surface order)."""
        rgb, sigma = self._field(canonical)
        alpha = 1 - torch.exp(-sigma)
        if near_share:
            hidden = int(near_share * alpha.shape[-1])
            alpha = torch.cat([torch.zeros_like(alpha[..., :hidden]), alpha[..., hidden:]], dim=-1)
        return rgb, compositing_weights(alpha)

    @property
    def _recomputed(self) -> Callable:
        return recomputed_in_pieces(self.piece) if self.piece else recomputed

    def _field(self, canonical: Tensor) -> tuple[Tensor, Tensor]:
        """The field's colors and densities; in pieces whose activations are not kept at inference, and in training
        if there are many points."""
        points = canonical.reshape(-1, 3)
        if torch.is_grad_enabled() and len(points) <= self.recompute_above:
            return self.field(canonical)
        rgb, sigma = zip(*(recomputed(self.field, piece) for piece in points.split(self.field_piece)), strict=True)
        shape = canonical.shape[:-1]
        return torch.cat(rgb).view(*shape, 3), torch.cat(sigma).view(shape)

    def predict_pairs(self, p1: Tensor, ids1: Tensor, ids2: Tensor, jitter: torch.Generator | Tensor | None = None,
                      near_share: float = 0.0) -> PairPrediction:
        """The forward pass of training for pixels `(B, N, 2)` of frames `ids1` and their partners `ids2`; `jitter` as
        `lift` takes it."""
        B = len(p1)
        both = self.maps(torch.cat([ids1, ids2]))
        local = self.lift(p1, jitter)  # (B, N, K, 3)
        if local[..., 0].numel() > self.recompute_above:
            both.call = self._recomputed  # `select` hands it on
        canonical = both.select(slice(B)).rays_to_canonical(local)
        target = both.select(slice(B, None)).to_local(canonical.flatten(1, 2)).view_as(local)
        rgb, weights = self.render(canonical, near_share)
        rendered = composite(weights, rgb)
        depth = target[..., 2]
        weights = weights * ((depth >= self.config.min_depth) & (depth <= self.config.max_depth))
        pixels = denormalize_pixels(composite(weights, target)[..., :2], self.size)
        return PairPrediction(local[..., 2], local, canonical, target, weights, rendered, pixels)

    def scene_flow(self, local: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Scene flow into and out of frames `ids` `(B,)`, each with a frame before and after it, at local samples
        `(B, N, K, 3)`: x - x_before and x_after - x (OmniMotion's smoothness term, supplement)."""
        x = local.flatten(1, 2)
        around = self.maps(torch.cat([ids, ids - 1, ids + 1]))
        if 3 * x[..., 0].numel() > self.recompute_above:
            around.call = self._recomputed
        B = len(ids)
        u = around.select(slice(B)).to_canonical(x)
        before, after = (around.select(slice(k * B, (k + 1) * B)).to_local(u) for k in (1, 2))
        return (x - before).view_as(local), (after - x).view_as(local)

    # Inference: rays without jitter, everything under no_grad by the caller.

    def correspond(self, p1: Tensor, ids1: Tensor, ids2: Tensor, use_max_loc: bool = False) -> tuple[Tensor, Tensor]:
        """Pixels `(B, N, 2)` of frames `ids1` in frames `ids2`: positions `(B, N, 2)` and depths `(B, N)` there.

        `use_max_loc` maps the sample of the largest weight only, else all samples are composited as in training."""
        x1 = self.lift(p1)
        u = self.maps(ids1).rays_to_canonical(x1)
        weights = self.render(u)[1]
        if use_max_loc:
            u, weights = take_sample(u, weights.argmax(-1))[:, :, None], torch.ones_like(weights[..., :1])
        return self.target_position(u, weights, ids2)

    def target_position(self, u: Tensor, weights: Tensor, ids2: Tensor) -> tuple[Tensor, Tensor]:
        """Second half of `correspond`: canonical samples `(B, N, K, 3)`, composited by their weights, in `ids2`."""
        x2 = composite(weights, self.maps(ids2).to_local(u.flatten(1, 2)).view_as(u))
        return denormalize_pixels(x2[..., :2], self.size), x2[..., 2]

    def occlusion_score(self, p2: Tensor, depth: Tensor, ids2: Tensor) -> Tensor:
        """How much of the light is absorbed in front of depth `(B, N)` at pixels `(B, N, 2)` of frames `ids2`:
        sum of the weights nearer by more than 1.1 sample spacings, `(B, N)` (OmniMotion, section 4.3)."""
        x2 = self.lift(p2)
        weights = self.render(self.maps(ids2).rays_to_canonical(x2))[1]
        in_front = x2[..., 2] < depth[..., None] - 1.1 * self.sample_spacing
        return (weights * in_front).sum(-1)

    def color_and_depth(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rendered colors `(B, N, 3)` and depths `(B, N)` at pixels `(B, N, 2)` of frames `(B,)`."""
        x = self.lift(pixels)
        rgb, weights = self.render(self.maps(ids).rays_to_canonical(x))
        return composite(weights, rgb), (weights * x[..., 2]).sum(-1)
