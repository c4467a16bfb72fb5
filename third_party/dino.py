"""DINO (Caron et al., ICCV 2021) and DINOv2 (Oquab et al., 2023; with registers: Darcet et al., 2024) patch features.

Notation
    P        side of a patch: 16 for DINO, 14 for DINOv2
    h, w     grid of patches
The image is resized to ((h - 1) P + 1, (w - 1) P + 1) and padded by about half a patch, so that the centers of the
corner patches lie on the corner pixels.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from third_party.hub import load_model

MODELS = {"dino": "facebook/dino-vits16", "dinov2": "facebook/dinov2-small"}
MEAN, STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)  # of OmniMotion's DINO script; others have 0.229


class DinoFeatures:
    """`image -> features`: `(H, W, 3)` uint8 to the last layer's normalized patch tokens `(h, w, c)` float16.

    name: a model of the hub or a folder of one; side: shorter side of the image that is described (OmniMotion: 480).
    threshold: 0.5, OmniMotion's for DINO; for DINOv2 and for chains it has not been measured. Safe to call from several
    threads."""

    threshold = chain_threshold = 0.5

    def __init__(self, name: str, weights_dir: Path | None = None, offline: bool = False, side: int = 480,
                 device: str = "cpu"):
        self.model = load_model("AutoModel", name, weights_dir, offline).to(device)
        self.side, self.device = side, device
        self.patch = self.model.config.patch_size
        self.extra = 1 + getattr(self.model.config, "num_register_tokens", 0)  # class token and registers
        self.interpolate = {"interpolate_pos_encoding": True} if self.model.config.model_type == "vit" else {}
        self.settings = {"model": Path(name).name, "side": side}

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Patches (h, w) for frames of `size` (H, W)."""
        zoom = self.side / min(size)
        return tuple(max(round((n * zoom - 1) / self.patch), 1) + 1 for n in size)

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """The network's input `(1, 3, h P, w P)`."""
        h, w = self.grid(image.shape[:2])
        x = torch.from_numpy(image).to(self.device).permute(2, 0, 1)[None].float() / 255
        x = F.interpolate(x, size=((h - 1) * self.patch + 1, (w - 1) * self.patch + 1), mode="bilinear",
                          align_corners=True)  # corner pixels stay corner pixels
        before, after = (self.patch - 1) // 2, self.patch // 2
        x = F.pad(x, (before, after, before, after), mode="replicate")
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (MEAN, STD))
        return (x - mean) / std

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        tokens = self.model(pixel_values=self.prepare(image), **self.interpolate).last_hidden_state[0]  # (n, c)
        return tokens[self.extra:].reshape(*self.grid(image.shape[:2]), -1).half().cpu().numpy()
