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

from common.geometry import inside
from loaders.scenes import Scenes, one_scene
from models.omnimotion import OmniMotion

CHUNK_SAMPLES = 32  # samples a ray for which `chunk_size` is meant: with fewer, more rays are computed at a time


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
    point is occluded where its occlusion score is larger. `chunk_size`: rays of CHUNK_SAMPLES samples at a time.
    `scenes`: of the video; points are not visible in blank frames and in other scenes than their own. None: one scene.
    """

    def __init__(self, model: OmniMotion, use_max_loc: bool = True, occlusion_th: float = 0.99,
                 chunk_size: int = 2_048, scenes: Scenes | None = None):
        self.model = model
        self.use_max_loc = use_max_loc
        self.occlusion_th = occlusion_th
        self.chunk_size = max(chunk_size * CHUNK_SAMPLES // model.config.num_samples_ray, 1)  # rays
        self.scenes = scenes
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
        in_order = np.argsort(frame, kind="stable")  # points of one frame share its map
        with self.model.bound():
            for rows in np.array_split(in_order, -(-N // self.chunk_size)) if N else ():
                p1 = torch.from_numpy(np.ascontiguousarray(query_points[rows, :0:-1], dtype=np.float32))
                positions, depths, scores = self._track_some(frame[rows], p1.to(self.device), ids.to(self.device))
                out.tracks[rows] = positions
                out.depth[rows] = depths
                out.occlusion_score[rows] = scores
                out.visible[rows] = (scores <= self.occlusion_th) & inside(positions, self.size)
        out.visible |= frame[:, None] == ids.numpy()
        out.visible &= self.can_be_seen(frame)[:, ids.numpy()]
        return out

    def can_be_seen(self, frames: np.ndarray) -> np.ndarray:
        """Where query points of frames `(N,)` may be visible: `(N, T)` bool, by the scenes of the video."""
        scenes = one_scene(self.num_frames) if self.scenes is None else self.scenes
        return scenes.can_be_seen(frames)

    def _track_some(self, frame: np.ndarray, p1: Tensor, ids: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions `(N, T, 2)`, depths `(N, T)` and occlusion scores `(N, T)` of pixels `(N, 2)` of the frames `frame`
        `(N,)`, ascending, in frames `ids` `(T,)`. The canonical samples are the same for all of these frames."""
        model = self.model
        own, numbers = np.unique(frame, return_counts=True)
        samples = [model.source_samples(pixels[None], torch.tensor([t], device=self.device), self.use_max_loc)
                   for t, pixels in zip(own.tolist(), p1.split(numbers.tolist()), strict=True)]
        u, weights = (torch.cat(parts, dim=1) for parts in zip(*samples, strict=True))  # (1, N, K, 3), (1, N, K)
        is_own = torch.from_numpy(frame).to(self.device) == ids[:, None]  # (T, N)
        frames_at_a_time = max(self.chunk_size * model.config.num_samples_ray // (len(p1) * u.shape[2]), 1)
        positions, depths, scores = [], [], []
        for some, here in zip(ids.split(frames_at_a_time), is_own.split(frames_at_a_time), strict=True):
            p2, depth = model.target_position(u.expand(len(some), -1, -1, -1), weights, some)  # (B, N, 2), (B, N)
            p2 = torch.where(here[..., None], p1, p2)
            positions.append(p2)
            depths.append(depth)
            at_a_time = max(self.chunk_size // len(p1), 1)  # frames: here, all samples of the rays are computed
            for part in zip(*(x.split(at_a_time) for x in (p2, depth, some)), strict=True):
                scores.append(model.occlusion_score(*part))
        return tuple(torch.cat(parts).transpose(0, 1).cpu().numpy() for parts in (positions, depths, scores))

    @torch.no_grad()
    def correspond(self, pixels: np.ndarray, i: int, j: int) -> np.ndarray:
        """Positions `(N, 2)` in frame j of pixels `(N, 2)` of frame i."""
        ids = torch.tensor([i, j], device=self.device)
        pixels = torch.from_numpy(pixels).float()
        with self.model.bound():
            out = [self.model.correspond(p[None].to(self.device), ids[:1], ids[1:], self.use_max_loc)[0][0].cpu()
                   for p in pixels.split(self.chunk_size)]
        return torch.cat(out).numpy()
