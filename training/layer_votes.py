"""Which layer of motion each place of the canonical volume shows: all correspondences vote, before the first step.

Densities that are only learned are decided early, by the samples that happen to be drawn then: something small ends in
one layer in one run and in the other in the next.

Notation
    T, S     frames, layers of motion; layer 0 is in front
    R        vertices a side of the field's finest grid, over canonical x and y
    p, q     pixels of a raster of frame t, and where a stored correspondence takes them in frame j      (n, 2)
    M_t,s    the model's map from frame t to canonical space, at the depths of layer s
    e_s      |M_t,s(p) - M_j,s(q)|, pixels: how far the correspondence is from layer s's motion          (S, n)
    vote     for layer s that p shows it: the least e behind s, less e_s, over SURE pixels, in [-1, 1]. Below zero: it
             is empty there. None (0) where a layer in front of s fits better than s and all behind it: that hides s
    v        sum of the votes around a vertex over the sum of their sizes, in [-1, 1]; 0 where nothing voted
"""

import cv2
import numpy as np
import torch

from models.coords import denormalise_pixels, normalise_pixels
from models.omnimotion import OmniMotion

RASTER = 128    # pixels of a frame that vote, along the longer side, at most
TARGETS = 8     # frames j of each frame t, evenly among those of its pairs
SURE = 2 / 256  # of the longer side
BLUR = 1.0      # standard deviation of the Gaussian by which votes count, in vertices
DOUBT = 0.05    # of the median sum of sizes, added to each


@torch.no_grad()
def layer_votes(model: OmniMotion, store) -> np.ndarray:
    """v of all layers but the last, `(S - 1, R, R)` float32, rows along y.

    model: of --deform grid and --field grid, before its first step; store: a correspondence store."""
    S, R, side = model.config.grid_layers, model.field.side, max(store.size)
    stride = -(-side // RASTER)
    raster = np.s_[stride // 2::stride, stride // 2::stride]
    p = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in store.size[::-1])), axis=-1)[raster]
    votes, sizes = np.zeros((2, S - 1, R, R))
    with model.bound():
        for t, targets in enumerate(_targets(store)):
            u = _canonical(model, t, p.reshape(-1, 2))  # (S, n, 3)
            here, ballots = denormalise_pixels(u[..., :2], store.size), np.zeros((2, S - 1, p[..., 0].size))
            for j in targets:
                pair = store.dense(t, j)
                there = _canonical(model, j, (p + pair.flow[raster]).reshape(-1, 2))
                e = (here - denormalise_pixels(there[..., :2], store.size)).norm(dim=-1).cpu().numpy()
                vote = _votes(e / (SURE * side)) * pair.cycle[raster].ravel()  # (S - 1, n)
                ballots += vote, np.abs(vote)
            places = model.field.vertices_of(u).cpu().numpy()
            for s in range(S - 1):
                _add(votes[s], places[s], ballots[0, s])
                _add(sizes[s], places[s], ballots[1, s])
    return np.stack([_share(*both) for both in zip(votes, sizes, strict=True)]).astype(np.float32)


def _targets(store) -> list[list[int]]:
    """Of each frame, the frames with which it is compared."""
    out = [[] for _ in range(store.num_frames)]
    for t, j in sorted(store.pairs.tolist()):
        out[t].append(j)
    return [js and [js[k] for k in np.unique(np.linspace(0, len(js) - 1, TARGETS).round().astype(int))] for js in out]


def _canonical(model: OmniMotion, t: int, p: np.ndarray) -> torch.Tensor:
    """M_t,s(p) of pixels `(n, 2)`, in the middle of each layer: `(S, n, 3)`."""
    c, S, device = model.config, model.config.grid_layers, model.field.centre.device
    z = c.min_depth + (torch.arange(S, device=device) + 0.5) * ((c.max_depth - c.min_depth) / S)
    xy = normalise_pixels(torch.from_numpy(p).to(device), model.size)
    x = torch.cat([xy.expand(S, -1, -1), z[:, None, None].expand(-1, len(p), 1)], dim=-1)
    return model.maps(torch.tensor([t], device=device)).to_canonical(x.flatten(0, 1)[None])[0].view_as(x)


def _votes(e: np.ndarray) -> np.ndarray:
    """Votes `(S - 1, n)` for all layers but the last by errors `(S, n)` in units of SURE."""
    behind = np.minimum.accumulate(e[::-1])[::-1]  # least from here on
    front = np.minimum.accumulate(e)
    out = np.clip(behind[1:] - e[:-1], -1, 1)
    out[1:][front[:-2] < behind[1:-1]] = 0
    return out


def _add(total: np.ndarray, place: np.ndarray, values: np.ndarray) -> None:
    """Add values `(n,)` at places `(n, 2)`, in vertices, to the four vertices of `total` `(R, R)` around them."""
    R = len(total)
    corner = np.minimum(place.astype(np.int64), R - 2)
    share = place - corner
    for dx, dy in np.ndindex(2, 2):
        weight = np.abs(1 - dx - share[:, 0]) * np.abs(1 - dy - share[:, 1])
        total += np.bincount((corner[:, 1] + dy) * R + corner[:, 0] + dx, weight * values, R * R).reshape(R, R)


def _share(votes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """v `(R, R)` from sums of votes and of their sizes, each blurred."""
    votes, sizes = (cv2.GaussianBlur(x, (0, 0), BLUR) for x in (votes, sizes))
    some = sizes > 0
    return votes / (sizes + DOUBT * np.median(sizes[some])) * some if some.any() else votes
