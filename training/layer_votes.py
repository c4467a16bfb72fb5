"""Which layer of motion each place of the canonical volume shows: correspondences vote, before the first step.

Densities that are only learned are decided early, by the samples that happen to be drawn then: something small ends in
one layer in one run and in the other in the next.

Notation
    T, S     frames, layers of motion; layer 0 is in front
    R        vertices a side of the field's finest grid, over canonical x and y
    p, q     pixels of a raster of frame t, and where stored correspondences take them in frames j of TARGETS  (n, 2)
    M_t,s    the model's map from frame t to canonical space, at the depths of layer s
    e_s      |M_t,s(p) - M_j,s(q)| in units of SURE: how far a correspondence is from layer s's motion
    vote     for layer s that p shows it: the least e behind s, less e_s, in [-1, 1]. Below zero: it is empty there.
             None (0) where a layer in front of s fits better than s and all behind it: that hides s
    v        sum of the votes around a vertex over (sum of their sizes + DOUBT times their number), in (-1, 1)
"""

import cv2
import numpy as np
import torch
from torch import Tensor

from evaluation.baselines import corners
from models.coords import denormalize_pixels, normalize_pixels
from models.omnimotion import OmniMotion

RASTER = 128    # pixels of a frame that vote, along the longer side, at most
TARGETS = 8     # frames j of each frame t, evenly among those of its pairs
SURE = 2 / 256  # of the longer side
DOUBT = 0.1     # mean size of the votes at which places are half as sure as they can be
BLUR = 1.0      # standard deviation of the Gaussian by which votes count, in vertices


@torch.no_grad()
def layer_votes(model: OmniMotion, store) -> np.ndarray:
    """v of all layers but the last, `(S - 1, R, R)` float32, rows along y; 0 where nothing votes.

    model: of --deform grid and --field grid, before its first step; store: a correspondence store, or a
    PublishedFolder."""
    (H, W), S, R = store.size, model.config.grid_layers, model.field.side
    p = _raster(store.size)
    pixels, unit = p @ (1, W), SURE * max(H, W)
    sums = np.zeros((3, S - 1, R, R))  # of votes, of their sizes, and their number
    with model.bound():
        for t, targets in enumerate(_targets(store.counts)):
            if not len(targets):
                continue
            q, known = map(np.stack, zip(*(_ends(store.index(t, j), p, pixels) for j in targets), strict=True))
            u = _canonical(model, [t], p[None])  # (1, S, n, 3)
            e = (_plane(u, store.size) - _plane(_canonical(model, targets, q), store.size)).norm(dim=-1)  # (B, S, n)
            votes, counts = _votes(e.cpu().numpy() / unit)  # (B, S - 1, n)
            counts &= known[:, None]
            votes *= counts
            places = model.field.vertices_of(u[0]).cpu().numpy()  # (S, n, 2)
            for total, values in zip(sums, (votes, np.abs(votes), counts), strict=True):
                for s in range(S - 1):
                    _add(total[s], places[s], values[:, s].sum(axis=0))
    votes, sizes, counts = (np.stack([cv2.GaussianBlur(x, (0, 0), BLUR) for x in total]) for total in sums)
    return np.divide(votes, sizes + DOUBT * counts, out=np.zeros_like(votes), where=counts > 0).astype(np.float32)


def _raster(size: tuple[int, int]) -> np.ndarray:
    """Pixels `(n, 2)` int64, every stride-th. The stride is odd: a store that keeps half of the pixels, as the squares
    of one color of a checkerboard, has half of these."""
    stride = -(-max(size) // RASTER) | 1
    y, x = (np.arange(min(stride // 2, (n - 1) // 2), n, stride) for n in size)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _targets(counts: np.ndarray) -> list[np.ndarray]:
    """Of each frame, the frames with which it is compared: of those with correspondences."""
    found = [np.flatnonzero(row) for row in counts]
    return [js[np.unique(np.linspace(0, len(js) - 1, min(TARGETS, len(js))).round().astype(int))] for js in found]


def _ends(pair, p: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a pair takes pixels p `(n, 2)`, whose flat indices are `pixels`, and whether that is believed `(n,)`."""
    rows, stored = pair.find(pixels)
    q, known = p.astype(np.float32), np.zeros(len(p), bool)
    q[stored] += pair.flow(rows[stored])
    known[stored] = pair.cycle_at(pixels[stored])
    return q, known


def _canonical(model: OmniMotion, frames, p: np.ndarray) -> Tensor:
    """M_t,s(p) of pixels `(B, n, 2)` of B frames, in the middle of each layer: `(B, S, n, 3)`."""
    (B, n), c, S, device = p.shape[:2], model.config, model.config.grid_layers, model.field.center.device
    z = c.min_depth + (torch.arange(S, device=device) + 0.5) * ((c.max_depth - c.min_depth) / S)
    xy = normalize_pixels(torch.from_numpy(p).float().to(device), model.size)
    x = torch.cat([xy[:, None].expand(B, S, n, 2), z[:, None, None].expand(B, S, n, 1)], dim=-1)
    ids = torch.as_tensor(frames, device=device)
    return model.maps(ids).to_canonical(x.flatten(1, 2)).view_as(x)


def _plane(u: Tensor, size: tuple[int, int]) -> Tensor:
    """Canonical x and y in pixels of the middle frame."""
    return denormalize_pixels(u[..., :2], size)


def _votes(e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Votes for all layers but the last by errors `(..., S, n)`, `(..., S - 1, n)`; and which of them are any."""
    behind = np.minimum.accumulate(e[..., ::-1, :], axis=-2)[..., ::-1, :]  # the least from each layer on
    front = np.minimum.accumulate(e, axis=-2)
    some = np.ones(e[..., 1:, :].shape, bool)
    some[..., 1:, :] = front[..., :-2, :] >= behind[..., 1:-1, :]
    return np.clip(behind[..., 1:, :] - e[..., :-1, :], -1, 1) * some, some


def _add(total: np.ndarray, place: np.ndarray, values: np.ndarray) -> None:
    """Add values `(n,)` at places `(n, 2)`, in vertices, to the four vertices of `total` `(R, R)` around them."""
    vertices, shares = corners(place, total.shape)
    total += np.bincount(vertices.ravel(), (shares * values[:, None]).ravel(), total.size).reshape(total.shape)
