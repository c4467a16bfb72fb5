"""Longer correspondences from short ones: flow chained over adjacent frames (OmniMotion, supplement).

Notation
    i, j     source and target frame; the chain walks j = i + 1, i + 2, ... and j = i - 1, i - 2, ...
    flow     (H, W, 2) pixels from i to j, accumulated
    alive    (H, W) bool: the chain has not broken yet
    direct   filtered flow from i to j, valid where it is consistent

The rules differ in which of the two is believed where both are there and disagree:
    published  direct flow: it takes the chain's place, and the chain goes on from there. A chain breaks where a link
               is not consistent by the filters
    trusted    the chain, as long as no link is off by more than TRUSTED forward and backward. Of flow that was found
               over a great distance, what disagrees with such a chain is nearly always wrong (docs/preprocessing.md)
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from common.geometry import bilinear, pixel_grid, similarity
from loaders.correspondence_format import DensePair

RULES = ("trusted", "published")
COLOR_TH = 0.3  # largest distance of rgb in [0, 1]
TRUSTED = 0.5    # pixels: largest forward-backward error of a link
AGREE = 3.0      # pixels between a chain and direct flow up to which direct flow, which does not drift, is taken


def chain_row(i: int, targets: list[int], frame: Callable[[int], np.ndarray], features: Callable[[int], np.ndarray],
              direct: Callable[[int, int], DensePair], feature_th: float, rule: str,
              device: str = "cpu") -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Correspondences from frame i to `targets` as (j, flow, cycle, occlusion), those to adjacent frames unchanged.

    frame: t -> `(H, W, 3)` uint8; features: t -> `(h, w, c)`; `direct(a, b)` reads the filtered flow of a pair, of
    adjacent frames that of every pixel; rule: of RULES; device: where to compute. A chain counts if its ends look
    alike."""
    extend, choose = {"trusted": (_trusted, _choose_trusted), "published": (_consistent, _choose_published)}[rule]
    size, look = frame(i).shape[:2], _Look(i, frame, features, feature_th, device)
    grid = pixel_grid(size, device)
    for step, ends in ((1, [j for j in targets if j > i]), (-1, [j for j in targets if j < i])):
        flow, alive = torch.zeros_like(grid), torch.ones(size, dtype=torch.bool, device=device)
        for j in range(i + step, (max(ends) if step > 0 else min(ends)) + step, step) if ends else ():
            flow, alive = extend(flow, alive, j - step, j, direct, grid)
            if j not in ends:
                continue
            pair = direct(i, j)
            cycle, occlusion, straight = (
                torch.from_numpy(x).to(device) for x in (pair.cycle, pair.occlusion, pair.flow))
            found, flow, alive = choose(flow, alive, straight, cycle, occlusion, lambda rows, flow=flow, j=j: look.same(
                j, grid[rows], flow[rows]))
            if abs(i - j) > 1:
                yield j, *(x.cpu().numpy().copy() for x in found)
            else:
                yield j, pair.flow, pair.cycle, pair.occlusion


def _choose_published(flow: Tensor, alive: Tensor, straight: Tensor, cycle: Tensor, occlusion: Tensor, alike: Callable):
    """(flow, cycle, occlusion) that are found, and the chain and where it is alive from here on. A point that is
    occluded in j is not followed further."""
    unsure = alive & ~(cycle | occlusion)
    flow = torch.where((cycle | occlusion)[..., None], straight, flow)
    same = unsure.clone()
    same[unsure] = alike(unsure)
    alive = (same | cycle) & ~occlusion
    return (flow, alive, occlusion), flow, alive


def _choose_trusted(flow: Tensor, alive: Tensor, straight: Tensor, cycle: Tensor, occlusion: Tensor, alike: Callable):
    """The same. Where both agree it is direct flow, which does not drift; a chain that looks different counts for
    nothing, nor does the direct flow that contradicts it."""
    agree = cycle & ((flow - straight).norm(dim=-1) <= AGREE)
    unsure = alive & ~agree
    same = unsure.clone()
    same[unsure] = alike(unsure)
    found = agree | same | (cycle & ~alive)
    return (torch.where(same[..., None], flow, straight), found, occlusion & ~found), flow, alive


def _consistent(flow: Tensor, alive: Tensor, a: int, b: int, direct: Callable, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Add the flow from frame a to the adjacent b at the ends of the chains; a chain goes on where all four pixels
    around its end are cycle-consistent."""
    link = direct(a, b)
    both = torch.from_numpy(np.concatenate([link.flow, link.cycle[..., None]], axis=-1)).to(grid.device)
    ahead = bilinear(both, grid + flow)  # (H, W, 3)
    return flow + ahead[..., :2], alive & (ahead[..., 2] > 0.999)


def _trusted(flow: Tensor, alive: Tensor, a: int, b: int, direct: Callable, grid: Tensor) -> tuple[Tensor, Tensor]:
    """The same; a chain goes on where the link there and back ends within TRUSTED of its end, inside the frame."""
    there, home = (torch.from_numpy(direct(*pair).flow).to(grid.device) for pair in ((a, b), (b, a)))
    move = bilinear(there, grid + flow)  # (H, W, 2)
    flow = flow + move
    end, last = grid + flow, grid[-1, -1]
    error = (move + bilinear(home, end)).norm(dim=-1)
    return flow, alive & (error <= TRUSTED) & ((end >= 0) & (end <= last)).all(dim=-1)


class _Look:
    """How the points of frame i look: whether they look alike elsewhere, by features and by color."""

    def __init__(self, i: int, frame: Callable, features: Callable, feature_th: float, device: str):
        self.frame, self.features, self.feature_th, self.device = frame, features, feature_th, device
        self.frame_i, self.features_i = self._of(i)

    def _of(self, t: int) -> tuple[Tensor, Tensor]:
        return (torch.from_numpy(self.frame(t)).to(self.device),
                torch.from_numpy(self.features(t)).to(self.device).float())

    def same(self, j: int, p: Tensor, flow: Tensor) -> Tensor:
        """Whether points p `(n, 2)` look alike at p + flow of frame j: `(n,)` bool."""
        q, (frame_j, features_j) = p + flow, self._of(j)
        color_i = self.frame_i[p[:, 1].long(), p[:, 0].long()] / 255
        color_j = bilinear(frame_j, q) / 255
        alike = similarity(self.features_i, features_j, p, q, self.frame_i.shape[:2]) > self.feature_th
        return alike & ((color_i - color_j).norm(dim=-1) < COLOR_TH)
