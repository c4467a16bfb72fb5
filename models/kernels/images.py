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
    x, y = places.unbind(-1)  # (M,) each
    y = y.clamp(-1, 1)
    out = 0
    for level in levels:  # the layers' images below each other, so that one 2D look-up serves all
        S, _, R, _ = level.shape
        rows = (y + 1) / 2 * (R - 1) + layer * R
        stacked_places = torch.stack([x, rows * (2 / (S * R - 1)) - 1], dim=-1)  # (M, 2)
        stacked = level.transpose(0, 1).reshape(1, 4, S * R, R)
        out = out + F.grid_sample(stacked, stacked_places[None, None], padding_mode="border", align_corners=True)
    return out[0, :, 0].T


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
