"""Long-range correspondences by chaining flow over adjacent frames (OmniMotion, supplement).

Notation
    i, j     source and target frame; a chain passes through the frames i + 1, i + 2, ... or i - 1, i - 2, ...
    flow     (H, W, 2) pixels: the chained flow from i to j
    alive    (H, W) bool: pixels whose chain has not been broken
    direct   filtered flow that was computed between i and j directly, valid where it is cycle-consistent
    flags    (H, W) bool, cycle and occlusion; both: tentative (loaders/correspondence_format.py)
    link     flow between frames that follow each other in a chain: adjacent ones, or those around a blank frame

A rule decides where a chain breaks, and which flow is stored where the chain and direct flow disagree:
    trusted     A chain breaks where the forward-backward error of a link is above LINK_ERROR_TH or the chain leaves the
                frame. Chains are preferred to direct flow, which is nearly always wrong over a great distance where it
                disagrees with an unbroken chain (docs/preprocessing.md). A long chain is joined from parts of up to
                LONGEST_PART links, which many chains share (`TrustedChains`).
    unfiltered  OmniMotion's rule, without that test of the chain. A chain breaks only where a link is not flagged as
                cycle-consistent (preprocessing/filtering.py). Direct flow is preferred, and the chain continues from
                its end.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import count, takewhile

import numpy as np
import torch
from torch import Tensor

from common.geometry import bilinear, length, pixel_grid
from loaders.correspondence_format import DensePair
from preprocessing.filtering import compare
from preprocessing.frame_cache import FrameCache

RGB_TH = 0.3         # largest distance of two RGB colors in [0, 1] that may show the same point
LINK_ERROR_TH = 0.5  # pixels: largest forward-backward error of a link of a trusted chain
AGREEMENT_TH = 3.0   # pixels: up to this distance, direct flow replaces a trusted chain because it does not drift

PARTS = (1, 2, 4, 8)  # lengths of parts in links
LONGEST_PART = max(PARTS)
LONGER_SHARE = 0.6   # of the memory for parts up to a length, at most, for those of that length
ROUNDED_FROM = 4     # parts of at least so many links are rounded to 16 bits a component
PART_STEPS = 64      # int16 steps per pixel

ReadPair = Callable[[int, int], DensePair]
ChainState = tuple[Tensor, Tensor]               # (flow, alive)
Path = Callable[[int, int], Iterable[int]]
Correspondences = tuple[Tensor, Tensor, Tensor]  # flow (H, W, 2), cycle (H, W), occlusion (H, W)


def every_frame(i: int, step: int) -> Iterator[int]:
    """All frames after i (`step` 1) or before it (-1), without an end."""
    return count(i + step, step)


def last_part(links: int) -> int:
    """Length of the last part of a chain of at least 2 links: the largest power of 2 that divides it, if it is shorter
    than the chain and at most LONGEST_PART."""
    power = links & -links
    return min(power // 2 if power == links else power, LONGEST_PART)


def part_budgets(budget: int, size: tuple[int, int], num_frames: int | None) -> dict[int, int]:
    """Bytes to keep of the parts of each length, of `budget` bytes in all.

    If there is room, as much as the parts of the whole video take. Otherwise longer ones come first: chains over many
    frames use them again and again, shorter ones only serve frames near them."""
    out = {}
    for links in reversed(PARTS):
        share = LONGER_SHARE if links > 1 else 1
        pixel_bytes = 5 if links >= ROUNDED_FROM else 9  # flow and alive
        needed = budget if num_frames is None else 2 * num_frames * pixel_bytes * size[0] * size[1]
        out[links] = min(needed, int(share * budget))
        budget -= out[links]
    return out


class TrustedChains:
    """Trusted chains between any two frames of a path, computed when they are asked for. Safe to use from several
    threads; the result does not depend on the order in which they are asked for.

    direct: as of `chain_row`
    size:   (H, W) of the frames
    path:   as of `chain_row`
    budget: bytes of parts to keep; others are computed again
    num_frames: of the video; None: unknown"""

    def __init__(self, direct: ReadPair, size: tuple[int, int], path: Path, device: str = "cpu", budget: int = 1 << 30,
                 num_frames: int | None = None):
        self.direct = direct
        self.path = path
        self.grid = pixel_grid(size, device)
        budgets = part_budgets(budget, size, num_frames)
        self._parts = {links: FrameCache(self._part, budgets[links]) for links in PARTS}

    def __call__(self, i: int, j: int, known: dict[int, ChainState] | None = None) -> ChainState:
        """The chain from frame i to j, which lies on the path from i: flow `(H, W, 2)` and alive `(H, W)`.

        known: the last chains from frame i in this direction, by their end. It is updated."""
        if abs(i - j) in PARTS:
            flow, alive = (torch.from_numpy(x).to(self.grid.device) for x in self._parts[abs(i - j)][i, j])
            return flow if flow.is_floating_point() else flow / PART_STEPS, alive
        known = {} if known is None else known
        if j not in known:
            known[j] = self._compute(i, j, known)
            while len(known) > 2 * LONGEST_PART:
                del known[next(iter(known))]
        return known[j]

    def _part(self, pair: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The chain from frame pair[0] to pair[1]: flow `(H, W, 2)` as it is kept, and alive."""
        flow, alive = self._compute(*pair, {})
        if abs(pair[0] - pair[1]) >= ROUNDED_FROM:
            limit = torch.iinfo(torch.int16).max
            flow = (flow * PART_STEPS).round()
            alive = alive & (flow.abs() <= limit).all(dim=-1)
            flow = flow.nan_to_num(0).clamp(-limit, limit).to(torch.int16)
        return flow.cpu().numpy(), alive.cpu().numpy()

    def _compute(self, i: int, j: int, known: dict[int, ChainState]) -> ChainState:
        step = 1 if j > i else -1
        between = list(takewhile(lambda frame: frame != j, self.path(i, step)))
        if not between:
            return self._link(i, j)
        middle = j - step * last_part(abs(i - j))
        if middle not in between:  # a blank frame
            middle = between[-1]
        return self._joined(self(i, middle, known), middle, j)

    def _link(self, i: int, j: int) -> ChainState:
        """The link from frame i to the next frame j.

        Where the frames are not adjacent, as around a blank frame, both directions must also be cycle-consistent, since
        other pixels have no flow."""
        there = self.direct(i, j).without_tentative()
        back = self.direct(j, i).without_tentative()
        flow, backward = (torch.from_numpy(pair.flow).to(self.grid.device) for pair in (there, back))
        end = self.grid + flow
        alive = self._inside(end) & (length(flow + bilinear(backward, end)) <= LINK_ERROR_TH)
        if abs(i - j) > 1:
            alive &= _all_cycle(there, self.grid) & _all_cycle(back, end)
        return flow, alive

    def _joined(self, first: ChainState, middle: int, j: int) -> ChainState:
        """A chain to frame `middle`, continued to frame j.

        It is broken where most of the interpolated pixels of the second part are, or where this part does not lead
        back: the errors of n links add up to sqrt(n) times LINK_ERROR_TH."""
        flow, alive = first
        second_flow, second_alive = self(middle, j)
        second = bilinear(torch.cat([second_flow, second_alive[..., None]], dim=-1), self.grid + flow)  # (H, W, 3)
        flow = flow + second[..., :2]
        end = self.grid + flow
        error = length(second[..., :2] + bilinear(self(j, middle)[0], end))
        leads_back = error <= LINK_ERROR_TH * abs(middle - j) ** 0.5
        return flow, alive & (second[..., 2] > 0.5) & leads_back & self._inside(end)

    def _inside(self, points: Tensor) -> Tensor:
        return ((points >= 0) & (points <= self.grid[-1, -1])).all(dim=-1)


