"""Data-driven initialization of a new model: motion layers (`--init_layers`), depth prior (`--init_depth`).

What the video decides about the model's shape is known before the model is built (`decide_motion_layers`).
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
from training.init_depth import start_near
from training.motion_layers import crossing_motion, layer_votes, layers_of_motion


@dataclass
class MotionLayers:
    """How many motion layers a model has, and the motion of a fast occluder in front of the others, if there is one."""
    count: int
    crossing: np.ndarray | None = None  # (T - 1, 3, 3), as motion_layers.crossing_motion


def decide_motion_layers(options: Namespace, store, processes: Processes) -> MotionLayers:
    """The motion layers of a new model: as many as `--grid_layers` says; with 0, the correspondences decide between two
    and three where `--init_layers` is on. UserError if three are asked for and nothing crosses the frame."""
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
    """Change a new model in place as the options of initialization say; nothing without them.

    depth_priors `(T, H, W)` in [0, 2] are needed for `--init_depth`."""
    if options.init_layers:
        _start_from_motion(model, options, store, layers)
    if options.init_depth:
        middle = model.config.num_frames // 2
        depth_range = options.max_depth - options.min_depth
        prior = options.min_depth + depth_priors[middle].float() / 2 * depth_range
        start_near(model, prior, middle, torch.Generator().manual_seed(options.seed + 2))
    if options.init_layers or options.init_depth:
        _copy_from_first(model, processes)


def _start_from_motion(model: OmniMotion, options: Namespace, store, layers: MotionLayers) -> None:
    """Deformation grids that start as the layers' motion, and a field in which each layer is empty where the
    correspondences contradict its motion."""
    device = next(model.parameters()).device
    vertices = model.deform.vertices()  # (R, R, 2)
    pixels = denormalize_pixels(vertices, model.size)
    moved = torch.from_numpy(layers_of_motion(store, pixels.numpy(), layers.crossing))  # (T, S, R, R, 2)
    model.deform.start_at((normalize_pixels(pixels + moved, model.size) - vertices).to(device))
    if options.field == "grid":
        model.field.start_at(torch.from_numpy(layer_votes(model, store)))


@torch.no_grad()
def _copy_from_first(model: OmniMotion, processes: Processes) -> None:
    """Give all processes the parameters of the first one, because machines may round differently."""
    if not processes.first:
        for parameter in model.parameters():
            parameter.zero_()
    processes.sum_all(list(model.parameters()))
