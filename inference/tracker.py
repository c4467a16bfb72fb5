"""One predictor object: query points in, tracks through all frames out.

Notation
    N, T     query points, frames
    query    (t, y, x): frame number and pixel of the point                      (N, 3)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.omnimotion import OmniMotion
from models.rendering import take_sample


@dataclass
class Tracks:
    """Tracks of N query points through T frames, numpy."""
    tracks: np.ndarray           # (N, T, 2) float32 pixels
    visible: np.ndarray          # (N, T) bool
    occlusion_score: np.ndarray  # (N, T) float32: sum of compositing weights in front of the point, in [0, 1]
    depth: np.ndarray            # (N, T) float32


class Tracker:
    """Tracks points with a trained model, without gradients.

    `use_max_loc`: map the sample of largest weight of each ray instead of compositing all samples. `occlusion_th`: a
    point is occluded where its occlusion score is larger. `chunk_size`: rays at a time."""

    def __init__(self, model: OmniMotion, use_max_loc: bool = True, occlusion_th: float = 0.99,
                 chunk_size: int = 2_048):
        self.model = model
        self.use_max_loc = use_max_loc
        self.occlusion_th = occlusion_th
        self.chunk_size = chunk_size
        self.device = next(model.parameters()).device

    @property
    def num_frames(self) -> int:
        return self.model.config.num_frames

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.model.size

    @torch.no_grad()
    def track(self, query_points: np.ndarray, frames: Sequence[int] | None = None) -> Tracks:
        """Tracks of query points `(N, 3)` = (t, y, x), pixels, through all frames, or through the frame numbers
        `frames`. In its own frame a query point is visible, at exactly its given position."""
        ids = torch.arange(self.num_frames) if frames is None else torch.tensor(frames)
        N, T = len(query_points), len(ids)
        out = Tracks(np.zeros((N, T, 2), np.float32), np.zeros((N, T), bool), np.zeros((N, T), np.float32),
                     np.zeros((N, T), np.float32))
        frame = query_points[:, 0].astype(np.int64)
        chunks = [(int(t), rows) for t in np.unique(frame) for rows in self._chunks(np.flatnonzero(frame == t))]
        with self.model.bound():
            for t, rows in chunks:
                p1 = torch.from_numpy(np.ascontiguousarray(query_points[rows, :0:-1], dtype=np.float32))
                # (N', T, 2), (N', T), (N', T)
                p2, depth, score = self._track_from(t, p1.to(self.device), ids.to(self.device))
                inside = ((p2 >= -0.5) & (p2 <= p2.new_tensor(self.size[::-1]) - 0.5)).all(-1)
                out.tracks[rows], out.depth[rows], out.occlusion_score[rows] = (
                    a.cpu().numpy() for a in (p2, depth, score))
                out.visible[rows] = ((score <= self.occlusion_th) & inside).cpu().numpy()
                out.visible[np.ix_(rows, np.flatnonzero(ids.numpy() == t))] = True
        return out

    def _track_from(self, t: int, p1: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions `(N, T, 2)`, depths `(N, T)` and occlusion scores `(N, T)` of pixels `(N, 2)` of frame t in frames
        `ids` `(T,)`. The canonical samples, and the one that `use_max_loc` selects, are the same for all targets."""
        model, N = self.model, len(p1)
        x1 = model.lift(p1[None])
        u = model.maps(torch.tensor([t], device=self.device)).rays_to_canonical(x1)  # (1, N, K, 3)
        weights = model.render(u)[1]  # (1, N, K)
        if self.use_max_loc:
            u, weights = take_sample(u, weights.argmax(-1))[:, :, None], weights.new_ones(1, N, 1)  # one sample a ray
        frames = max(self.chunk_size * model.config.num_samples_ray // (N * u.shape[2]), 1)  # at a time
        positions, depths, scores = [], [], []
        for some in ids.split(frames):
            p2, depth = model.target_position(u.expand(len(some), -1, -1, -1), weights, some)  # (B, N, 2), (B, N)
            p2 = torch.where((some == t)[:, None, None], p1, p2)
            scores += [model.occlusion_score(*of_frame) for of_frame in zip(
                p2.split(1), depth.split(1), some.split(1), strict=True)]
            positions.append(p2)
            depths.append(depth)
        return tuple(torch.cat(parts).transpose(0, 1) for parts in (positions, depths, scores))

    @torch.no_grad()
    def correspond(self, pixels: np.ndarray, i: int, j: int) -> np.ndarray:
        """Positions `(N, 2)` in frame j of pixels `(N, 2)` of frame i."""
        ids = torch.tensor([i, j], device=self.device)
        pixels = torch.from_numpy(pixels).float()
        with self.model.bound():
            out = [self.model.correspond(p[None].to(self.device), ids[:1], ids[1:], self.use_max_loc)[0][0].cpu()
                   for p in pixels.split(self.chunk_size)]
        return torch.cat(out).numpy()

    def _chunks(self, rows: np.ndarray) -> list[np.ndarray]:
        return np.array_split(rows, max(1, -(-len(rows) // self.chunk_size)))
