"""Longer correspondences from short ones: flow chained over adjacent frames (OmniMotion, supplement).

Notation
    i, j     source and target frame; the chain walks j = i + 1, i + 2, ... and j = i - 1, i - 2, ...
    flow     (H, W, 2) pixels from i to j, accumulated
    alive    (H, W) bool: every link so far was cycle-consistent, and the look of the point has not changed
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from loaders.store_format import DensePair
from preprocessing.sampling import bilinear, pixel_grid, similarity

COLOUR_TH = 0.3  # largest distance of rgb in [0, 1]


def chain_row(i: int, frames: np.ndarray, features: list[np.ndarray], direct: Callable[[int, int], DensePair],
              feature_th: float) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Correspondences from frame i to all others as (j, flow, cycle, occlusion), those to adjacent frames unchanged.

    frames `(T, H, W, 3)` uint8, features `(h, w, c)` a frame; `direct(a, b)` reads the filtered flow of a pair.
    Where a direct correspondence is valid it takes the chain's place, and the chain goes on from there; a point that
    is occluded in j is not followed further."""
    T, grid = len(frames), pixel_grid(frames.shape[1:3])
    for step, targets in ((1, range(i + 1, T)), (-1, range(i - 1, -1, -1))):
        flow, alive = torch.zeros_like(grid), torch.ones(grid.shape[:2], dtype=torch.bool)
        for j in targets:
            flow, alive = _extend(flow, alive, direct(j - step, j), grid)
            pair = direct(i, j)
            cycle, occlusion = torch.from_numpy(pair.cycle), torch.from_numpy(pair.occlusion)
            valid = cycle | occlusion
            flow[valid] = torch.from_numpy(pair.flow)[valid]
            unsure = alive & ~valid
            alive[unsure] = _same_look(i, j, frames, features, grid[unsure], flow[unsure], feature_th)
            alive = (alive | cycle) & ~occlusion
            yield j, flow.numpy().copy(), alive.numpy().copy(), pair.occlusion


def _extend(flow: Tensor, alive: Tensor, link: DensePair, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Add one adjacent flow at the ends of the chains; a chain goes on where all four pixels around its end are
    cycle-consistent."""
    q = grid + flow
    ahead = bilinear(torch.from_numpy(np.concatenate([link.flow, link.cycle[..., None]], axis=-1)), q)  # (H, W, 3)
    return flow + ahead[..., :2], alive & (ahead[..., 2] > 0.999)


def _same_look(i: int, j: int, frames: np.ndarray, features: list[np.ndarray], p: Tensor, flow: Tensor,
               feature_th: float) -> Tensor:
    """Whether points p `(n, 2)` of frame i look alike in frame j, by features and by colour: `(n,)` bool."""
    q, size = p + flow, frames.shape[1:3]
    a, b = (torch.from_numpy(features[t]).float() for t in (i, j))
    colour_i = torch.from_numpy(frames[i])[p[:, 1].long(), p[:, 0].long()] / 255
    colour_j = bilinear(torch.from_numpy(frames[j]), q) / 255
    return (similarity(a, b, p, q, size) > feature_th) & ((colour_i - colour_j).norm(dim=-1) < COLOUR_TH)
