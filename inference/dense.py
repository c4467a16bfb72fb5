"""What a trained model holds besides tracks: colors, depths and flow on a coarse grid, and the canonical volume.

Notation
    h, w     rows and columns of a grid of every `interval`-th pixel of a frame (`grid_pixels`)
    u        canonical points                                                      (N, 3)
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from inference.tracker import Tracker
from models.rendering import composite, take_sample

CPU_SIDE = 96   # grid points along the longer side of a frame, on the CPU


def grid_interval(tracker: Tracker, side: int = CPU_SIDE) -> int:
    """Every pixel on a GPU, `side` of them along the frame's longer side on the CPU."""
    return 1 if tracker.device.type == "cuda" else max(1, round(max(tracker.size) / side))


def grid_pixels(size: tuple[int, int], interval: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Pixels `(h * w, 2)` float32 in the middle of cells of `interval` pixels a side, row by row, and (h, w)."""
    y, x = (np.arange(min((interval - 1) // 2, side - 1), side, interval, dtype=np.float32) for side in size)
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2), (len(y), len(x))


@torch.no_grad()
def colors_and_depths(tracker: Tracker, t: int, interval: int) -> tuple[np.ndarray, np.ndarray]:
    """Rendered colors `(h, w, 3)` in [0, 1] and depths `(h, w)` of frame t."""
    pixels, shape = grid_pixels(tracker.size, interval)
    ids = torch.tensor([t], device=tracker.device)
    parts = [tracker.model.color_and_depth(p[None], ids) for p in _pieces(tracker, pixels)]
    rgb, depth = (torch.cat([part[k][0] for part in parts]).cpu().numpy() for k in (0, 1))
    return rgb.reshape(*shape, 3), depth.reshape(shape)


def coarse_flow(tracker: Tracker, i: int, j: int, interval: int) -> np.ndarray:
    """Flow `(h, w, 2)` in pixels of the frame, from frame i to frame j."""
    pixels, shape = grid_pixels(tracker.size, interval)
    return (tracker.correspond(pixels, i, j) - pixels).reshape(*shape, 2)


@torch.no_grad()
def canonical_points(tracker: Tracker, t: int, pixels: np.ndarray) -> np.ndarray:
    """The canonical points `(N, 3)` that pixels `(N, 2)` of frame t show: of each ray the sample of largest weight."""
    model, out = tracker.model, []
    for p in _pieces(tracker, pixels):
        x = model.lift(p[None])  # (1, N', K, 3)
        u = model.maps(torch.tensor([t], device=tracker.device)).to_canonical(x.flatten(1, 2)).view_as(x)
        out.append(take_sample(u, model.render(u)[1].argmax(-1))[0].cpu().numpy())
    return np.concatenate(out)


@torch.no_grad()
def render_canonical(tracker: Tracker, low: np.ndarray, high: np.ndarray, shape: tuple[int, int],
                     samples: int = 32) -> np.ndarray:
    """The canonical volume between the corners `low` and `high` `(3,)`, seen along its third axis: colors
    `(h, w, 3)` in [0, 1]. A sample absorbs what one on a frame's ray does (OmniMotion, section 4.2)."""
    corner, far = (torch.from_numpy(np.asarray(c, np.float32)).to(tracker.device) for c in (low, high))
    sides = (shape[1], shape[0], samples)
    x, y, z = (corner[k] + (far[k] - corner[k]) * torch.linspace(0, 1, n, device=tracker.device)
               for k, n in enumerate(sides))
    colors = []
    for rows in y.split(max(1, tracker.chunk_size // len(x))):
        grid = torch.stack(torch.meshgrid(rows, x, z, indexing="ij"), -1)[..., [1, 0, 2]]  # (h', w, K, 3)
        rgb, weights = tracker.model.render(grid)
        colors.append(composite(weights, rgb).cpu().numpy())
    return np.concatenate(colors)


def _pieces(tracker: Tracker, pixels: np.ndarray) -> Iterator[Tensor]:
    """Pixels `(N, 2)` in pieces of at most `chunk_size`, on the tracker's device."""
    for piece in torch.from_numpy(np.ascontiguousarray(pixels, np.float32)).split(tracker.chunk_size):
        yield piece.to(tracker.device)
