"""Looking up images and features between pixels.

Notation
    H, W, n  height, width, points
    p, q     points (x, y) in pixels of frames a and b   (..., 2)
    h, w, c  grid and channels of a frame's features; corner features lie on corner pixels
Everything outside a frame is 0, as in OmniMotion.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = 1 << 19  # of features that are in memory at a time: 2 MiB, which stay in a core's cache


def pixel_grid(size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Coordinates of all pixels `(H, W, 2)` of a frame of `size` (H, W)."""
    y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in size), indexing="ij")
    return torch.stack([x, y], dim=-1).float()


def bilinear(image: Tensor, p: Tensor) -> Tensor:
    """An image `(H, W, C)` at points `(..., 2)`, as `(..., C)` float."""
    H, W, C = image.shape
    grid = p.reshape(1, -1, 1, 2) * (2 / p.new_tensor([max(W - 1, 1), max(H - 1, 1)])) - 1
    out = F.grid_sample(image.permute(2, 0, 1)[None].float(), grid, align_corners=True)  # (1, C, n, 1)
    return out[0, :, :, 0].T.reshape(*p.shape[:-1], C)


def similarity(features_a: Tensor, features_b: Tensor, p: Tensor, q: Tensor, size: tuple[int, int]) -> Tensor:
    """Cosine similarity `(n,)` of features `(h, w, c)` of a at points p `(n, 2)` and of b at points q `(n, 2)`."""
    chunk = max(NUMBERS // features_a.shape[-1], 1)
    out = []
    for pp, qq in zip(p.split(chunk), q.split(chunk), strict=True):
        a, b = _look_up(features_a, pp, size), _look_up(features_b, qq, size)  # (chunk, c) each
        # F.cosine_similarity takes 2.5 times as long
        out.append((a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1)).sqrt().clamp_min(1e-8))
    return torch.cat(out)


def _look_up(features: Tensor, p: Tensor, size: tuple[int, int]) -> Tensor:
    """Features `(n, c)` at points `(n, 2)`, bilinear: weighted sums of table rows, faster than grid_sample."""
    h, w, c = features.shape
    p = p * p.new_tensor([(w - 1) / max(size[1] - 1, 1), (h - 1) / max(size[0] - 1, 1)])
    corner = p.floor()
    f = p - corner
    dx, dy = (torch.tensor(n, device=p.device) for n in ([0, 1, 0, 1], [0, 0, 1, 1]))
    x, y = corner[:, :1].long() + dx, corner[:, 1:].long() + dy  # (n, 4)
    weight = torch.where(dx == 1, f[:, :1], 1 - f[:, :1]) * torch.where(dy == 1, f[:, 1:], 1 - f[:, 1:])
    weight = torch.where((x >= 0) & (x < w) & (y >= 0) & (y < h), weight, 0)
    rows = y.clamp(0, h - 1) * w + x.clamp(0, w - 1)
    return F.embedding_bag(rows, features.reshape(-1, c), per_sample_weights=weight, mode="sum")
