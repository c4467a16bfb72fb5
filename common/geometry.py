"""Pixel grids, test for points inside the frame, and bilinear sampling of images, flow and features.

Notation
    H, W, n  height, width, points
    p, q     points (x, y) in pixels of frames a and b   (..., 2)
    h, w, c  rows, columns and channels of a frame's feature grid; its corners lie on the centers of the corner pixels

Outside the frame, `bilinear` and `similarity` use 0, as in OmniMotion's code; `bilinear_colors`, `sample`, `corners`
and `checkerboard_corners` use the nearest point of the border.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

REMAP_CHANNELS = 128  # cv2.remap crashes with many more
CHUNK_VALUES = 1 << 19  # feature values per chunk; 2 MiB of float32, which fits the cache of a CPU core


def pixel_grid(size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Coordinates of all pixels `(H, W, 2)` of a frame of `size` (H, W)."""
    y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in size), indexing="ij")
    return torch.stack([x, y], dim=-1).float()


def regular_grid(size: tuple[int, int], spacing: int, offset: int) -> np.ndarray:
    """Points (x, y) `(h, w, 2)` float32 of a frame of `size` (H, W), `spacing` pixels apart, from `offset` pixels after
    the first column and row; at least one point a side."""
    y, x = (np.arange(min(offset, side - 1), side, spacing, dtype=np.float32) for side in size)
    return np.stack(np.meshgrid(x, y), axis=-1)


def length(v: Tensor) -> Tensor:
    """Length `(...)` of vectors `(..., 2)`; torch.norm takes ten times as long."""
    return torch.hypot(v[..., 0], v[..., 1])


def bilinear(image: Tensor, p: Tensor) -> Tensor:
    """Bilinear samples `(..., C)` float32 of an image `(H, W, C)` at points `(..., 2)`; 0 outside the frame."""
    H, W, C = image.shape
    grid = p.reshape(1, -1, 1, 2) * (2 / p.new_tensor([max(W - 1, 1), max(H - 1, 1)])) - 1
    out = F.grid_sample(image.permute(2, 0, 1)[None].float(), grid, align_corners=True)  # (1, C, n, 1)
    return out[0, :, :, 0].T.reshape(*p.shape[:-1], C)


def bilinear_colors(frames: Tensor, ids: Tensor, p: Tensor) -> Tensor:
    """Bilinear colors `(B, N, 3)` in [0, 1] of the frames `ids` `(B,)` at points p `(B, N, 2)` in pixels.

    frames: uint8 `(T, H, W, 3)`. Points outside the frame take the color of the nearest point of the border."""
    H, W = frames.shape[1:3]
    x, y = p[..., 0].clamp(0, W - 1), p[..., 1].clamp(0, H - 1)
    x0, y0 = x.floor().long().clamp(max=max(W - 2, 0)), y.floor().long().clamp(max=max(H - 2, 0))
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    flat, corner = frames.view(-1, 3), (ids[:, None] * H + y0) * W + x0
    top = flat[corner] * (1 - fx) + flat[corner + 1] * fx
    bottom = flat[corner + W] * (1 - fx) + flat[corner + W + 1] * fx
    return (top * (1 - fy) + bottom * fy) / 255


