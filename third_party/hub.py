"""Models of the Hugging Face hub through transformers, from its cache or a local folder, without torchvision.

transformers and not timm: it has DINO, DINOv2 with and without registers, Depth Anything and MiDaS under their authors'
own names, and needs no torchvision (timm does) as long as images are prepared here and not by its processors.
"""

from pathlib import Path

import torch

from common.errors import UserError


def load_model(auto_class: str, name: str, weights_dir: Path | None = None, offline: bool = False,
               **options) -> torch.nn.Module:
    """A pretrained model in evaluation mode.

    auto_class: transformers' class, as "AutoModel"; name: a folder, a folder within `weights_dir`, or a name of the
    hub, whose files are cached in `weights_dir` (default: the hub's own cache).
    UserError if transformers is not installed, or the model cannot be had or loaded."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("transformers is not installed: pip install -r requirements-models.txt") from error
    folder = next((path for path in (Path(name), Path(weights_dir or ".") / Path(name).name)
                   if (path / "config.json").is_file()), None)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder or name, cache_dir=weights_dir, local_files_only=offline, trust_remote_code=False)
        if config.model_type == "vit":
            options = {**options, "add_pooling_layer": False}  # DINO's file has none
        model, report = getattr(transformers, auto_class).from_pretrained(
            folder or name, config=config, cache_dir=weights_dir, local_files_only=offline, output_loading_info=True,
            trust_remote_code=False, weights_only=True, **options)
    except Exception as error:  # transformers', safetensors' or the network's
        where, reason = "--offline, and " if offline else "", (str(error) or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{where}the model {folder or name} cannot be loaded ({reason}): put config.json and "
                        f"model.safetensors of https://huggingface.co/{name} into --weights_dir/{Path(name).name}") \
            from error
    if report["missing_keys"]:
        raise UserError(f"{folder or name} lacks {len(report['missing_keys'])} of the model's weights, as "
                        f"{sorted(report['missing_keys'])[0]}: fetch it again")
    return model.eval().requires_grad_(False)