def chain_row(i: int, targets: list[int], frame: Callable[[int], np.ndarray], features: Callable[[int], np.ndarray],
              direct: ReadPair, feature_th: float, chains: TrustedChains | None, device: str = "cpu",
              path: Path = every_frame, kept: Callable[[int, int], np.ndarray | None] = lambda i, j: None,
              ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Correspondences from frame i to each of `targets`: (j, flow `(H, W, 2)`, cycle `(H, W)`, occlusion `(H, W)`).

    frame:      t -> image `(H, W, 3)` uint8 RGB
    features:   t -> features `(h, w, c)`
    direct:     (a, b) -> filtered flow of a pair; of adjacent frames it must have the flow of all pixels
    feature_th: cosine similarity above which the two ends of a chain may show the same point
    chains:     trusted chains of the same frames; None: the rule "unfiltered"
    path:       (i, 1 or -1) -> frames after or before i that a chain passes, in order; `direct` must have the pairs
                of each and the next one
    kept:       pair -> pixels that are of interest `(H, W)` bool; None: all. With "unfiltered", all are needed
    Correspondences to adjacent frames, and to frames that no chain passes, are those of `direct`, unchanged."""
    size = frame(i).shape[:2]
    grid = pixel_grid(size, device)
    comparison = _Comparison(i, frame, features, feature_th, device)
    for step in (1, -1):
        remaining = {j for j in targets if (j - i) * step > 0}
        state = torch.zeros_like(grid), torch.ones(size, dtype=torch.bool, device=device)
        known = {}
        a = i
        for j in path(i, step):
            if not remaining:
                break
            if chains is None:
                state = _extend_unfiltered(state, a, j, direct, grid)
                a = j
            if j not in remaining:
                continue
            remaining.remove(j)
            pair = direct(i, j)
            found = _to_tensors(pair.without_tentative(), device)
            if chains is None:
                found, state = _choose_unfiltered(state, found, grid, comparison, j)
            elif abs(i - j) > 1:
                tentative = torch.from_numpy(pair.cycle & pair.occlusion).to(device)
                found = _choose_trusted(chains(i, j, known), found, tentative, grid, comparison, j, kept(i, j))
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
    link = direct(a, b).without_tentative()
    flow_and_cycle = np.concatenate([link.flow, link.cycle[..., None]], axis=-1)
    at_end = bilinear(torch.from_numpy(flow_and_cycle).to(grid.device), grid + flow)  # (H, W, 3)
    return flow + at_end[..., :2], alive & (at_end[..., 2] > 0.999)


def _choose_unfiltered(state: ChainState, direct: Correspondences, grid: Tensor, comparison: "_Comparison",
                       j: int) -> tuple[Correspondences, ChainState]:
    """The correspondences to store for frame j, and the state of the chains from j on.

    Direct flow is stored where it is valid, otherwise the chain if its ends look alike. Chains end at points that are
    occluded in j."""
    flow, alive = state
    direct_flow, cycle, occlusion = direct
    uncertain = alive & ~(cycle | occlusion)
    flow = torch.where((cycle | occlusion)[..., None], direct_flow, flow)
    alike = comparison.alike(j, uncertain, grid, flow)
    alive = (alike | cycle) & ~occlusion
    return (flow, alive, occlusion), (flow, alive)


def _choose_trusted(state: ChainState, direct: Correspondences, direct_tentative: Tensor, grid: Tensor,
                    comparison: "_Comparison", j: int, kept: np.ndarray | None) -> Correspondences:
    """The correspondences to store for frame j. direct_tentative `(H, W)` bool: where direct flow is tentative.

    Direct flow is stored where it agrees with the chain or the chain is broken. Otherwise the chain is stored if its
    ends look alike, and is tentative if they do not."""
    flow, alive = state
    direct_flow, cycle, occlusion = direct
    agree = cycle & (length(flow - direct_flow) <= AGREEMENT_TH)
    uncertain = alive & ~agree
    if kept is not None:
        uncertain &= torch.from_numpy(kept).to(uncertain.device)
    alike = comparison.alike(j, uncertain, grid, flow)
    valid = agree | alike | (cycle & ~alive)
    tentative = ~(valid | occlusion) & torch.where(alive, uncertain, direct_tentative)
    chained = alike | (tentative & alive)
    stored_flow = torch.where(chained[..., None], flow, direct_flow)
    return stored_flow, valid | tentative, (occlusion & ~valid) | tentative


def _all_cycle(pair: DensePair, points: Tensor) -> Tensor:
    """Whether all four pixels around points `(H, W, 2)` are cycle-consistent, `(H, W)`."""
    cycle = torch.from_numpy(pair.cycle[..., None].astype(np.float32)).to(points.device)
    return bilinear(cycle, points)[..., 0] > 0.999


class _Comparison:
    """Compares the appearance of points of frame i with that of their correspondences."""

    def __init__(self, i: int, frame: Callable, features: Callable, feature_th: float, device: str):
        self.frame = frame
        self.features = features
        self.feature_th = feature_th
        self.device = device
        self.frame_i = torch.from_numpy(frame(i)).to(device)
        self.features_i = features(i)

    def alike(self, j: int, selected: Tensor, grid: Tensor, flow: Tensor) -> Tensor:
        """Which of the pixels `selected` `(H, W)` bool look alike at the end of their flow in frame j, by features and
        RGB colors: `(H, W)`."""
        out = selected.clone()
        p = grid[selected]  # (n, 2)
        q = p + flow[selected]
        frame_j = torch.from_numpy(self.frame(j)).to(self.device)
        color_i = self.frame_i[p[:, 1].long(), p[:, 0].long()] / 255
        color_j = bilinear(frame_j, q) / 255
        similar = compare(self.features_i, self.features(j), p, q, self.frame_i.shape[:2]) > self.feature_th
        out[selected] = similar & ((color_i - color_j).norm(dim=-1) < RGB_TH)
        return out
