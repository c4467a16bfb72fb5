"""Which pairs of frames and which pixels a step sees (OmniMotion, section 4.3 and supplement; DESIGN.md section 5).

Notation
    T, B, N  frames, pairs a batch, points a pair
    i, j     source and target frame of a stored correspondence; one pair in two is handed over the other way round
    p        pixel (x, y)
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from errors import UserError


@dataclass
class Batch:
    """What a training step needs."""
    ids1: Tensor      # (B,) query frames
    ids2: Tensor      # (B,) target frames
    pixels1: Tensor   # (B, N, 2) query points
    pixels2: Tensor   # (B, N, 2) where they are in the target frames
    rgb1: Tensor      # (B, N, 3) colours at the query points, in [0, 1]
    weights: Tensor   # (B, N) weight of the flow loss, 0 where the correspondence cannot be trusted

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`."""
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


class PairSampler:
    """Draws batches from a video's frames and correspondences; every draw comes from `generator`.

    `neighbour_weight` is the share given to each adjacent frame before normalisation (0.5 as published)."""

    def __init__(self, frames: np.ndarray, store, num_pairs: int, num_pts: int, generator: torch.Generator,
                 neighbour_weight: float = 0.5, use_count_map: bool = True, random_share: float = 0.0):
        self.frames, self.store, self.generator = torch.from_numpy(frames), store, generator
        self.num_pairs, self.num_pts, self.neighbour_weight = num_pairs, num_pts, neighbour_weight
        self.use_count_map, self.random_share = use_count_map, random_share
        self.counts = torch.from_numpy(np.asarray(store.counts, dtype=np.float64))  # (T, T)
        T = len(self.counts)
        self.interval = (torch.arange(T)[:, None] - torch.arange(T)).abs()
        self.frame_weights = torch.ones(T, dtype=torch.float64)
        self.cell_weights, self.cell = None, 1

    def use_error_map(self, error_map) -> None:
        """Draw frames and pixels by `error_map` (loaders.error_map.ErrorMap) from now on, as it stands now."""
        self.frame_weights = error_map.frame_weights().double().cpu()
        self.cell_weights, self.cell = error_map.cell_weights().cpu(), error_map.cell

    def pair_probabilities(self, max_interval: int) -> Tensor:
        """P(j | i) `(T, T)`: by the number of valid correspondences, neighbours boosted; zero rows have no partner."""
        reachable = (self.counts > 0) & (self.interval <= max_interval)
        weights = torch.where(reachable, self.counts, 0)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
        weights = torch.where(reachable & (self.interval == 1), self.neighbour_weight, weights)
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

    def pixel_weights(self, i: int, pixels: Tensor) -> Tensor:
        """Weight of drawing the flat pixels `(n,)` of frame i: the error map's, or 1/sqrt(count + 1) before it."""
        if self.cell_weights is not None:
            W = self.frames.shape[2]
            row, column = pixels // W // self.cell, pixels % W // self.cell
            return self.cell_weights[i, row, column].double()
        if self.use_count_map:
            count = torch.from_numpy(self.store.count_map(i).astype(np.float64)).flatten()
            return (count[pixels] + 1).rsqrt()
        return torch.ones(len(pixels), dtype=torch.float64)

    def draw_rows(self, i: int, pixels: Tensor) -> Tensor:
        """`num_pts` rows of the stored pixels `(n,)` of frame i, by inverse CDF of their weights."""
        cdf = self.pixel_weights(i, pixels).cumsum(0)
        u = torch.rand(self.num_pts, dtype=torch.float64, generator=self.generator)
        rows = torch.searchsorted(cdf, u * cdf[-1], right=True).clamp(max=len(pixels) - 1)
        if self.random_share and self.cell_weights is not None:  # OmniMotion mixes hard pixels with random ones
            random = torch.randint(len(pixels), (self.num_pts,), generator=self.generator)
            swap = torch.rand(self.num_pts, generator=self.generator) < self.random_share
            rows = torch.where(swap, random, rows)
        return rows

    def batch(self, max_interval: int, pair_weight) -> Batch:
        """One batch of pairs at most `max_interval` frames apart; `pair_weight(interval)` weighs a pair's flow."""
        pairs = self.draw_pairs(self.num_pairs, max_interval)
        flips = torch.rand(self.num_pairs, generator=self.generator) < 0.5
        rows = [self._pair(i, j, bool(flip), pair_weight(abs(i - j)))
                for (i, j), flip in zip(pairs.tolist(), flips, strict=True)]
        return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))

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

    def _pair(self, i: int, j: int, flip: bool, weight: float) -> tuple[Tensor, ...]:
        stored = self.store.stored(i, j)
        pixels = torch.from_numpy(stored.pixels)
        rows = self.draw_rows(i, pixels)
        chosen = rows.numpy()
        W = self.frames.shape[2]
        p1 = torch.stack([pixels[rows] % W, pixels[rows] // W], dim=-1).float()  # (N, 2)
        p2 = p1 + torch.from_numpy(stored.flow(chosen))
        weights = torch.full((self.num_pts,), float(weight))
        if flip:  # a point that is hidden in frame j cannot be a query there
            weights = weights * torch.from_numpy(stored.cycle[chosen])
            i, j, p1, p2 = j, i, p2, p1
        rgb = bilinear_colours(self.frames[i], p1) if flip else self.frames[i].view(-1, 3)[pixels[rows]] / 255
        return torch.tensor(i), torch.tensor(j), p1, p2, rgb, weights


def bilinear_colours(image: Tensor, p: Tensor) -> Tensor:
    """Colours in [0, 1] `(N, 3)` of a uint8 image `(H, W, 3)` at pixels `(N, 2)`, clamped to the frame."""
    H, W = image.shape[:2]
    x, y = p[:, 0].clamp(0, W - 1), p[:, 1].clamp(0, H - 1)
    x0, y0 = x.floor().long().clamp(max=max(W - 2, 0)), y.floor().long().clamp(max=max(H - 2, 0))
    fx, fy = (x - x0)[:, None], (y - y0)[:, None]
    flat, corner = image.view(-1, 3), y0 * W + x0
    top = flat[corner] * (1 - fx) + flat[corner + 1] * fx
    bottom = flat[corner + W] * (1 - fx) + flat[corner + W + 1] * fx
    return (top * (1 - fy) + bottom * fy) / 255
