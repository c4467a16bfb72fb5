"""Monocular depth with transformers: Depth Anything V2 (Yang et al., 2024) and MiDaS's DPT (Ranftl et al., 2021).

Both predict disparity, up to an unknown scale and shift: larger values are nearer.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from third_party.hub import load_model


@dataclass(frozen=True)
class DepthModel:
    """A model of the Hugging Face hub and its input format."""
    name: str
    side: int            # pixels of the input's shorter side, or of both sides without `keep_aspect`
    multiple: int        # both sides of the input are multiples of this
    keep_aspect: bool
    mean: tuple[float, float, float]  # of RGB in [0, 1], subtracted from the input
    std: tuple[float, float, float]   # of RGB in [0, 1], divides the input


MODELS = {
    "depth_anything": DepthModel("depth-anything/Depth-Anything-V2-Small-hf", 518, 14, True,
                                 (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "midas": DepthModel("Intel/dpt-large", 384, 16, False, (0.5,) * 3, (0.5,) * 3),
}


class DisparityEstimator:
    """`image -> disparity`: `(H, W, 3)` uint8 RGB to `(H, W)` float32; larger is nearer, scale and shift are unknown.

    kind: "depth_anything" or "midas"; name: another model with the same input format, a name on the Hugging Face hub or
    a folder. UserError if the model cannot be loaded."""

    def __init__(self, kind: str, name: str = "", weights_dir: Path | None = None, offline: bool = False,
                 device: str = "cpu"):
        self.kind = MODELS[kind]
        self.device = device
        self.name = name or self.kind.name
        self.model = load_model("AutoModelForDepthEstimation", self.name, weights_dir, offline).to(device)

    def input_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size (h, w) of the network's input for a frame of `size` (H, W)."""
        kind = self.kind
        zoom = [kind.side / min(size)] * 2 if kind.keep_aspect else [kind.side / n for n in size]
        return tuple(max(round(n * z / kind.multiple), 1) * kind.multiple for n, z in zip(size, zoom, strict=True))

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        size = image.shape[:2]
        x = torch.from_numpy(image).to(self.device).permute(2, 0, 1)[None].float() / 255
        x = F.interpolate(x, size=self.input_size(size), mode="bicubic", align_corners=False, antialias=True)
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (self.kind.mean, self.kind.std))
        disparity = self.model(pixel_values=(x - mean) / std).predicted_depth  # (1, h, w)
        return F.interpolate(disparity[None], size=size, mode="bicubic", align_corners=False)[0, 0].cpu().numpy()
