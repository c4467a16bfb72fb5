"""Complete model of one video: time latents, deformation and canonical field (OmniMotion, section 4; docs/method.md).

Notation
    B, N, K  numbers of frame pairs, of pixels per pair, of samples per ray
    ids      frame indices (B,); p1 pixels of frames ids1 (B, N, 2); p2 their positions in frames ids2 (B, N, 2)
    x1, u, x2  local samples of frame ids1, canonical samples, local samples of frame ids2   (B, N, K, 3)
    w        compositing weights of u along the ray                                          (B, N, K)
"""

from collections.abc import Iterator
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
from models.layer_images import LayerImages
from models.layer_warps import LayerWarps, WarpMaps
from models.rendering import composite, compositing_weights, jitter_depths, ray_depths, take_sample
from models.time_latent import TimeLatent

FIELD_PIECE = 1 << 13  # default of OmniMotion.field_piece, in points


@dataclass(frozen=True)
class ModelConfig:
    """Options that determine the model's parameters and rays; stored in the checkpoint.

    Frame sizes are in pixels, depths have no unit, `*_width` are numbers of hidden units."""
    num_frames: int
    height: int
    width: int
    num_samples_ray: int = 32
    min_depth: float = 0.0
    max_depth: float = 2.0
    deform: str = "mlp"                # mlp | warp | grid
    grid_levels: int = 6               # number of levels, for deform = warp or grid
    grid_layers: int = 2               # number of layers, for deform = warp or grid
    time_latent: str = "hash"          # hash | gabor | table; from here to affine_layers: deform = mlp only
    latent_dim: int = 128
    coordinates: tuple[int, ...] = (0, 1, 2, 0, 1, 2)  # coordinate that each coupling layer changes
    coupling_width: int = 256
    coupling_layers: int = 2           # hidden layers in the MLP of a coupling layer
    projection_layers: int = 2         # 1: as in OmniMotion's code
    pe_freq: int = 4                   # octaves of the periodic encoding in coupling layers and affine map
    use_affine: bool = True
    affine_width: int = 256
    affine_layers: int = 8
    field: str = "gabor"               # gabor | images | grid; the options below: gabor only
    field_width: int = 256
    field_layers: int = 3
    field_encoding: str = "periodic"   # periodic | nerf | none


@dataclass
class PairPrediction:
    """Input of the losses; symbols as in the module's notation."""
    depths: Tensor       # (B, N, K) depths of x1
    local: Tensor        # x1
    canonical: Tensor    # u
    target: Tensor       # x2
    weights: Tensor      # w, set to 0 where the depth of x2 is outside [min_depth, max_depth]
    rgb: Tensor          # (B, N, 3) rendered color at p1, in [0, 1]
    pixels: Tensor       # (B, N, 2) predicted p2


