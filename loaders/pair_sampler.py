"""Which pairs of frames and which pixels a step sees (OmniMotion, section 4.3 and supplement; docs/method.md).

Notation
    T, B, N  frames, pairs a batch, points a pair
    i, j     source and target frame of a stored correspondence; one pair in two is handed over the other way round
    p        pixel (x, y)
    n        stored correspondences of a pair

Pixels are drawn by their frame's weights among those that a pair has stored: by the sum of the weights over all n; or,
on a CPU, where reading all n would take longer than the rest, by rejection: up to CANDIDATES * N pixels of the frame
are drawn, and the first N that are stored are kept. Both are the same distribution.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from loaders.correspondence_format import STEPS

CDF_BYTES = 1 << 28  # of the sums that are kept
CANDIDATES = 8  # drawn for a point; with fewer than N stored ones among them weights are summed


@dataclass
class Batch:
    """What a training step needs."""
    ids1: Tensor      # (B,) query frames
    ids2: Tensor      # (B,) target frames
    pixels1: Tensor   # (B, N, 2) query points
    pixels2: Tensor   # (B, N, 2) where they are in the target frames
    rgb1: Tensor      # (B, N, 3) colors at the query points, in [0, 1]
    weights: Tensor   # (B, N) weight of the flow loss, 0 where the correspondence cannot be trusted


@dataclass
class PairRows:
    """The stored correspondences of a pair as tensors of one device, in ascending order of their pixels."""
    pixels: Tensor  # (n,) int64 flat indices y * W + x
    flow_q: Tensor  # (n, 2) int16, in 1/16 px
    cycle: Tensor   # (n,) bool

    def flow(self, rows: Tensor) -> Tensor:
        """Displacements of the given rows `(k, 2)` float32, pixels."""
        return self.flow_q[rows].float() / STEPS


class PairSampler:
    """Draws batches from a video's frames and correspondences; every draw comes from `generator`.

    Random numbers are drawn on the CPU; what they select is looked up on `device`, without waiting for it. `resident`
    keeps every pair there that was used once.
    `neighbor_weight` is the share given to each adjacent frame before normalization (0.5 as published)."""

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

    def use_error_map(self, error_map) -> None:
        """Draw frames and pixels by `error_map` (loaders.error_map.ErrorMap) from now on, as it stands now."""
        self.frame_weights = error_map.frame_weights().double().cpu()
        self.cell_weights, self.cell = error_map.cell_weights().cpu(), error_map.cell
        self._pixel_weights, self._cdfs = {}, {}

    def pair_probabilities(self, max_interval: int) -> Tensor:
        """P(j | i) `(T, T)`: by the number of valid correspondences, neighbors boosted; zero rows have no partner."""
        reachable = (self.counts > 0) & (self.interval <= max_interval)
        weights = torch.where(reachable, self.counts, 0)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
        weights = torch.where(reachable & (self.interval == 1), self.neighbor_weight, weights)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)

    def draw_pairs(self, count: int, max_interval: int) -> Tensor:
        """`count` pairs (i, j) as `(count, 2)`."""
        partners = self.pair_probabilities(max_interval)
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
        """Weight of drawing each pixel of frame i `(H * W,)` on `device`: the error map's, or 1/sqrt(count + 1) before
        it."""
        if i not in self._pixel_weights:
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
        """Sums of the weights of frame i's pixels up to each of them `(H * W,)`; as many as fit into CDF_BYTES stay."""
        if i not in self._cdfs:
            while self._cdfs and 8 * len(next(iter(self._cdfs.values()))) * (len(self._cdfs) + 1) > CDF_BYTES:
                del self._cdfs[next(iter(self._cdfs))]  # the one that was made first
            self._cdfs[i] = self._weights(i).double().cumsum(0)
        return self._cdfs[i]

    def draw_rows(self, i: int, pixels: Tensor, draws: Tensor | None = None) -> Tensor:
        """`num_pts` rows of the stored pixels `(n,)` of frame i, by inverse CDF of their weights; `draws` is one pair's
        of `uniform`."""
        u = self._upload(self.uniform(1))[0] if draws is None else draws
        cdf = self.pixel_weights(i)[pixels].cumsum(0, dtype=torch.float64)
        rows = torch.searchsorted(cdf, u[0] * cdf[-1], right=True).clamp(max=len(pixels) - 1)
        if len(u) == 3:  # OmniMotion mixes hard pixels with random ones
            random = (u[1] * len(pixels)).long()
            rows = torch.where(u[2] < self.random_share, random, rows)
        return rows

    def uniform(self, count: int) -> Tensor:
        """The random numbers that `draw_rows` needs for `count` pairs, `(count, 1 or 3, num_pts)` in [0, 1)."""
        kinds = 3 if self.random_share and self.cell_weights is not None else 1
        return torch.rand(count, kinds, self.num_pts, dtype=torch.float64, generator=self.generator)

    def candidates(self, count: int) -> Tensor | None:
        """The random numbers that `draw_stored` needs for `count` pairs, `(count, CANDIDATES * num_pts)` in [0, 1);
        None where the sum of weights is as fast, or the only way."""
        mixed = self.random_share and self.cell_weights is not None
        if mixed or self.resident or self.device.type != "cpu":
            return None
        return torch.rand(count, CANDIDATES * self.num_pts, dtype=torch.float64, generator=self.generator)

    def draw_stored(self, i: int, j: int, u: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """By rejection: `num_pts` stored pixels `(N,)` of frame i, their flow to frame j `(N, 2)`, cycle flags `(N,)`.
        `u` is one pair's of `candidates`; None if too few of these are stored."""
        cdf, index = self._cdf(i), self.store.index(i, j)
        likely = 2 * self.num_pts * len(cdf) // max(index.count, 1)  # to hold enough; looked up first
        for count in (likely, len(u)) if likely < len(u) else (len(u),):
            pixels = torch.searchsorted(cdf, u[:count] * cdf[-1], right=True).clamp(max=len(cdf) - 1).numpy()
            rows, stored = index.find(pixels)
            kept = np.flatnonzero(stored)[:self.num_pts]
            if len(kept) == self.num_pts:
                pixels = pixels[kept]
                return tuple(torch.from_numpy(a) for a in (pixels, index.flow(rows[kept]), index.cycle_at(pixels)))
        return None

    def _upload(self, a: Tensor) -> Tensor:
        """To the device, from pinned memory so that nothing waits for it."""
        return a if self.device.type == "cpu" else a.pin_memory().to(self.device, non_blocking=True)

    def batch(self, max_interval: int, pair_weight, share: slice = slice(None)) -> Batch:
        """One batch of pairs at most `max_interval` frames apart; `pair_weight(interval)` weighs a pair's flow.

        `share` looks up some of its `num_pairs` pairs only; the whole batch is drawn all the same, so that processes
        with the same generator share one batch."""
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
        weights = torch.where(flips & ~cycle, 0, weights)  # a point that is hidden in frame j cannot be a query there
        return Batch(*ids, pixels1, pixels2, bilinear_colors(self.frames, ids[0], pixels1), weights)

    def pixel_a_cell(self, i: int, error_map) -> tuple[int, Tensor, Tensor, Tensor]:
        """For a full evaluation of frame i: a partner frame j and, for each of the map's M = h * w cells, a random
        stored pixel `(M, 2)`, where it is in frame j `(M, 2)`, and weight 1, or 0 for a cell without any `(M,)`.

        The partner is drawn as in training; in mode "last" it is the next frame (OmniMotion)."""
        _, h, w = error_map.sums.shape
        T, W = len(self.counts), self.frames.shape[2]
        if error_map.mode == "last":
            j = i + 1 if i + 1 < T else i - 1
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
        chosen = torch.full((h * w,), -1).scatter_(0, cell, order)  # one of the cell's rows; which one is random
        rows = chosen.clamp(min=0)
        pixels = torch.from_numpy(stored.pixels)[rows]
        p1 = torch.stack([pixels % W, pixels // W], dim=-1).float()
        return j, p1, p1 + torch.from_numpy(stored.flow(rows.numpy())), (chosen >= 0).float()

    def state_dict(self) -> dict:
        """The weights drawn by, for the checkpoint."""
        return {"frame_weights": self.frame_weights, "cell_weights": self.cell_weights, "cell": self.cell}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`."""
        self.frame_weights, self.cell_weights, self.cell = (
            state[name] for name in ("frame_weights", "cell_weights", "cell"))
        self._pixel_weights, self._cdfs = {}, {}

    def _drawn(self, i: int, j: int, draws: Tensor, candidates: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What `draw_stored` returns, drawn by rejection where that is possible."""
        drawn = None if candidates is None else self.draw_stored(i, j, candidates)
        if drawn is not None:
            return drawn
        stored = self.rows(i, j)
        rows = self.draw_rows(i, stored.pixels, draws)
        return stored.pixels[rows], stored.flow(rows), stored.cycle[rows]


def fits_on(device: torch.device, choice: str, store, frames: np.ndarray) -> bool:
    """Whether all pairs and frames are to be kept on `device`: `choice` "auto" is yes on a GPU of whose free memory
    they fill at most half; "yes" and "no" are obeyed."""
    if choice != "auto" or device.type != "cuda":
        return choice == "yes"
    needed = int(store.counts.sum()) * 13 + frames.nbytes  # int64 pixel, two int16 components, a flag
    return needed <= torch.cuda.mem_get_info(device)[0] // 2


def bilinear_colors(frames: Tensor, ids: Tensor, p: Tensor) -> Tensor:
    """Colors in [0, 1] `(B, N, 3)` of uint8 frames `(T, H, W, 3)` `ids` `(B,)` at pixels `(B, N, 2)`, clamped to the
    frame."""
    H, W = frames.shape[1:3]
    x, y = p[..., 0].clamp(0, W - 1), p[..., 1].clamp(0, H - 1)
    x0, y0 = x.floor().long().clamp(max=max(W - 2, 0)), y.floor().long().clamp(max=max(H - 2, 0))
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    flat, corner = frames.view(-1, 3), (ids[:, None] * H + y0) * W + x0
    top = flat[corner] * (1 - fx) + flat[corner + 1] * fx
    bottom = flat[corner + W] * (1 - fx) + flat[corner + W + 1] * fx
    return (top * (1 - fy) + bottom * fy) / 255
