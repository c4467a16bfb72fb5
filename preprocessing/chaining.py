"""Long-range correspondences by chaining flow over adjacent frames (OmniMotion, supplement).

Notation
    i, j     source and target frame; a chain passes through the frames i + 1, i + 2, ... or i - 1, i - 2, ...
    flow     (H, W, 2) pixels: the chained flow from i to j
    alive    (H, W) bool: pixels whose chain has not been broken
    direct   filtered flow that was computed between i and j directly, valid where it is cycle-consistent
    link     flow between frames that follow each other in a chain: adjacent ones, or those around a blank frame

A rule decides where a chain breaks, and which flow is stored where the chain and direct flow disagree:
    trusted     A chain breaks where the forward-backward error of a link is above LINK_ERROR_TH or the chain leaves the
                frame. Chains are preferred to direct flow, which is nearly always wrong over a great distance where it
                disagrees with an unbroken chain (docs/preprocessing.md).
    unfiltered  OmniMotion's rule, without that test of the chain. A chain breaks only where a link is not flagged as
                cycle-consistent (preprocessing/filtering.py). Direct flow is preferred, and the chain continues from
                its end.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import count

import numpy as np
import torch
from torch import Tensor

from common.geometry import bilinear, pixel_grid, similarity
from loaders.correspondence_format import DensePair

COLOR_TH = 0.3       # largest distance of two RGB colors in [0, 1] that may show the same point
LINK_ERROR_TH = 0.5  # pixels: largest forward-backward error of a link of a trusted chain
AGREEMENT_TH = 3.0   # pixels: up to this distance, direct flow replaces a trusted chain because it does not drift

ReadPair = Callable[[int, int], DensePair]
ChainState = tuple[Tensor, Tensor]               # (flow, alive)
Path = Callable[[int, int], Iterable[int]]
Correspondences = tuple[Tensor, Tensor, Tensor]  # flow (H, W, 2), cycle (H, W), occlusion (H, W)


def every_frame(i: int, step: int) -> Iterator[int]:
    """All frames after i (`step` 1) or before it (-1), without an end."""
    return count(i + step, step)


def chain_row(i: int, targets: list[int], frame: Callable[[int], np.ndarray], features: Callable[[int], np.ndarray],
              direct: ReadPair, feature_th: float, rule: str, device: str = "cpu", path: Path = every_frame,
              ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Correspondences from frame i to each of `targets`: (j, flow `(H, W, 2)`, cycle `(H, W)`, occlusion `(H, W)`).

    frame:      t -> image `(H, W, 3)` uint8 RGB
    features:   t -> appearance features `(h, w, c)`
    direct:     (a, b) -> filtered flow of a pair; of adjacent frames it must have the flow of all pixels
    feature_th: cosine similarity above which the two ends of a chain may show the same point
    rule:       "trusted" or "unfiltered"
    path:       (i, 1 or -1) -> frames after or before i that a chain passes, in order; `direct` must have the pairs
                of each and the next one
    Correspondences to adjacent frames, and to frames that no chain passes, are those of `direct`, unchanged."""
    extend = {"trusted": _extend_trusted, "unfiltered": _extend_unfiltered}[rule]
    choose = {"trusted": _choose_trusted, "unfiltered": _choose_unfiltered}[rule]
    size = frame(i).shape[:2]
    grid = pixel_grid(size, device)
    appearance = _Appearance(i, frame, features, feature_th, device)
    for step in (1, -1):
        remaining = {j for j in targets if (j - i) * step > 0}
        state = torch.zeros_like(grid), torch.ones(size, dtype=torch.bool, device=device)
        a = i
        for j in path(i, step):
            if not remaining:
                break
            state = extend(state, a, j, direct, grid)
            a = j
            if j not in remaining:
                continue
            remaining.remove(j)
            pair = direct(i, j)
            found, state = choose(state, _to_tensors(pair, device), grid, appearance, j)
            if abs(i - j) > 1:
                yield j, *(x.cpu().numpy().copy() for x in found)
            else:
                yield j, pair.flow, pair.cycle, pair.occlusion
        for j in sorted(remaining):
            pair = direct(i, j)
            yield j, pair.flow, pair.cycle, pair.occlusion


def _to_tensors(pair: DensePair, device: str) -> Correspondences:
    return tuple(torch.from_numpy(x).to(device) for x in (pair.flow, pair.cycle, pair.occlusion))


