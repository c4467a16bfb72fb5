"""Monocular depth: Depth Anything V2 (Yang et al., 2024) and MiDaS's DPT (Ranftl et al., 2021), through transformers.

Both give disparity: larger is nearer, up to a scale and a shift.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from third_party.hub import load_model


@dataclass(frozen=True)
class DepthModel:
    """A published model and the images that it wants."""
    name: str
    side: int            # of the input, in pixels: the shorter one, or both
    multiple: int        # that the sides are multiples of
    keep_aspect: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


MODELS = {
    "depth_anything": DepthModel("depth-anything/Depth-Anything-V2-Small-hf", 518, 14, True,
                                 (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "midas": DepthModel("Intel/dpt-large", 384, 16, False, (0.5,) * 3, (0.5,) * 3),
}


class DisparityEstimator:
    """`image -> disparity`: `(H, W, 3)` uint8 to `(H, W)` float32, larger is nearer, up to scale and shift.

    kind: "depth_anything" or "midas"; name: another model of the kind, of the hub or in a folder."""

    def __init__(self, kind: str, name: str = "", weights_dir: Path | None = None, offline: bool = False,
                 device: str = "cpu"):
        self.kind, self.device = MODELS[kind], device
        self.name = name or self.kind.name
        self.model = load_model("AutoModelForDepthEstimation", self.name, weights_dir, offline).to(device)

    def input_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Sides of the network's input for a frame of `size` (H, W)."""
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