class OmniMotion(nn.Module):
    """Time latents, deformation network and canonical field of one video."""

    def __init__(self, config: ModelConfig, mlp_backend: str = "torch"):
        """`mlp_backend`: torch | triton | tcnn (models.kernels.backend); state dicts do not depend on it."""
        super().__init__()
        self.config = config
        self.size = (config.height, config.width)
        depth_range = (config.min_depth, config.max_depth)
        if config.deform == "warp":
            self.time_latent = TimeLatent(config.num_frames, "none")
            self.deform = LayerWarps(config.num_frames, self.size, depth_range, config.grid_levels, config.grid_layers)
        elif config.deform == "grid":
            self.time_latent = TimeLatent(config.num_frames, "none")
            self.deform = GridNetwork(config.num_frames, depth_range, config.grid_levels, config.grid_layers)
        else:
            self.time_latent = TimeLatent(config.num_frames, config.time_latent, config.latent_dim, mlp_backend)
            self.deform = InvertibleNetwork(
                config.coordinates, config.latent_dim, config.coupling_width, config.coupling_layers,
                config.projection_layers, config.pe_freq, config.use_affine, config.affine_width,
                config.affine_layers, mlp_backend)
        if config.field == "images":
            self.field = LayerImages(depth_range, config.grid_layers)
        elif config.field == "grid":
            self.field = GridField(depth_range)
        else:
            self.field = CanonicalField(config.field_width, config.field_layers, config.field_encoding)
        self._bound: FrameMaps | WarpMaps | GridMaps | None = None
        self.recompute_above = 1 << 15  # with more samples per step than this, recompute activations, do not store them
        self.piece = 0  # when recomputing: points of the deformation in memory at a time; 0: all points of a layer
        self.field_piece = FIELD_PIECE  # when recomputing and at inference: points of the field in memory at a time

    @contextmanager
    def bound(self) -> Iterator[None]:
        """Context in which the weights must not change: fuses the maps of all frames once; `maps` then selects from
        them."""
        outer = self._bound  # in a context within another one, the maps are already there
        if outer is None:
            self._bound = self.maps(torch.arange(self.config.num_frames, device=self.time_latent.t.device))
        try:
            yield
        finally:
            self._bound = outer

    def maps(self, ids: Tensor) -> FrameMaps | WarpMaps | GridMaps:
        """Maps between the local volumes of frames `(B,)` and the canonical volume."""
        if self._bound is not None:
            return self._bound.select(ids)
        if self.config.deform != "mlp":
            return self.deform.bind(ids)
        return self.deform.bind(self.time_latent()[ids], self.time_latent.t[ids])

    def lift(self, pixels: Tensor, jitter: Tensor | None = None) -> Tensor:
        """Sample the rays of pixels `(B, N, 2)`; returns local samples `(B, N, K, 3)`.

        `jitter`: random numbers in [0, 1], `(B, 1, K)`, that move the depths within their intervals (stratified
        sampling, training only). All rays of a frame share their depths, with jitter too, so that a function of time
        and depth alone is evaluated once per frame and depth."""
        z = ray_depths(self.config.num_samples_ray, self.config.min_depth, self.config.max_depth, pixels)
        if jitter is not None and self.config.deform != "warp":  # layers have no depth: their samples stay
            z = jitter_depths(z, jitter)  # (B, 1, K)
        shape = pixels.shape[:-1]
        xy = normalize_pixels(pixels, self.size)[..., None, :].expand(*shape, self.config.num_samples_ray, 2)
        return torch.cat([xy, z.expand(*shape, -1)[..., None]], dim=-1)  # (B, N, K, 3)

    def render(self, canonical: Tensor, near_share: float = 0.0) -> tuple[Tensor, Tensor]:
        """Colors `(..., K, 3)` and compositing weights `(..., K)` of canonical samples `(..., K, 3)`.

        `near_share`: fraction in [0, 1) of the samples, nearest first, whose alpha is set to 0. OmniMotion's code does
        this against a wrong order of surfaces."""
        rgb, sigma = self._field(canonical)
        alpha = 1 - torch.exp(-sigma)
        if near_share:
            hidden = int(near_share * alpha.shape[-1])
            alpha = torch.cat([torch.zeros_like(alpha[..., :hidden]), alpha[..., hidden:]], dim=-1)
        return rgb, compositing_weights(alpha)

    def _field(self, canonical: Tensor) -> tuple[Tensor, Tensor]:
        """Colors `(..., 3)` and densities `(...)` of canonical points `(..., 3)`. At inference, and in training with
        more than `recompute_above` points, the field runs on pieces of `field_piece` points and keeps no activations.
        """
        points = canonical.reshape(-1, 3)
        if torch.is_grad_enabled() and len(points) <= self.recompute_above:
            return self.field(canonical)
        rgb, sigma = zip(*(recomputed(self.field, piece) for piece in points.split(self.field_piece)), strict=True)
        shape = canonical.shape[:-1]
        return torch.cat(rgb).view(*shape, 3), torch.cat(sigma).view(shape)

    def _limit_memory(self, maps: FrameMaps | WarpMaps | GridMaps, num_points: int) -> None:
        """Make `maps`, and what `select` returns, recompute activations if there are many points."""
        if num_points > self.recompute_above:
            maps.call = recomputed_in_pieces(self.piece) if self.piece else recomputed

    def predict_pairs(self, p1: Tensor, ids1: Tensor, ids2: Tensor, jitter: Tensor | None = None,
                      near_share: float = 0.0) -> PairPrediction:
        """Forward pass of training: map pixels `(B, N, 2)` of frames `ids1` to frames `ids2`, both `(B,)`. `jitter` as
        in `lift`, `near_share` as in `render`."""
        B = len(p1)
        both = self.maps(torch.cat([ids1, ids2]))
        local = self.lift(p1, jitter)  # (B, N, K, 3)
        self._limit_memory(both, local[..., 0].numel())
        if isinstance(both, WarpMaps):
            canonical, target = both.transfer(local)
        else:
            canonical = both.select(slice(B)).rays_to_canonical(local)
            target = both.select(slice(B, None)).to_local(canonical.flatten(1, 2)).view_as(local)
        rgb, weights = self.render(canonical, near_share)
        rendered = composite(weights, rgb)
        depth = target[..., 2]
        weights = weights * ((depth >= self.config.min_depth) & (depth <= self.config.max_depth))
        pixels = denormalize_pixels(composite(weights, target)[..., :2], self.size)
        return PairPrediction(local[..., 2], local, canonical, target, weights, rendered, pixels)

    def scene_flow(self, local: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Scene flow into and out of frames `ids`, `(B,)`, at local samples `(B, N, K, 3)`: x - x_before and
        x_after - x, `(B, N, K, 3)` each. Each frame needs a frame before and after it. Used by OmniMotion's smoothness
        loss (supplement)."""
        x = local.flatten(1, 2)
        around = self.maps(torch.cat([ids, ids - 1, ids + 1]))
        self._limit_memory(around, 3 * x[..., 0].numel())
        B = len(ids)
        u = around.select(slice(B)).to_canonical(x)
        before, after = (around.select(slice(k * B, (k + 1) * B)).to_local(u) for k in (1, 2))
        return (x - before).view_as(local), (after - x).view_as(local)

    # Inference: rays have no jitter; the caller disables gradients (torch.no_grad).

    def correspond(self, p1: Tensor, ids1: Tensor, ids2: Tensor, use_max_loc: bool = False) -> tuple[Tensor, Tensor]:
        """Map pixels `(B, N, 2)` of frames `ids1` to frames `ids2`: positions `(B, N, 2)` in pixels, depths `(B, N)`.

        `use_max_loc`: see `source_samples`."""
        u, weights = self.source_samples(p1, ids1, use_max_loc)
        return self.target_position(u, weights, ids2)

    def source_samples(self, p1: Tensor, ids1: Tensor, use_max_loc: bool) -> tuple[Tensor, Tensor]:
        """First half of `correspond`: canonical samples `(B, N, K, 3)` of the rays and their weights `(B, N, K)`.

        `use_max_loc`: only the sample with the largest weight, with weight 1, so K is 1 in the result. Otherwise all
        samples are composited, as in training."""
        u = self.maps(ids1).rays_to_canonical(self.lift(p1))
        weights = self.render(u)[1]
        if not use_max_loc:
            return u, weights
        return take_sample(u, weights.argmax(-1))[:, :, None], torch.ones_like(weights[..., :1])

    def target_position(self, u: Tensor, weights: Tensor, ids2: Tensor) -> tuple[Tensor, Tensor]:
        """Second half of `correspond`: map the samples to frames `ids2` and composite them; returns positions
        `(B, N, 2)` in pixels and depths `(B, N)`."""
        x2 = composite(weights, self.maps(ids2).to_local(u.flatten(1, 2)).view_as(u))
        return denormalize_pixels(x2[..., :2], self.size), x2[..., 2]

    def occlusion_score(self, p2: Tensor, depth: Tensor, ids2: Tensor) -> Tensor:
        """Occlusion score `(B, N)` in [0, 1] of points at pixels `(B, N, 2)` and depths `(B, N)` of frames `ids2`.

        Sum of the compositing weights of the samples that lie in front of the depth by more than 1.1 sample spacings
        (OmniMotion, section 4.3). A spacing is (max_depth - min_depth) / K, as in OmniMotion's code."""
        spacing = (self.config.max_depth - self.config.min_depth) / self.config.num_samples_ray
        x2 = self.lift(p2)
        in_front = x2[..., 2] < depth[..., None] - 1.1 * spacing
        used = max(int(in_front.flatten(0, 1).any(0).sum()), 1)  # samples behind these are not in front of any point
        weights = self.render(self.maps(ids2).rays_to_canonical(x2[..., :used, :]))[1]
        return (weights * in_front[..., :used]).sum(-1)

    def color_and_depth(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rendered colors `(B, N, 3)` in [0, 1] and depths `(B, N)` at pixels `(B, N, 2)` of frames `ids`, `(B,)`."""
        x = self.lift(pixels)
        rgb, weights = self.render(self.maps(ids).rays_to_canonical(x))
        return composite(weights, rgb), (weights * x[..., 2]).sum(-1)
