"""DINO (Caron et al., ICCV 2021) and DINOv2 (Oquab et al., 2023; with registers: Darcet et al., 2024) patch features.

Notation
    P        side of a patch: 16 for DINO, 14 for DINOv2
    h, w     grid of patches
The image is resized to ((h - 1) P + 1, (w - 1) P + 1) and padded by about half a patch on each side. The centers of
the corner patches then lie on the corner pixels.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from third_party.hub import load_model

MODELS = {"dino": "facebook/dino-vits16", "dinov2": "facebook/dinov2-small"}
MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
STD = (0.228, 0.224, 0.225)   # of RGB in [0, 1]; as in OmniMotion's DINO script (ImageNet's first value is 0.229)


class DinoFeatures:
    """`image -> features`: `(H, W, 3)` uint8 RGB to the last layer's normalized patch tokens `(h, w, c)` float16.

    name: a model on the Hugging Face hub, or a folder; side: the image is resized to this shorter side, in pixels
    (OmniMotion: 480). Safe to call from several threads. UserError if the model cannot be loaded."""

    threshold = 0.5        # OmniMotion's value for DINO; not tuned for DINOv2
    chain_threshold = 0.5  # not tuned

    def __init__(self, name: str, weights_dir: Path | None = None, offline: bool = False, side: int = 480,
                 device: str = "cpu"):
        self.model = load_model("AutoModel", name, weights_dir, offline).to(device)
        self.side = side
        self.device = device
        self.patch = self.model.config.patch_size
        self.extra_tokens = 1 + getattr(self.model.config, "num_register_tokens", 0)  # class token and registers
        self.interpolate = {"interpolate_pos_encoding": True} if self.model.config.model_type == "vit" else {}
        self.settings = {"model": Path(name).name, "side": side}

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Number of patches (h, w) for frames of `size` (H, W)."""
        zoom = self.side / min(size)
        return tuple(max(round((n * zoom - 1) / self.patch), 1) + 1 for n in size)

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """Resize, pad and normalize an image: the network's input `(1, 3, h P, w P)`."""
        h, w = self.grid(image.shape[:2])
        x = torch.from_numpy(image).to(self.device).permute(2, 0, 1)[None].float() / 255
        x = F.interpolate(x, size=((h - 1) * self.patch + 1, (w - 1) * self.patch + 1), mode="bilinear",
                          align_corners=True)  # keeps corner pixels at the corners
        before = (self.patch - 1) // 2
        after = self.patch // 2
        x = F.pad(x, (before, after, before, after), mode="replicate")
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (MEAN, STD))
        return (x - mean) / std

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        tokens = self.model(pixel_values=self.prepare(image), **self.interpolate).last_hidden_state[0]  # (n, c)
        return tokens[self.extra_tokens:].reshape(*self.grid(image.shape[:2]), -1).half().cpu().numpy()
