"""From options or a checkpoint to a model."""

from argparse import Namespace
from dataclasses import asdict, fields

import torch
from torch import Tensor

from models.omnimotion import ModelConfig, OmniMotion
from models.published import is_published, published_config, published_state


def config_from_options(options: Namespace, num_frames: int, size: tuple[int, int]) -> ModelConfig:
    """The model's shape from the option table, for a video of `num_frames` frames of `size` = (H, W)."""
    named = {f.name: getattr(options, f.name) for f in fields(ModelConfig) if hasattr(options, f.name)}
    return ModelConfig(**named, num_frames=num_frames, height=size[0], width=size[1])


def model_from_state(config: dict, state: dict[str, Tensor]) -> OmniMotion:
    """The model of a checkpoint of ours: `config` is `asdict(ModelConfig)`, `state` its parameters."""
    model = OmniMotion(ModelConfig(**{**config, "coordinates": tuple(config["coordinates"])}))
    if "time_latent.frozen" in state:
        model.time_latent.freeze()  # makes room for the stored latents
    model.load_state_dict(state)
    return model


def model_from_checkpoint(checkpoint: dict, size: tuple[int, int], options: Namespace) -> OmniMotion:
    """The model of a loaded checkpoint, ours or OmniMotion's; frame size and rays of the latter come from `options`."""
    if not is_published(checkpoint):
        return model_from_state(checkpoint["config"], checkpoint["model"])
    config = published_config(checkpoint, size, options.num_samples_ray, options.min_depth, options.max_depth)
    return model_from_state(asdict(config), published_state(checkpoint))


def checkpoint_num_frames(checkpoint: dict) -> int:
    """Length of the sequence that a loaded checkpoint was trained on."""
    return checkpoint["num_imgs"] if is_published(checkpoint) else checkpoint["config"]["num_frames"]


def parameter_groups(model: OmniMotion, lr_feature: float, lr_deform: float, lr_color: float) -> list[dict]:
    """Adam's groups, OmniMotion's learning-rate names; the time latent is left out once it is frozen."""
    groups = [{"params": list(model.time_latent.parameters()), "lr": lr_feature, "name": "feature"},
              {"params": list(model.deform.parameters()), "lr": lr_deform, "name": "deform"},
              {"params": list(model.field.parameters()), "lr": lr_color, "name": "color"}]
    return groups if model.time_latent.frozen is None else groups[1:]


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)
