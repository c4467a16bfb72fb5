"""Dense outputs of a trained model: colors, depths and flow on a regular grid, and the canonical volume.

Notation
    h, w     rows and columns of a grid of every `interval`-th pixel of a frame (`grid_pixels`)
    u        canonical points                                                      (N, 3)
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from common.geometry import regular_grid
from inference.tracker import Tracker
from models.rendering import composite, ray_depths

CPU_SIDE = 96  # grid points along the longer side of a frame on a CPU
CANONICAL_SAMPLES = 32  # samples a ray of `render_canonical`, without layers


def grid_interval(tracker: Tracker) -> int:
    """Grid spacing in pixels: 1 on a GPU; on a CPU such that about CPU_SIDE points fit the frame's longer side."""
    return 1 if tracker.device.type == "cuda" else max(1, round(max(tracker.size) / CPU_SIDE))


def grid_pixels(size: tuple[int, int], interval: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Grid of every `interval`-th pixel of a frame of `size` (H, W): pixels (x, y) `(h * w, 2)` float32 at the centers
    of cells of `interval` x `interval` pixels, row by row, and (h, w)."""
    pixels = regular_grid(size, interval, (interval - 1) // 2)
    return pixels.reshape(-1, 2), pixels.shape[:2]


@torch.no_grad()
def colors_and_depths(tracker: Tracker, t: int, interval: int) -> tuple[np.ndarray, np.ndarray]:
    """Rendered colors `(h, w, 3)` in [0, 1] and depths `(h, w)` of frame t at every `interval`-th pixel."""
    pixels, shape = grid_pixels(tracker.size, interval)
    ids = torch.tensor([t], device=tracker.device)
    parts = [tracker.model.color_and_depth(p[None], ids) for p in _pieces(tracker, pixels)]
    rgb = torch.cat([rgb[0] for rgb, _ in parts]).cpu().numpy()
    depth = torch.cat([depth[0] for _, depth in parts]).cpu().numpy()
    return rgb.reshape(*shape, 3), depth.reshape(shape)


def coarse_flow(tracker: Tracker, i: int, j: int, interval: int) -> np.ndarray:
    """Flow `(h, w, 2)` in pixels from frame i to frame j at every `interval`-th pixel, also where it is occluded."""
    pixels, shape = grid_pixels(tracker.size, interval)
    return (tracker.correspond(pixels, i, j) - pixels).reshape(*shape, 2)


@torch.no_grad()
def canonical_points(tracker: Tracker, t: int, pixels: np.ndarray) -> np.ndarray:
    """Canonical points `(N, 3)` of pixels `(N, 2)` of frame t: the sample of largest weight of each ray."""
    ids = torch.tensor([t], device=tracker.device)
    parts = [tracker.model.source_samples(p[None], ids, use_max_loc=True)[0] for p in _pieces(tracker, pixels)]
    return torch.cat(parts, dim=1)[0, :, 0].cpu().numpy()


@torch.no_grad()
def render_canonical(tracker: Tracker, low: np.ndarray, high: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Render the box of the canonical volume with corners `low` and `high` `(3,)` along its third axis: colors
    `(h, w, 3)` in [0, 1], `shape` = (h, w). Of layers (--deform warp), which have no depth, all are rendered, with one
    sample each, as in a frame. Otherwise the opacity of a sample does not depend on the number of samples a ray, as
    when a frame is rendered (OmniMotion, section 4.2)."""
    near, far = (torch.from_numpy(np.asarray(corner, np.float32)).to(tracker.device) for corner in (low, high))
    counts = (shape[1], shape[0], CANONICAL_SAMPLES)
    x, y, z = (near[k] + (far[k] - near[k]) * torch.linspace(0, 1, n, device=tracker.device)
               for k, n in enumerate(counts))
    config = tracker.model.config
    if config.deform == "warp":
        z = ray_depths(config.num_samples_ray, config.min_depth, config.max_depth, z)
    colors = []
    for rows in y.split(max(1, tracker.chunk_size // len(x))):
        grid = torch.stack(torch.meshgrid(rows, x, z, indexing="ij"), -1)[..., [1, 0, 2]]  # (h', w, K, 3)
        rgb, weights = tracker.model.render(grid)
        colors.append(composite(weights, rgb).cpu().numpy())
    return np.concatenate(colors)


def _pieces(tracker: Tracker, pixels: np.ndarray) -> Iterator[Tensor]:
    """Split pixels `(N, 2)` into pieces of at most `chunk_size`, on the tracker's device."""
    for piece in torch.from_numpy(np.ascontiguousarray(pixels, np.float32)).split(tracker.chunk_size):
        yield piece.to(tracker.device)
