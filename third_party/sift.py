"""Dense RootSIFT features (Lowe 2004; Arandjelovic and Zisserman 2012) through kornia: the default appearance check."""

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

SIDE = 256          # shorter side of the image that is described, so that a patch covers the same share of any video
STRIDE = 4          # pixels of that image between features
BINS, BIN_SIZE = 3, 5


class DenseSift:
    """`image -> features`: `(H, W, 3)` uint8 to L2-normalized `(h, w, 72)` float16, corner features on corner pixels.

    threshold: cosine similarity above which two features may show the same point. OmniMotion's 0.5 is DINO's; RootSIFT
    is non-negative, so that even random places of the bear clip at 256x256 are similar by 0.75 in the median. There, of
    the cycle-consistent DIS flows at annotated joints (interval >= 3), those within 4 px have similarities of 0.86,
    0.88, 0.92, 0.94 (5, 10, 25, 50% of them lie below), those off by over 8 px 0.83, 0.86, 0.90 (25, 50, 75%).
    3x3 bins of 5 pixels tell them apart best of the grids tried (area under the ROC curve 0.880; 4x4 of 4: 0.867)."""

    threshold = 0.88
    chain_threshold = 0.7  # docs/preprocessing.md, Chains
    settings: ClassVar[dict] = {}

    def __call__(self, image: np.ndarray) -> np.ndarray:
        H, W = image.shape[:2]
        zoom = min(1.0, SIDE / min(H, W))
        h, w = (max(round((n - 1) * zoom / STRIDE), 1) + 1 for n in (H, W))
        gray = torch.from_numpy(image).float().mean(dim=-1)[None, None] / 255  # (1, 1, H, W)
        size = ((h - 1) * STRIDE + 1, (w - 1) * STRIDE + 1)
        gray = F.interpolate(gray, size=size, mode="bilinear", align_corners=True, antialias=False)
        margin = (BINS - 1) * BIN_SIZE // 2  # kornia describes the center of an odd grid of odd bins
        gray = F.pad(gray, (margin,) * 4, mode="replicate")
        with torch.inference_mode():
            features = _descriptor()(gray)[0]  # (72, h, w)
        return features.permute(1, 2, 0).half().numpy()


def _descriptor() -> torch.nn.Module:
    from kornia.feature.siftdesc import DenseSIFTDescriptor  # kornia takes a second to import

    return DenseSIFTDescriptor(num_spatial_bins=BINS, spatial_bin_size=BIN_SIZE, stride=STRIDE, padding=0)
