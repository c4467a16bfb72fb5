"""Data-driven initialization of a new model: motion layers (`--init_layers`), depth prior (`--init_depth`).

`decide_motion_layers` is called before the model is built, `initialize` afterwards.
"""

from argparse import Namespace
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from models.coords import denormalize_pixels, normalize_pixels
from models.omnimotion import OmniMotion
from training.distributed import Processes
from training.init_depth import fit_field_to_depth
from training.motion_layers import crossing_motion, layer_votes, layers_of_motion


@dataclass
class MotionLayers:
    """Number of motion layers, and the motion of the fast occluder in the nearest one, if there is one."""
    count: int
    crossing: np.ndarray | None = None  # (T - 1, 3, 3), as motion_layers.crossing_motion


def decide_motion_layers(options: Namespace, store, processes: Processes) -> MotionLayers:
    """The motion layers of a new model. Their number is `--grid_layers`; if that is 0, it is 3 with `--init_layers` and
    an object that crosses the frame, else 2. UserError if 3 are asked for and nothing crosses the frame."""
    if not options.init_layers or options.grid_layers == 2:
        return MotionLayers(options.grid_layers or 2)
    crossing = crossing_motion(store)
    count = 2 if crossing is None else 3
    processes.agree(count, "the number of motion layers that they find")
    if options.grid_layers > count:
        raise UserError(f"nothing crosses the frame in {store.root}: leave out --grid_layers 3")
    return MotionLayers(count, crossing)


def initialize(model: OmniMotion, options: Namespace, store, layers: MotionLayers, depth_priors: Tensor | None,
               processes: Processes) -> None:
    """Apply `--init_layers` and `--init_depth` to a new model, in place.

    depth_priors: `(T, H, W)` in [0, 2], needed for `--init_depth`."""
    if options.init_layers:
        _start_from_motion(model, options, store, layers)
    if options.init_depth:
        middle = model.config.num_frames // 2
        depth_range = options.max_depth - options.min_depth
        prior = options.min_depth + depth_priors[middle].float() / 2 * depth_range
        fit_field_to_depth(model, prior, middle, torch.Generator().manual_seed(options.seed + 2))
    if options.init_layers or options.init_depth:
        _broadcast_parameters(model, processes)


def _start_from_motion(model: OmniMotion, options: Namespace, store, layers: MotionLayers) -> None:
    """Set the deformation grids to the layers' motion, and make each layer of a grid field empty where the
    correspondences contradict its motion."""
    device = next(model.parameters()).device
    vertices = model.deform.vertices()  # (R, R, 2)
    pixels = denormalize_pixels(vertices, model.size)
    moved = torch.from_numpy(layers_of_motion(store, pixels.numpy(), layers.crossing))  # (T, S, R, R, 2)
    model.deform.start_at((normalize_pixels(pixels + moved, model.size) - vertices).to(device))
    if options.field == "grid":
        model.field.start_at(torch.from_numpy(layer_votes(model, store)))


@torch.no_grad()
def _broadcast_parameters(model: OmniMotion, processes: Processes) -> None:
    """Copy the parameters of the first process to all others, because machines may round differently."""
    if not processes.first:
        for parameter in model.parameters():
            parameter.zero_()
    processes.sum_all(list(model.parameters()))
