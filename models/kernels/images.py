"""Look-up in the layers' images of all resolutions (models.layer_images).

In C++ on a CPU with g++ (native/images.cpp); otherwise in PyTorch.

Notation
    M, S      points, layers
    level     images of one resolution: (S, 4, R, R)
    places    positions in the images, -1 and 1 at the first and the last vertex; outside, the nearest border point's
              value is used  (M, 2)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import native


def layer_images(places: Tensor, layer: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """Sum over the levels at `places` in the images of layers `(M,)` int64, `(M, 4)`."""
    if places.device.type == "cpu" and places.dtype == torch.float32 and native.warp_kernels() is not None:
        return _LayerImages.apply(places.contiguous(), layer.contiguous(), *levels)
    return layer_images_plain(places, layer, levels)


def layer_images_plain(places: Tensor, layer: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """`layer_images` in PyTorch."""
    S = len(levels[0])
    depth = layer * (2 / max(S - 1, 1)) - 1  # the layers' images behind each other, so that one 3D look-up serves all
    volume_places = torch.cat([places, depth[:, None].to(places)], dim=-1)  # (M, 3)
    out = 0
    for level in levels:
        volume = level.transpose(0, 1)[None]  # (1, 4, S, R, R)
        out = out + F.grid_sample(volume, volume_places[None, None, None], padding_mode="border", align_corners=True)
    return out[0, :, 0, 0].T


class _LayerImages(torch.autograd.Function):
    """The C++ kernels."""

    @staticmethod
    def forward(ctx, places: Tensor, layer: Tensor, *levels: Tensor) -> Tensor:
        ctx.save_for_backward(places, layer, *levels)
        return native.warp_kernels().layer_images(places, layer, levels)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        places, layer, *levels = ctx.saved_tensors
        of_places, of_levels = native.warp_kernels().layer_images_backward(places, layer, levels, gradient.contiguous())
        return of_places, None, *of_levels
