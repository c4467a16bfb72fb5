"""Data-driven initialization of a new model: motion layers (`--init_layers`), depth prior (`--init_depth`).

`decide_motion_layers` is called before the model is built, `initialize` afterwards. The first process computes both and
shares the result, because machines may round differently.
"""

from argparse import Namespace
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.coords import denormalize_pixels, normalize_pixels
from models.omnimotion import OmniMotion
from training.distributed import Processes
from training.init_depth import fit_field_to_depth
from training.layer_similarities import find_layers
from training.motion_layers import layer_votes, layers_of_motion

BORDER_POINTS = 9  # positions along a side of a frame, for the part of the canonical plane that an image covers
BOX_MARGIN = 0.25  # normalized units, around that part
MAX_BOX = 8.0      # normalized units: largest canonical coordinate that an image covers


@dataclass
class MotionLayers:
    """Number of motion layers, and the motion that each starts with."""
    count: int
    similarities: np.ndarray | None = None  # (S, T, 2, 3), as of layer_similarities.find_layers; in the first process


def decide_motion_layers(options: Namespace, store, processes: Processes) -> MotionLayers:
    """The motion layers of a new model. Their number is `--grid_layers`; if that is 0, the video decides with
    `--init_layers`, and it is 2 without."""
    if not options.init_layers:
        return MotionLayers(options.grid_layers or 2)
    similarities = find_layers(store, options.grid_layers) if processes.first else None
    count = processes.from_first(len(similarities) if processes.first else 0)
    return MotionLayers(count, similarities)


def initialize(model: OmniMotion, options: Namespace, store, layers: MotionLayers, depth_priors: Tensor | None,
               processes: Processes) -> None:
    """Apply `--init_layers` and `--init_depth` to a new model, in place.

    depth_priors: `(T, H, W)` in [0, 2], needed for `--init_depth`."""
    if processes.first:
        _initialize_here(model, options, store, layers, depth_priors)
    if options.init_layers or options.init_depth:
        _broadcast_parameters(model, processes)


def _initialize_here(model: OmniMotion, options: Namespace, store, layers: MotionLayers,
                     depth_priors: Tensor | None) -> None:
    """As `initialize`, in this process only."""
    if options.init_layers:
        set_maps(model, store, layers.similarities)
        if options.field in ("images", "grid") and layers.count > 1:
            model.field.start_at(torch.from_numpy(layer_votes(model, store)))
    if options.init_depth:
        middle = model.config.num_frames // 2
        depth_range = options.max_depth - options.min_depth
        prior = options.min_depth + depth_priors[middle].float() / 2 * depth_range
        fit_field_to_depth(model, prior, middle, torch.Generator().manual_seed(options.seed + 2))


def set_maps(model: OmniMotion, store, similarities: np.ndarray) -> None:
    """Let the maps of a new model start with the motion of its layers, of similarities `(S, T, 2, 3)`, and its images
    cover what the maps reach."""
    device = next(model.parameters()).device
    vertices = model.deform.vertices()  # (R, R, 2)
    pixels = denormalize_pixels(vertices, model.size)
    moved = torch.from_numpy(layers_of_motion(store, pixels.numpy(), similarities))  # (T, S, R, R, 2)
    target = normalize_pixels(pixels + moved, model.size)
    if model.config.deform == "warp":
        thetas = affine_parameters(similarities.swapaxes(0, 1), model.size).to(device)
        model.deform.start_at(thetas, target.to(device))
    else:
        model.deform.start_at((target - vertices).to(device))
    if model.config.field == "images":
        model.field.set_boxes(*canonical_boxes(model))


def affine_parameters(similarity: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Parameters of models.layer_warps `(..., 5)` float32 of similarities `(..., 2, 3)` in pixels of frames of `size`
    (H, W)."""
    linear = torch.from_numpy(similarity[..., :2])
    angle = torch.atan2(linear[..., 1, 0], linear[..., 0, 0])
    log_scale = torch.linalg.det(linear).log() / 2
    center = torch.tensor([size[1] - 1, size[0] - 1], dtype=torch.float64) / 2
    shift = normalize_pixels((linear @ center) + torch.from_numpy(similarity[..., 2]), size)
    return torch.stack([angle, log_scale, shift[..., 0], log_scale, shift[..., 1]], dim=-1).float()


@torch.no_grad()
def canonical_boxes(model: OmniMotion) -> tuple[Tensor, Tensor]:
    """The smallest and largest canonical x and y of all frames, `(S, 2)` each, with BOX_MARGIN around them."""
    config = model.config
    device = model.field.boxes.device
    side = torch.linspace(-1, 1, BORDER_POINTS, device=device)
    xy = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1).flatten(0, 1)  # (n, 2)
    low, high = [], []
    with model.bound():
        for layer in range(config.grid_layers):
            z = config.min_depth + (layer + 0.5) / config.grid_layers * (config.max_depth - config.min_depth)
            x = torch.cat([xy, torch.full_like(xy[:, :1], z)], dim=-1).expand(config.num_frames, -1, -1)
            u = model.maps(torch.arange(config.num_frames, device=device)).to_canonical(x)[..., :2].flatten(0, 1)
            low.append(u.amin(0) - BOX_MARGIN)
            high.append(u.amax(0) + BOX_MARGIN)
    return torch.stack(low).clamp(min=-MAX_BOX), torch.stack(high).clamp(max=MAX_BOX)


@torch.no_grad()
def _broadcast_parameters(model: OmniMotion, processes: Processes) -> None:
    """Copy the parameters and boxes of the first process to all others."""
    tensors = list(model.parameters())
    if model.config.field == "images":
        tensors.append(model.field.boxes)
    if not processes.first:
        for tensor in tensors:
            tensor.zero_()
    processes.sum_all(tensors)
