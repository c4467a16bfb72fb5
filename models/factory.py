"""From options or a checkpoint to a model."""

from argparse import Namespace
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from models.kernels.backend import choose_products, set_products
from models.kernels.dispatch import pick_backend
from models.omnimotion import ModelConfig, OmniMotion
from models.omnimotion_checkpoint import is_published, published_config, published_state
from training.muon import Muon

LARGEST = 100_000  # of a whole number in a checkpoint's configuration


def config_from_options(options: Namespace, num_frames: int, size: tuple[int, int]) -> ModelConfig:
    """The model's shape from the option table, for a video of `num_frames` frames of `size` = (H, W)."""
    named = {f.name: getattr(options, f.name) for f in fields(ModelConfig) if hasattr(options, f.name)}
    return ModelConfig(**named, num_frames=num_frames, height=size[0], width=size[1])


def model_from_state(config: dict, state: dict[str, Tensor], mlp_backend: str = "torch") -> OmniMotion:
    """The model of a checkpoint of ours: `config` is `asdict(ModelConfig)`, `state` its parameters."""
    model = OmniMotion(ModelConfig(**{**config, "coordinates": tuple(config["coordinates"])}), mlp_backend)
    if "time_latent.frozen" in state:
        model.time_latent.freeze()  # makes room for the stored latents
    model.load_state_dict(state)
    return model


def new_model(options: Namespace, num_frames: int, size: tuple[int, int], device: torch.device,
              grid_layers: int = 2) -> OmniMotion:
    """A fresh model for a video of `num_frames` frames of `size` = (H, W), computing as `--precision` and
    `--mlp_backend` say; `grid_layers` is what the video tells where `--grid_layers 0` asks it. UserError for what the
    device cannot do."""
    config = replace(config_from_options(options, num_frames, size), grid_layers=options.grid_layers or grid_layers)
    if config.deform == "grid":
        _check_grid_options(options)
    elif options.init_layers:
        raise UserError("--init_layers 1 has no grids to start: say --deform grid, or leave it out")
    backend = pick_backend(options.mlp_backend, device, config.coupling_width)
    return _placed(OmniMotion(config, backend), options, device)


def _check_grid_options(options: Namespace) -> None:
    """UserError for options that have no meaning where grids take the place of MLPs."""
    wrong = [f"--{name} {getattr(options, name)}" for name, allowed in (
        ("optimizer", ("adam",)), ("use_affine", (1,)), ("mlp_backend", ("auto", "torch")))
        if getattr(options, name) not in allowed]
    if wrong:
        raise UserError(f"--deform grid has no MLPs for {', '.join(wrong)}: leave it out, or say --deform mlp")
    if options.init_layers and options.grid_layers not in (0, 2, 3):
        raise UserError(f"--init_layers 1 starts 2 or 3 layers of motion: leave out --grid_layers "
                        f"{options.grid_layers}")


def model_from_checkpoint(checkpoint: dict, size: tuple[int, int], options: Namespace,
                          device: torch.device) -> OmniMotion:
    """The model of a loaded checkpoint, ours or OmniMotion's, as `new_model`; frame size and rays of the latter come
    from `options`."""
    if is_published(checkpoint):
        config = asdict(published_config(
            checkpoint, size, options.num_samples_ray, options.min_depth, options.max_depth))
        state = published_state(checkpoint)
    else:
        config, state = checkpoint["config"], checkpoint["model"]
    backend = pick_backend(options.mlp_backend, device, config["coupling_width"])
    return _placed(model_from_state(config, state, backend), options, device)


def _placed(model: OmniMotion, options: Namespace, device: torch.device) -> OmniMotion:
    if model.config.deform == "mlp" or model.config.field == "gabor":  # there are products of matrices
        set_products(model, choose_products(options.precision, options.mlp_backend, device))
    return model.to(device)


