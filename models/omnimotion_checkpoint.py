"""Read checkpoints of OmniMotion's code: dictionaries with `feature_mlp`, `deform_mlp`, `color_mlp`, `num_imgs`.

Notation
    layer k  coupling layer; in the file, `layers1.k.mask` is 0 at the coordinate that the layer changes
"""

import re

from torch import Tensor

from models.omnimotion import ModelConfig

RENAMED = (
    (r"deform_mlp\.layers1\.(\d+)\.map_st\.0\.mlp\.", r"deform.layers.\1.mlp."),
    (r"deform_mlp\.layers1\.(\d+)\.projection\.proj\.", r"deform.layers.\1.projection."),
    (r"deform_mlp\.code_projectors\.(\d+)\.mlp\.", r"deform.layers.\1.latent."),
    (r"feature_mlp\.", r"time_latent.network."),
    (r"color_mlp\.", r"field.net."),
)


def omnimotion_config(checkpoint: dict, size: tuple[int, int], num_samples_ray: int = 32, min_depth: float = 0.0,
                      max_depth: float = 2.0) -> ModelConfig:
    """Model configuration that matches a checkpoint of OmniMotion's code.

    The file does not contain the frame `size` (H, W) in pixels, the number of samples per ray and the depth range
    (no unit); the caller passes them. Everything else is derived from the parameters' names and shapes."""
    deform = checkpoint["deform_mlp"]
    count = sum(name.endswith(".mask") for name in deform)
    coordinates = tuple(int(deform[f"layers1.{k}.mask"].flatten().argmin()) for k in range(count))
    mlp = [value for name, value in deform.items() if re.fullmatch(r"layers1\.0\.map_st\.0\.mlp\.\d+\.weight", name)]
    affine = [name for name in deform if name.startswith("affine_mlp") and name.endswith("weight")]
    color = checkpoint["color_mlp"]
    return ModelConfig(
        num_frames=checkpoint["num_imgs"], height=size[0], width=size[1], num_samples_ray=num_samples_ray,
        min_depth=min_depth, max_depth=max_depth, time_latent="gabor",
        latent_dim=checkpoint["feature_mlp"]["output_linear.weight"].shape[0], coordinates=coordinates,
        coupling_width=mlp[0].shape[0], coupling_layers=len(mlp) - 1, projection_layers=1,
        pe_freq=(deform["layers1.0.projection.proj.0.weight"].shape[1] - 2) // 4,
        use_affine=bool(affine), affine_layers=len(affine) or 8,
        field_width=color["output_linear.weight"].shape[1],
        field_layers=sum(bool(re.fullmatch(r"linear\.\d+\.weight", name)) for name in color), field_encoding="none")


def omnimotion_state(checkpoint: dict) -> dict[str, Tensor]:
    """State dict for `OmniMotion` from a checkpoint of OmniMotion's code: same tensors, renamed."""
    state = {}
    for part in ("feature_mlp", "deform_mlp", "color_mlp"):
        for name, value in checkpoint[part].items():
            if name.endswith(".mask"):
                continue  # determines ModelConfig.coordinates; not a parameter here
            name = f"{part}.{name}"
            for pattern, replacement in RENAMED:
                name = re.sub(f"^{pattern}", replacement, name)
            affine = re.fullmatch(r"deform_mlp\.affine_mlp\.hidden\.(\d+)\.(?:0\.)?(weight|bias)", name)
            if affine:
                name = f"deform.affine.mlp.{2 * int(affine[1])}.{affine[2]}"
            state[name] = value
    return state
