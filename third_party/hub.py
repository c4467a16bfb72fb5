"""Models of the Hugging Face hub, loaded with transformers from its cache or from a local folder.

transformers has DINO, DINOv2 with and without registers, Depth Anything and MiDaS under their authors' names. It does
not need torchvision (timm does), because images are prepared in this package instead of by transformers' processors.
"""

from pathlib import Path

import torch

from common.errors import UserError


def load_model(auto_class: str, name: str, weights_dir: Path | None = None,
               offline: bool = False) -> torch.nn.Module:
    """Load a pretrained model in evaluation mode, without gradients.

    auto_class: name of a class of transformers, for example "AutoModel"
    name:       a folder, a folder in `weights_dir`, or a model on the hub, which is cached in `weights_dir`
                (default: the hub's own cache)
    offline:    do not download
    UserError if transformers is not installed or the model cannot be loaded. Code from the hub is never run."""
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
        no_pooling = {"add_pooling_layer": False} if config.model_type == "vit" else {}  # DINO's weights have none
        model, report = getattr(transformers, auto_class).from_pretrained(
            folder or name, config=config, cache_dir=weights_dir, local_files_only=offline, output_loading_info=True,
            trust_remote_code=False, weights_only=True, **no_pooling)
    except Exception as error:  # transformers, safetensors and the network raise many types
        where = "--offline, and " if offline else ""
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{where}the model {folder or name} cannot be loaded ({reason}): put config.json and "
                        f"model.safetensors of https://huggingface.co/{name} into --weights_dir/{Path(name).name}") \
            from error
    if report["missing_keys"]:
        raise UserError(f"{folder or name} lacks {len(report['missing_keys'])} of the model's weights, for example "
                        f"{sorted(report['missing_keys'])[0]}: download it again")
    return model.eval().requires_grad_(False)