def sample(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Bilinear samples `(n, C)` float32 of flow or colors `(H, W, C)` at points `(n, 2)` in pixels.

    The weights have the precision of the points; cv2.remap would round them to 1/32 pixel."""
    pixels, weights = corners(points, image.shape[:2])
    return (weights[..., None] * image.reshape(-1, image.shape[2])[pixels]).sum(axis=1).astype(np.float32)


def corners(points: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices `(n, 4)` of the four pixels around each point `(n, 2)`, and their bilinear weights `(n, 4)`.

    The coordinates of points outside the frame are clamped to the centers of the border pixels."""
    H, W = size
    x = points[:, 0].clip(0, W - 1)
    y = points[:, 1].clip(0, H - 1)
    x0 = np.minimum(x.astype(np.int64), W - 2)
    y0 = np.minimum(y.astype(np.int64), H - 2)
    u = x - x0
    v = y - y0
    weights = np.stack([(1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v])
    return (y0 * W + x0 + np.array([[0], [1], [W], [W + 1]])).T, weights.T


def checkerboard_corners(points: np.ndarray, size: tuple[int, int], parity: int) -> tuple[np.ndarray, np.ndarray]:
    """Same as `corners`, if only pixels with even x + y + parity (0 or 1) have a value.

    These pixels are a square lattice that is turned by 45 degrees; around a point are the four that are bilinear
    neighbors there. Neighbors outside the frame, which points at its border have, get the weight 0 and the index 0."""
    H, W = size
    x = points[:, 0].clip(0, W - 1)
    y = points[:, 1].clip(0, H - 1)
    u = (x + y + parity) / 2  # lattice coordinates: integers at pixels with a value
    v = (x - y + parity) / 2
    u0 = np.floor(u).astype(np.int64)
    v0 = np.floor(v).astype(np.int64)
    u -= u0
    v -= v0
    columns = u0 + v0 - parity + np.array([[0], [1], [1], [2]])  # (4, n)
    rows = u0 - v0 + np.array([[0], [1], [-1], [0]])
    weights = np.stack([(1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v])
    outside = (columns < 0) | (columns >= W) | (rows < 0) | (rows >= H)
    return np.where(outside, 0, rows * W + columns).T, np.where(outside, 0, weights).T


def inside(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Whether points `(..., 2)` lie inside a frame of `size` (H, W), bool `(...)`.

    The frame ends half a pixel beyond the centers of its border pixels."""
    return ((points >= -0.5) & (points <= np.array(size[::-1]) - 0.5)).all(axis=-1)


def similarity(features_a: Tensor, features_b: Tensor, p: Tensor, q: Tensor, size: tuple[int, int]) -> Tensor:
    """Cosine similarity `(n,)` of features `(h, w, c)` of frame a at points p `(n, 2)` and of frame b at q `(n, 2)`."""
    chunk = max(CHUNK_VALUES // features_a.shape[-1], 1)
    out = []
    for pp, qq in zip(p.split(chunk), q.split(chunk), strict=True):
        a, b = _look_up(features_a, pp, size), _look_up(features_b, qq, size)  # (chunk, c) each
        # F.cosine_similarity takes 2.5 times as long
        out.append((a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1)).sqrt().clamp_min(1e-8))
    return torch.cat(out)


def similarity_on_cpu(features_a: np.ndarray, features_b: np.ndarray, p: np.ndarray, q: np.ndarray,
                      size: tuple[int, int]) -> np.ndarray:
    """Same as `similarity` of arrays, about eight times as fast. Points are rounded to 1/32 of a feature's cell."""
    # PyTorch converts float16 faster than numpy
    features_a, features_b = (torch.from_numpy(x).float().numpy() for x in (features_a, features_b))
    chunk = max(CHUNK_VALUES // features_a.shape[-1], 1)
    out = [np.empty(0, np.float32)]
    for k in range(0, len(p), chunk):
        products = np.zeros((3, len(p[k: k + chunk])), np.float32)  # ab, aa, bb
        for c in range(0, features_a.shape[-1], REMAP_CHANNELS):
            a = _remap(features_a[..., c: c + REMAP_CHANNELS], p[k: k + chunk], size)
            b = _remap(features_b[..., c: c + REMAP_CHANNELS], q[k: k + chunk], size)
            products += np.vecdot(a, b), np.vecdot(a, a), np.vecdot(b, b)
        out.append(products[0] / np.sqrt(products[1] * products[2]).clip(1e-8))
    return np.concatenate(out)


def _remap(features: np.ndarray, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear features `(n, c)` at points `(n, 2)`, 0 outside."""
    h, w, c = features.shape
    x = points[None, :, 0] * np.float32((w - 1) / max(size[1] - 1, 1))
    y = points[None, :, 1] * np.float32((h - 1) / max(size[0] - 1, 1))
    return cv2.remap(np.ascontiguousarray(features), x, y, cv2.INTER_LINEAR).reshape(-1, c)


def _look_up(features: Tensor, p: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear features `(n, c)` at points `(n, 2)`, by embedding_bag, which is faster than grid_sample."""
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
