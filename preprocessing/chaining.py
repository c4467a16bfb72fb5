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


def chain_row(i: int, targets: list[int], frame: Callable[[int], np.ndarray], features: Callable[[int], np.ndarray],
              direct: Callable[[int, int], DensePair], feature_th: float,
              device: str = "cpu") -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Correspondences from frame i to `targets` as (j, flow, cycle, occlusion), those to adjacent frames unchanged.

    frame: t -> `(H, W, 3)` uint8; features: t -> `(h, w, c)`; `direct(a, b)` reads the filtered flow of a pair, each
    once; device: where to compute. Where a direct correspondence is valid it takes the chain's place, and the chain
    goes on from there; a point that is occluded in j is not followed further."""
    size, look = frame(i).shape[:2], _Look(i, frame, features, feature_th, device)
    grid = pixel_grid(size, device)
    for step, ends in ((1, [j for j in targets if j > i]), (-1, [j for j in targets if j < i])):
        flow, alive = torch.zeros_like(grid), torch.ones(size, dtype=torch.bool, device=device)
        for j in range(i + step, (max(ends) if step > 0 else min(ends)) + step, step) if ends else ():
            near = direct(j - step, j)
            flow, alive = _extend(flow, alive, near, grid)
            if j not in ends:
                continue
            pair = near if j - step == i else direct(i, j)
            cycle, occlusion, straight = (
                torch.from_numpy(x).to(device) for x in (pair.cycle, pair.occlusion, pair.flow))
            valid = cycle | occlusion
            flow[valid] = straight[valid]
            unsure = alive & ~valid
            alive[unsure] = look.same(j, grid[unsure], flow[unsure])
            alive = (alive | cycle) & ~occlusion
            yield j, flow.cpu().numpy().copy(), alive.cpu().numpy().copy(), pair.occlusion


def _extend(flow: Tensor, alive: Tensor, link: DensePair, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Add one adjacent flow at the ends of the chains; a chain goes on where all four pixels around its end are
    cycle-consistent."""
    q = grid + flow
    both = torch.from_numpy(np.concatenate([link.flow, link.cycle[..., None]], axis=-1)).to(grid.device)
    ahead = bilinear(both, q)  # (H, W, 3)
    return flow + ahead[..., :2], alive & (ahead[..., 2] > 0.999)


class _Look:
    """How the points of frame i look: whether they look alike elsewhere, by features and by colour."""

    def __init__(self, i: int, frame: Callable, features: Callable, feature_th: float, device: str):
        self.frame, self.features, self.feature_th, self.device = frame, features, feature_th, device
        self.frame_i, self.features_i = self._of(i)

    def _of(self, t: int) -> tuple[Tensor, Tensor]:
        return (torch.from_numpy(self.frame(t)).to(self.device),
                torch.from_numpy(self.features(t)).to(self.device).float())

    def same(self, j: int, p: Tensor, flow: Tensor) -> Tensor:
        """Whether points p `(n, 2)` look alike at p + flow of frame j: `(n,)` bool."""
        q, (frame_j, features_j) = p + flow, self._of(j)
        colour_i = self.frame_i[p[:, 1].long(), p[:, 0].long()] / 255
        colour_j = bilinear(frame_j, q) / 255
        alike = similarity(self.features_i, features_j, p, q, self.frame_i.shape[:2]) > self.feature_th
        return alike & ((colour_i - colour_j).norm(dim=-1) < COLOUR_TH)
