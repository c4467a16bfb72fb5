"""Sampling of frame pairs and pixels for training batches (OmniMotion, section 4.3 and supplement; docs/method.md).

Notation
    T, B, N  frames, pairs per batch, points per pair
    i, j     source and target frame of a stored correspondence; a batch swaps the two with probability 1/2
    p        pixel (x, y)
    n        stored correspondences of a pair

Pixels are drawn from the stored pixels of a pair, with probability proportional to the pixel weights of frame i. There
are two methods with the same distribution:
    inverse CDF  cumulative sum of the weights of all n stored pixels
    rejection    on a CPU, where reading all n pixels would take most of the time: up to CANDIDATES * N pixels of the
                 frame are drawn, and the first N that are stored are kept
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.geometry import bilinear_colors
from loaders.correspondence_format import STEPS

CACHE_BYTES = 1 << 28  # bytes; limit for the pixel weights of all frames that are cached, and for their cumulative sums
CANDIDATES = 8  # pixels drawn per point in rejection sampling; if fewer than N are stored, inverse CDF is used


@dataclass
class Batch:
    """One training batch: B frame pairs with N correspondences each."""
    ids1: Tensor      # (B,) int64 query frames
    ids2: Tensor      # (B,) int64 target frames
    pixels1: Tensor   # (B, N, 2) query points, pixels
    pixels2: Tensor   # (B, N, 2) corresponding points in the target frames, pixels
    rgb1: Tensor      # (B, N, 3) colors at the query points, in [0, 1]
    weights: Tensor   # (B, N) weight of the flow loss, 0 where the correspondence is not reliable


@dataclass
class PairRows:
    """The stored correspondences of a pair as tensors on one device, sorted by pixel index."""
    pixels: Tensor  # (n,) int64 flat indices y * W + x
    flow_q: Tensor  # (n, 2) int16, in 1/16 px
    cycle: Tensor   # (n,) bool

    def flow(self, rows: Tensor) -> Tensor:
        """Flow `(k, 2)` float32, in pixels, of the given rows `(k,)`."""
        return self.flow_q[rows].float() / STEPS


class PairSampler:
    """Draws batches from a video's frames and correspondences; all random numbers come from `generator`.

    Random numbers are drawn on the CPU. Pixels and flow are gathered on `device`, asynchronously on a GPU. With
    `resident`, each pair stays in the memory of `device` after its first use.
    `neighbor_weight` is the weight of each adjacent frame before normalization (0.5 in OmniMotion's code).
    `random_share` is the fraction of points that are drawn uniformly once an error map is used."""

    def __init__(self, frames: np.ndarray, store, num_pairs: int, num_pts: int, generator: torch.Generator,
                 neighbor_weight: float = 0.5, use_count_map: bool = True, random_share: float = 0.0,
                 device: torch.device | str = "cpu", resident: bool = False):
        self.frames, self.store, self.generator = torch.from_numpy(frames).to(device), store, generator
        self.num_pairs, self.num_pts, self.neighbor_weight = num_pairs, num_pts, neighbor_weight
        self.use_count_map, self.random_share = use_count_map, random_share
        self.device, self.resident, self._pairs = torch.device(device), resident, {}
        self.counts = torch.from_numpy(np.asarray(store.counts, dtype=np.float64))  # (T, T)
        T = len(self.counts)
        self.interval = (torch.arange(T)[:, None] - torch.arange(T)).abs()
        self.frame_weights = torch.ones(T, dtype=torch.float64)
        self.cell_weights, self.cell, self._pixel_weights, self._cdfs = None, 1, {}, {}
        self._partners = lru_cache(1)(self.pair_probabilities)  # the interval changes a few times in a run

    def use_error_map(self, error_map) -> None:
        """Use the current weights of `error_map` (loaders.error_map.ErrorMap) for all later draws; they are copied."""
        self.frame_weights = error_map.frame_weights().double().cpu()
        self.cell_weights, self.cell = error_map.cell_weights().cpu(), error_map.cell
        self._pixel_weights, self._cdfs = {}, {}

    def pair_probabilities(self, max_interval: int) -> Tensor:
        """P(j | i) `(T, T)`: proportional to the number of valid correspondences; adjacent frames have a fixed weight.

        The row of a frame without a partner within `max_interval` frames is zero."""
        reachable = (self.counts > 0) & (self.interval <= max_interval)
        weights = torch.where(reachable, self.counts, 0)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
        weights = torch.where(reachable & (self.interval == 1), self.neighbor_weight, weights)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)

    def draw_pairs(self, count: int, max_interval: int) -> Tensor:
        """`count` frame pairs (i, j), `(count, 2)` int64, at most `max_interval` frames apart.

        UserError if no frame has a valid correspondence within `max_interval` frames."""
        partners = self._partners(max_interval)
        frame = self.frame_weights * (partners.sum(-1) > 0)
        if not frame.any():
            raise UserError(f"no frame has a valid correspondence to one at most {max_interval} frames away: look at "
                            "the frames and at what preprocessing printed")
        i = torch.multinomial(frame, count, replacement=True, generator=self.generator)
        j = torch.multinomial(partners[i], 1, generator=self.generator)[:, 0]
        return torch.stack([i, j], dim=-1)

    def rows(self, i: int, j: int) -> PairRows:
        """The stored correspondences from frame i to frame j."""
        if (i, j) in self._pairs:
            return self._pairs[i, j]
        stored = self.store.stored(i, j)
        out = PairRows(*(torch.from_numpy(a).to(self.device, non_blocking=True) for a in (
            stored.pixels, stored.flow_q, stored.cycle)))
        if self.resident:
            self._pairs[i, j] = out
        return out

    def pixel_weights(self, i: int) -> Tensor:
        """Sampling weight of each pixel of frame i `(H * W,)` on `device`: from the error map if there is one, else
        1/sqrt(count + 1), where count is the number of valid correspondences of the pixel."""
        if i not in self._pixel_weights:
            _make_room(self._pixel_weights)
            self._pixel_weights[i] = self._weights(i).to(self.device, non_blocking=True)
        return self._pixel_weights[i]

    def _weights(self, i: int) -> Tensor:
        H, W = self.frames.shape[1:3]
        if self.cell_weights is not None:
            cells = self.cell_weights[i].repeat_interleave(self.cell, 0).repeat_interleave(self.cell, 1)
            return cells[:H, :W].flatten()
        if self.use_count_map:
            return (torch.from_numpy(self.store.count_map(i).astype(np.float32)).flatten() + 1).rsqrt()
        return torch.ones(H * W)

    def _cdf(self, i: int) -> Tensor:
        """Cumulative sum of the pixel weights of frame i `(H * W,)` float64."""
        if i not in self._cdfs:
            _make_room(self._cdfs)
            self._cdfs[i] = self._weights(i).double().cumsum(0)
        return self._cdfs[i]

    def draw_rows(self, i: int, pixels: Tensor, u: Tensor) -> Tensor:
        """Row numbers `(N,)` drawn from the stored pixels `(n,)` of frame i by the inverse CDF of their weights.

        `u` is the entry of one pair of `uniform`."""
        cdf = self.pixel_weights(i)[pixels].cumsum(0, dtype=torch.float64)
        rows = torch.searchsorted(cdf, u[0] * cdf[-1], right=True).clamp(max=len(pixels) - 1)
        if len(u) == 3:  # as in OmniMotion, a fraction of the points is drawn uniformly
            random = (u[1] * len(pixels)).long()
            rows = torch.where(u[2] < self.random_share, random, rows)
        return rows

    def uniform(self, count: int) -> Tensor:
        """Random numbers for `draw_rows` for `count` pairs, `(count, 1 or 3, N)` float64 in [0, 1)."""
        kinds = 3 if self.random_share and self.cell_weights is not None else 1
        return torch.rand(count, kinds, self.num_pts, dtype=torch.float64, generator=self.generator)

    def candidates(self, count: int) -> Tensor | None:
        """Random numbers for `draw_stored` for `count` pairs, `(count, CANDIDATES * N)` float64 in [0, 1).

        None where inverse CDF is used instead: on a GPU, with `resident`, or if some points are drawn uniformly."""
        mixed = self.random_share and self.cell_weights is not None
        if mixed or self.resident or self.device.type != "cpu":
            return None
        return torch.rand(count, CANDIDATES * self.num_pts, dtype=torch.float64, generator=self.generator)

    def draw_stored(self, i: int, j: int, u: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rejection sampling: stored pixels `(N,)` of frame i, their flow to frame j `(N, 2)` and cycle flags `(N,)`.

        `u` is the entry of one pair of `candidates`. None if fewer than N of its pixels are stored and not
        tentative."""
        cdf, index = self._cdf(i), self.store.index(i, j)
        likely = 2 * self.num_pts * len(cdf) // max(index.count, 1)  # this many probably contain N stored pixels
        for count in (likely, len(u)) if likely < len(u) else (len(u),):
            pixels = torch.searchsorted(cdf, u[:count] * cdf[-1], right=True).clamp(max=len(cdf) - 1).numpy()
            rows, stored = index.find(pixels)
            stored[stored] = ~index.tentative_at(pixels[stored])
            kept = np.flatnonzero(stored)[:self.num_pts]
            if len(kept) == self.num_pts:
                pixels = pixels[kept]
                return tuple(torch.from_numpy(a) for a in (pixels, index.flow(rows[kept]), index.cycle_at(pixels)))
        return None

    def _upload(self, a: Tensor) -> Tensor:
        """Asynchronous copy to the device, through pinned memory."""
        return a if self.device.type == "cpu" else a.pin_memory().to(self.device, non_blocking=True)

    def batch(self, max_interval: int, pair_weight, share: slice = slice(None)) -> Batch:
        """One batch of pairs at most `max_interval` frames apart; `pair_weight(interval)` is a pair's flow loss weight.

        `share` selects the pairs that this process gathers. Random numbers are drawn for the whole batch, so that
        processes whose generators have the same state split one batch."""
        pairs = self.draw_pairs(self.num_pairs, max_interval)[share]
        flips = (torch.rand(self.num_pairs, generator=self.generator) < 0.5)[share]
        draws = self._upload(self.uniform(self.num_pairs)[share])
        candidates = self.candidates(self.num_pairs)
        candidates = [None] * len(pairs) if candidates is None else candidates[share]
        drawn = [self._drawn(i, j, *u) for (i, j), *u in zip(pairs.tolist(), draws, candidates, strict=True)]
        pixels, flow, cycle = (torch.stack(column) for column in zip(*drawn, strict=True))  # (B, N), (B, N, 2), (B, N)
        weights = torch.tensor([float(pair_weight(abs(i - j))) for i, j in pairs.tolist()])
        ids, flips, weights = (self._upload(a) for a in (
            torch.where(flips[:, None], pairs.flip(1), pairs).T.contiguous(), flips[:, None], weights[:, None]))
        W = self.frames.shape[2]
        p = torch.stack([pixels % W, pixels // W], dim=-1).float()  # (B, N, 2)
        pixels1, pixels2 = torch.where(flips[..., None], p + flow, p), torch.where(flips[..., None], p, p + flow)
        weights = torch.where(flips & ~cycle, 0, weights)  # an occluded point in frame j cannot be a query
        return Batch(*ids, pixels1, pixels2, bilinear_colors(self.frames, ids[0], pixels1), weights)

    def pixel_a_cell(self, i: int, error_map) -> tuple[int, Tensor, Tensor, Tensor]:
        """Points to evaluate the flow error of frame i: one random stored pixel for each of the M = h * w cells.

        Returns the partner frame j, the pixels `(M, 2)`, the corresponding points in frame j `(M, 2)`, and weights
        `(M,)`: 1, or 0 for a cell without stored pixels. The partner is drawn as in training; in mode "last" it is the
        next frame, as in OmniMotion, or the previous one for the last frame of the video or of a scene."""
        _, h, w = error_map.sums.shape
        T, W = len(self.counts), self.frames.shape[2]
        if error_map.mode == "last":
            j = i + 1 if i + 1 < T else i - 1
            if not self.counts[i, j] and 0 < i < T - 1 and self.counts[i, i - 1]:  # the last frame before a cut
                j = i - 1
        else:
            partners = self.pair_probabilities(T)[i]
            if partners.sum() == 0:
                empty = torch.zeros(h * w, 2)
                return i, empty, empty, empty[:, 0]
            j = int(torch.multinomial(partners, 1, generator=self.generator))
        stored = self.store.stored(i, j)
        order = torch.randperm(len(stored.pixels), generator=self.generator)
        pixels = torch.from_numpy(stored.pixels)[order]
        cell = pixels // W // error_map.cell * w + pixels % W // error_map.cell
        chosen = torch.full((h * w,), -1).scatter_(0, cell, order)  # a random row per cell, -1 if there is none
        rows = chosen.clamp(min=0)
        pixels = torch.from_numpy(stored.pixels)[rows]
        p1 = torch.stack([pixels % W, pixels // W], dim=-1).float()
        return j, p1, p1 + torch.from_numpy(stored.flow(rows.numpy())), (chosen >= 0).float()

    def state_dict(self) -> dict:
        """The frame and cell weights, for the checkpoint."""
        return {"frame_weights": self.frame_weights, "cell_weights": self.cell_weights, "cell": self.cell}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`."""
        self.frame_weights, self.cell_weights, self.cell = (
            state[name] for name in ("frame_weights", "cell_weights", "cell"))
        self._pixel_weights, self._cdfs = {}, {}

    def _drawn(self, i: int, j: int, draws: Tensor, candidates: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Same result as `draw_stored`; inverse CDF is used where rejection is disabled or finds too few pixels."""
        drawn = None if candidates is None else self.draw_stored(i, j, candidates)
        if drawn is not None:
            return drawn
        stored = self.rows(i, j)
        rows = self.draw_rows(i, stored.pixels, draws)
        return stored.pixels[rows], stored.flow(rows), stored.cycle[rows]


def fits_on(device: torch.device, choice: str, store, frames: np.ndarray) -> bool:
    """Whether to keep all pairs and frames in the memory of `device`. `choice` is "yes", "no" or "auto".

    "auto" means yes if `device` is a GPU and they need at most half of its free memory."""
    if choice != "auto" or device.type != "cuda":
        return choice == "yes"
    needed = int(store.counts.sum()) * 13 + frames.nbytes  # bytes: int64 pixel, two int16 flow components, bool flag
    return needed <= torch.cuda.mem_get_info(device)[0] // 2


def _make_room(cache: dict[int, Tensor]) -> None:
    """Delete the oldest of the tensors of one size in `cache`, so that with one more they take at most CACHE_BYTES."""
    while cache and next(iter(cache.values())).nbytes * (len(cache) + 1) > CACHE_BYTES:
        del cache[next(iter(cache))]
