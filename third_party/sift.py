"""Dense RootSIFT features (Lowe 2004; Arandjelovic and Zisserman 2012) with kornia: the default appearance check.

How the settings were chosen, on the bear clip at 256x256:
- OmniMotion's threshold of 0.5 is for DINO. RootSIFT is non-negative: the median similarity of random places is 0.75.
- Similarities of cycle-consistent DIS flows at the annotated joints (BADJA), frame interval >= 3:
  within 4 px of the annotation: 0.86, 0.88, 0.92, 0.94 (percentiles 5, 10, 25, 50);
  more than 8 px away:           0.83, 0.86, 0.90 (percentiles 25, 50, 75).
- 3x3 bins of 5 pixels separate the two best among the grids tried (area under the ROC curve 0.880; 4x4 bins of 4
  pixels: 0.867).
"""

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

SIDE = 256    # larger images are resized to this shorter side, in pixels
STRIDE = 4    # pixels of the resized image between features
BINS = 3      # spatial bins per side of a descriptor
BIN_SIZE = 5  # pixels of the resized image per bin


class DenseSift:
    """`image -> features`: `(H, W, 3)` uint8 RGB to L2-normalized features `(h, w, 72)` float16.

    Corner features lie on corner pixels. Safe to call from several threads."""

    threshold = 0.88       # smallest cosine similarity of two features of the same point
    chain_threshold = 0.7  # the same for the ends of trusted chains; see docs/preprocessing.md, Chains
    settings: ClassVar[dict] = {}

    def __call__(self, image: np.ndarray) -> np.ndarray:
        H, W = image.shape[:2]
        zoom = min(1.0, SIDE / min(H, W))
        h, w = (max(round((n - 1) * zoom / STRIDE), 1) + 1 for n in (H, W))
        gray = torch.from_numpy(image).float().mean(dim=-1)[None, None] / 255  # (1, 1, H, W)
        size = ((h - 1) * STRIDE + 1, (w - 1) * STRIDE + 1)
        gray = F.interpolate(gray, size=size, mode="bilinear", align_corners=True, antialias=False)
        margin = (BINS - 1) * BIN_SIZE // 2  # kornia's first descriptor is centered this far from the corner
        gray = F.pad(gray, (margin,) * 4, mode="replicate")
        with torch.inference_mode():
            features = _descriptor()(gray)[0]  # (72, h, w)
        return features.permute(1, 2, 0).half().numpy()


def _descriptor() -> torch.nn.Module:
    from kornia.feature.siftdesc import DenseSIFTDescriptor  # imported here: it takes a second

    return DenseSIFTDescriptor(num_spatial_bins=BINS, spatial_bin_size=BIN_SIZE, stride=STRIDE, padding=0)