def _extend_unfiltered(state: ChainState, a: int, b: int, direct: ReadPair, grid: Tensor) -> ChainState:
    """Add the link from frame a to the next frame b at the ends of the chains.

    A chain continues where all four pixels around its end are cycle-consistent."""
    flow, alive = state
    link = direct(a, b)
    flow_and_cycle = np.concatenate([link.flow, link.cycle[..., None]], axis=-1)
    at_end = bilinear(torch.from_numpy(flow_and_cycle).to(grid.device), grid + flow)  # (H, W, 3)
    return flow + at_end[..., :2], alive & (at_end[..., 2] > 0.999)


def _extend_trusted(state: ChainState, a: int, b: int, direct: ReadPair, grid: Tensor) -> ChainState:
    """Add the link from frame a to the next frame b at the ends of the chains.

    A chain continues where the link and the flow back end within LINK_ERROR_TH of the start, inside the frame. Where
    the frames are not adjacent, as around a blank frame, both must also be cycle-consistent, since other pixels have no
    flow."""
    flow, alive = state
    there = direct(a, b)
    back = direct(b, a)
    forward = torch.from_numpy(there.flow).to(grid.device)
    backward = torch.from_numpy(back.flow).to(grid.device)
    if abs(a - b) > 1:
        alive = alive & _all_cycle(there, grid + flow) & _all_cycle(back, grid + flow + bilinear(forward, grid + flow))
    link = bilinear(forward, grid + flow)  # (H, W, 2)
    flow = flow + link
    end = grid + flow
    error = (link + bilinear(backward, end)).norm(dim=-1)
    inside = ((end >= 0) & (end <= grid[-1, -1])).all(dim=-1)
    return flow, alive & (error <= LINK_ERROR_TH) & inside


def _choose_unfiltered(state: ChainState, direct: Correspondences, grid: Tensor, appearance: "_Appearance",
                       j: int) -> tuple[Correspondences, ChainState]:
    """The correspondences to store for frame j, and the state of the chains from j on.

    Direct flow is stored where it is valid, otherwise the chain if its ends look alike. Chains end at points that are
    occluded in j."""
    flow, alive = state
    direct_flow, cycle, occlusion = direct
    uncertain = alive & ~(cycle | occlusion)
    flow = torch.where((cycle | occlusion)[..., None], direct_flow, flow)
    alike = appearance.alike(j, uncertain, grid, flow)
    alive = (alike | cycle) & ~occlusion
    return (flow, alive, occlusion), (flow, alive)


def _choose_trusted(state: ChainState, direct: Correspondences, grid: Tensor, appearance: "_Appearance",
                    j: int) -> tuple[Correspondences, ChainState]:
    """The correspondences to store for frame j, and the state of the chains from j on.

    Direct flow is stored where it agrees with the chain or the chain is broken. Otherwise the chain is stored if its
    ends look alike; if they do not, the pixel gets no correspondence."""
    flow, alive = state
    direct_flow, cycle, occlusion = direct
    agree = cycle & ((flow - direct_flow).norm(dim=-1) <= AGREEMENT_TH)
    alike = appearance.alike(j, alive & ~agree, grid, flow)
    valid = agree | alike | (cycle & ~alive)
    stored_flow = torch.where(alike[..., None], flow, direct_flow)
    return (stored_flow, valid, occlusion & ~valid), state


def _all_cycle(pair: DensePair, points: Tensor) -> Tensor:
    """Whether all four pixels around points `(H, W, 2)` are cycle-consistent, `(H, W)`."""
    cycle = torch.from_numpy(pair.cycle[..., None].astype(np.float32)).to(points.device)
    return bilinear(cycle, points)[..., 0] > 0.999


class _Appearance:
    """Compares the appearance of points of frame i, by features and color, with that of their correspondences."""

    def __init__(self, i: int, frame: Callable, features: Callable, feature_th: float, device: str):
        self.frame = frame
        self.features = features
        self.feature_th = feature_th
        self.device = device
        self.frame_i, self.features_i = self._of(i)

    def _of(self, t: int) -> tuple[Tensor, Tensor]:
        return (torch.from_numpy(self.frame(t)).to(self.device),
                torch.from_numpy(self.features(t)).to(self.device).float())

    def alike(self, j: int, selected: Tensor, grid: Tensor, flow: Tensor) -> Tensor:
        """Which of the pixels `selected` `(H, W)` bool look alike at the end of their flow in frame j: `(H, W)`."""
        out = selected.clone()
        p = grid[selected]  # (n, 2)
        q = p + flow[selected]
        frame_j, features_j = self._of(j)
        color_i = self.frame_i[p[:, 1].long(), p[:, 0].long()] / 255
        color_j = bilinear(frame_j, q) / 255
        similar = similarity(self.features_i, features_j, p, q, self.frame_i.shape[:2]) > self.feature_th
        out[selected] = similar & ((color_i - color_j).norm(dim=-1) < COLOR_TH)
        return out