def checkpoint_num_frames(checkpoint: dict, path: Path) -> int:
    """Length of the sequence that a loaded checkpoint was trained on. UserError if it is no checkpoint of a model, or
    if its parameters are not those of the model that it describes."""
    published = isinstance(checkpoint, dict) and is_published(checkpoint)
    if not published and not (isinstance(checkpoint, dict) and {"config", "model"} <= checkpoint.keys()):
        raise UserError(f"{path} is not a checkpoint of this project or of OmniMotion: give another --ckpt_path")
    try:
        if published:
            config, state = published_config(checkpoint, (2, 2)), published_state(checkpoint)
        else:
            config, state = ModelConfig(**checkpoint["config"]), checkpoint["model"]
        former = not published and config.field == "grid" and "grid_layers" not in checkpoint["config"]
        if not former:
            _check_parameters(config, state)
    except Exception as error:  # anything can be missing, misplaced or misshapen in somebody else's file
        raise UserError(f"{path} is damaged, its parameters fit no model: give another --ckpt_path") from error
    if former:
        raise UserError(f"{path} is of an earlier version, whose grids were another model: train again with "
                        "--no_reload")
    return config.num_frames


def _check_parameters(config: ModelConfig, state: dict[str, Tensor]) -> None:
    """An error unless `state` is the parameters of such a model, and the model is no larger than they are."""
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name == "coordinates":
            sane = len(value) <= LARGEST and all(v in (0, 1, 2) for v in value)
        elif f.type is int:
            sane = type(value) is int and (f.name in ("num_frames", "height", "width")) <= value <= LARGEST
        else:
            sane = isinstance(value, str) or (isinstance(value, int | float) and 0 <= value <= LARGEST)
        if not sane:
            raise ValueError(f"{f.name} is {value}")
    if config.deform == "grid":
        claimed = config.num_frames * 2 * config.grid_layers * 4 ** (config.grid_levels + 1)  # about
    else:
        claimed = (
            len(config.coordinates) * (config.coupling_layers + config.projection_layers) * config.coupling_width**2
            + config.affine_layers * config.affine_width**2 + config.num_frames * config.latent_dim)
    if config.field == "gabor":
        claimed += config.field_layers * config.field_width**2
    if claimed > 16 * sum(value.untyped_storage().nbytes() // 4 for value in state.values()) + (1 << 24):
        raise ValueError("the model is larger than the file")
    with torch.random.fork_rng(devices=[]):  # the new parameters are drawn, and thrown away
        model_from_state(asdict(config), state)


def new_optimizers(model: OmniMotion, options: Namespace) -> dict[str, torch.optim.Optimizer]:
    """"adam" alone, as published, or with "muon" beside it for the hidden matrices of the invertible network.

    Groups have OmniMotion's learning-rate names; the time latent is left out once it is frozen."""
    deform, matrices = list(model.deform.parameters()), []
    if options.optimizer == "muon":
        matrices = [p for p in deform if p.ndim == 2 and min(p.shape) > 5]  # not those of (s, o), affine coefficients
        chosen = set(map(id, matrices))
        deform = [p for p in deform if id(p) not in chosen]
    groups = [{"params": deform, "lr": options.lr_deform, "name": "deform"},
              {"params": list(model.field.parameters()), "lr": options.lr_color, "name": "color"}]
    if model.time_latent.frozen is None:
        groups.append({"params": list(model.time_latent.parameters()), "lr": options.lr_feature, "name": "feature"})
    out = {"adam": torch.optim.Adam(groups, fused=True)}
    if matrices:
        out["muon"] = Muon([{"params": matrices, "name": "deform_matrices"}], lr=options.lr_deform)
    return out


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. UserError if CUDA is asked for and there is none.

    Sets the CPU to flush denormal numbers: vanishing filters and moments are full of them, and each is many times
    slower than another number."""
    torch.set_flush_denormal(True)
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: PyTorch finds no CUDA device here; say --device cpu, or install a CUDA build")
    return torch.device("cuda" if name != "cpu" and available else "cpu")
