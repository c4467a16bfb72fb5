"""Longer correspondences from short ones: flow chained over adjacent frames (OmniMotion, supplement).

Notation
    i, j     source and target frame; the chain walks j = i + 1, i + 2, ... and j = i - 1, i - 2, ...
    flow     (H, W, 2) pixels from i to j, accumulated
    alive    (H, W) bool: the chain has not broken yet
    direct   filtered flow from i to j, valid where it is consistent

The rules differ in which of the two is believed where they disagree:
    direct   direct flow, as published: it takes the chain's place, and the chain goes on from there. A chain breaks
             where a link is not consistent by the filters
    first    the chain, as long as no link is off by more than TRUSTED forward and backward. Of flow that was found over
             a great distance, what disagrees with such a chain is nearly always wrong (docs/preprocessing.md)
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from loaders.store_format import DensePair
from preprocessing.sampling import bilinear, pixel_grid, similarity

RULES = ("first", "direct")
COLOUR_TH = 0.3  # largest distance of rgb in [0, 1]
TRUSTED = 1.0    # pixels: largest forward-backward error of a link
AGREE = 3.0      # pixels between a chain and direct flow up to which direct flow, which does not drift, is taken


def chain_row(i: int, targets: list[int], frame: Callable[[int], np.ndarray], features: Callable[[int], np.ndarray],
              direct: Callable[[int, int], DensePair], feature_th: float, device: str = "cpu",
              rule: str = "direct") -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Correspondences from frame i to `targets` as (j, flow, cycle, occlusion), those to adjacent frames unchanged.

    frame: t -> `(H, W, 3)` uint8; features: t -> `(h, w, c)`; `direct(a, b)` reads the filtered flow of a pair, of
    adjacent frames that of every pixel; device: where to compute. Where there is no direct flow, a chain counts if its
    ends look alike. By the rule "direct", a point that is occluded in j is not followed further."""
    size, look = frame(i).shape[:2], _Look(i, frame, features, feature_th, device)
    grid = pixel_grid(size, device)
    for step, ends in ((1, [j for j in targets if j > i]), (-1, [j for j in targets if j < i])):
        flow, alive = torch.zeros_like(grid), torch.ones(size, dtype=torch.bool, device=device)
        for j in range(i + step, (max(ends) if step > 0 else min(ends)) + step, step) if ends else ():
            near = direct(j - step, j)
            if rule == "first":
                flow, alive = _trusted(flow, alive, near, direct(j, j - step), grid)
            else:
                flow, alive = _consistent(flow, alive, near, grid)
            if j not in ends:
                continue
            pair = near if j - step == i else direct(i, j)
            cycle, occlusion, straight = (
                torch.from_numpy(x).to(device) for x in (pair.cycle, pair.occlusion, pair.flow))
            unsure = alive & ~(cycle if rule == "first" else cycle | occlusion)
            alike = unsure.clone()
            alike[unsure] = look.same(j, grid[unsure], flow[unsure])
            if rule == "first":
                agree = cycle & ((flow - straight).norm(dim=-1) <= AGREE)
                chosen, found = torch.where((alive & ~agree)[..., None], flow, straight), cycle | alike
                occlusion &= ~found
            else:
                flow = torch.where((cycle | occlusion)[..., None], straight, flow)
                alive = (alike | cycle) & ~occlusion
                chosen, found = flow, alive
            if j - step == i:
                chosen, found, occlusion = straight, cycle, torch.from_numpy(pair.occlusion)
            yield j, chosen.cpu().numpy().copy(), found.cpu().numpy().copy(), occlusion.cpu().numpy()


def _consistent(flow: Tensor, alive: Tensor, link: DensePair, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Add one adjacent flow at the ends of the chains; a chain goes on where all four pixels around its end are
    cycle-consistent."""
    q = grid + flow
    both = torch.from_numpy(np.concatenate([link.flow, link.cycle[..., None]], axis=-1)).to(grid.device)
    ahead = bilinear(both, q)  # (H, W, 3)
    return flow + ahead[..., :2], alive & (ahead[..., 2] > 0.999)


def _trusted(flow: Tensor, alive: Tensor, link: DensePair, back: DensePair, grid: Tensor) -> tuple[Tensor, Tensor]:
    """The same; a chain goes on where the link there and back ends within TRUSTED of its end, inside the frame."""
    there, home = (torch.from_numpy(pair.flow).to(grid.device) for pair in (link, back))
    move = bilinear(there, grid + flow)  # (H, W, 2)
    flow = flow + move
    end, last = grid + flow, grid[-1, -1]
    error = (move + bilinear(home, end)).norm(dim=-1)
    return flow, alive & (error <= TRUSTED) & ((end >= 0) & (end <= last)).all(dim=-1)


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
