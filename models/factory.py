"""From options or a checkpoint to a model."""

from argparse import Namespace
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from models.kernels.backend import choose_products, pick_backend, set_products
from models.layer_images import SIDES
from models.omnimotion import ModelConfig, OmniMotion
from models.omnimotion_checkpoint import omnimotion_config, omnimotion_state

OTHER_OPTIONS = {"coordinates"}  # options of eval.py that have the name of a field of ModelConfig, and another meaning
LARGEST_SETTING = 100_000  # largest number that a checkpoint's configuration may contain


def config_from_options(options: Namespace, num_frames: int, size: tuple[int, int], grid_layers: int) -> ModelConfig:
    """The model's shape for a video of `num_frames` frames of `size` = (H, W).

    `grid_layers` is the number of motion layers where the options leave it open (`--grid_layers 0`)."""
    settings = {f.name: getattr(options, f.name) for f in fields(ModelConfig)
                if hasattr(options, f.name) and f.name not in OTHER_OPTIONS}
    settings["grid_layers"] = options.grid_layers or grid_layers
    if options.deform == "warp":
        settings["num_samples_ray"] = settings["grid_layers"]  # a layer has no depth: one sample each
    return ModelConfig(**settings, num_frames=num_frames, height=size[0], width=size[1])


def check_model_options(options: Namespace) -> None:
    """UserError for options of the model that contradict each other."""
    if options.field == "images" and options.deform != "warp":
        raise UserError("--field images needs --deform warp: say --deform warp, or --field grid")
    if options.deform == "mlp":
        if options.init_layers:
            raise UserError("--init_layers needs motion layers: say --deform warp, or leave --init_layers out")
        return
    allowed = {"optimizer": ("adam",), "use_affine": (True,), "mlp_backend": ("auto", "torch")}
    wrong = [f"--no-{name}" if getattr(options, name) is False else f"--{name} {getattr(options, name)}"
             for name, values in allowed.items() if getattr(options, name) not in values]
    if wrong:
        raise UserError(f"--deform {options.deform} has no MLPs for {', '.join(wrong)}: leave it out, or say --deform "
                        "mlp")


def new_model(options: Namespace, num_frames: int, size: tuple[int, int], device: torch.device,
              grid_layers: int = 2) -> OmniMotion:
    """A model with random weights for a video of `num_frames` frames of `size` = (H, W); `--precision` and
    `--mlp_backend` choose its kernels, `grid_layers` is as in `config_from_options`. UserError for what the device
    cannot do."""
    check_model_options(options)
    config = config_from_options(options, num_frames, size, grid_layers)
    backend = pick_backend(options.mlp_backend, device, config.coupling_width)
    return _on_device(OmniMotion(config, backend), options, device)


def model_from_checkpoint(checkpoint, size: tuple[int, int], options: Namespace, device: torch.device) -> OmniMotion:
    """The model of a loaders.checkpoint.Checkpoint; kernels as in `new_model`.

    OmniMotion's format does not hold frame size, samples a ray and depth range: they come from `size` and the
    options."""
    config, state = _config_and_state(
        checkpoint, size, options.num_samples_ray, options.min_depth, options.max_depth)
    backend = pick_backend(options.mlp_backend, device, config.coupling_width)
    return _on_device(model_from_state(asdict(config), state, backend), options, device)


def _config_and_state(checkpoint, *omnimotion_settings) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and state dict of a checkpoint. `omnimotion_settings`: arguments of `omnimotion_config` after the
    first, for what OmniMotion's format does not hold."""
    if checkpoint.omnimotion:
        return omnimotion_config(checkpoint.model, *omnimotion_settings), omnimotion_state(checkpoint.model)
    return ModelConfig(**checkpoint.config), checkpoint.model


def model_from_state(config: dict, state: dict[str, Tensor], mlp_backend: str = "torch") -> OmniMotion:
    """A model from `asdict(ModelConfig)` and its state dict."""
    model = OmniMotion(ModelConfig(**{**config, "coordinates": tuple(config["coordinates"])}), mlp_backend)
    if "time_latent.frozen" in state:
        model.time_latent.freeze()  # creates the buffer of the stored latents
    model.load_state_dict(state)
    return model


def _on_device(model: OmniMotion, options: Namespace, device: torch.device) -> OmniMotion:
    if model.config.deform == "mlp" or model.config.field == "gabor":  # networks with matrix products
        set_products(model, choose_products(options.precision, options.mlp_backend, device))
    return model.to(device)


def checkpoint_num_frames(checkpoint, path: Path) -> int:
    """Number of frames that a loaders.checkpoint.Checkpoint was trained on.

    UserError if its parameters are not those of the model that it describes: in a file from elsewhere, any parameter
    can be missing or have another shape."""
    try:
        if checkpoint.config.get("field") == "grid" and "grid_layers" not in checkpoint.config:
            raise UserError(
                f"{path} is of an early version whose grids were another model: train again with --no_reload")
        config, state = _config_and_state(checkpoint, (2, 2))  # any frame size: no parameter depends on it
        _check_parameters(config, state)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged, its parameters fit no model: give another --ckpt_path") from error
    return config.num_frames


def _check_parameters(config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Raises an exception unless `state` holds the parameters of a model with this configuration. A model that is much
    larger than the file is not built."""
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name == "coordinates":
            sane = len(value) <= LARGEST_SETTING and all(v in (0, 1, 2) for v in value)
        elif f.type is int:
            smallest = 1 if f.name in ("num_frames", "height", "width") else 0
            sane = type(value) is int and smallest <= value <= LARGEST_SETTING
        else:
            sane = isinstance(value, str) or (isinstance(value, int | float) and 0 <= value <= LARGEST_SETTING)
        if not sane:
            raise ValueError(f"{f.name} is {value}")
    # approximate number of parameters
    if config.deform != "mlp":
        claimed = config.num_frames * 2 * config.grid_layers * 4 ** (config.grid_levels + 1)
    else:
        claimed = (
            len(config.coordinates) * (config.coupling_layers + config.projection_layers) * config.coupling_width**2
            + config.affine_layers * config.affine_width**2 + config.num_frames * config.latent_dim)
    if config.field == "images":
        claimed += 4 * config.grid_layers * sum(R * R for R in SIDES)
    if config.field == "gabor":
        claimed += config.field_layers * config.field_width**2
    held = sum(value.untyped_storage().nbytes() // 4 for value in state.values())  # float32 numbers in the file
    if claimed > 16 * held + (1 << 24):  # a wide margin, because `claimed` is approximate
        raise ValueError("the model is larger than the file")
    with torch.random.fork_rng(devices=[]):  # a new model draws parameters
        model_from_state(asdict(config), state)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. UserError if CUDA is asked for and there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: PyTorch finds no CUDA device here; say --device cpu, or install a CUDA build")
    return torch.device("cuda" if name != "cpu" and available else "cpu")
