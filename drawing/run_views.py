"""Lazily computed, cached results of a trained run: what viz.py draws.

Notation
    T, H, W, N  frames, height, width, drawn points
    grid        every `interval`-th pixel of a frame, (h, w); dense results are computed on it and enlarged for drawing
"""

import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from drawing.segment import foreground_tracks
from drawing.tracks import grid_shape, grid_spacing, point_grid
from drawing.trails import background_step
from inference import dense
from inference.load_run import load_run
from inference.tracker import Tracks
from loaders.error_map import ErrorMap
from loaders.images import read_mask

log = logging.getLogger("viz")


class Views:
    """Lazily computed, cached results of a run. UserError if an option names a frame or mask that does not exist."""

    def __init__(self, options: Namespace):
        self.options = options
        self.run = load_run(options)
        self.dir = self.run.dir
        self.sequence = self.run.sequence
        self.tracker = self.run.tracker
        self.size = self.sequence.size  # (H, W)
        self.T = len(self.sequence)
        self.query_frame = options.query_frame_id
        self._rendered = {}  # frame -> (colors, depths)
        self._flows = {}     # frame -> flow to the next frame
        if not 0 <= options.query_frame_id < self.T:
            raise UserError(f"--query_frame_id {options.query_frame_id}: the sequence has frames 0 to {self.T - 1}")

    @cached_property
    def frames(self) -> np.ndarray:
        """`(T, H, W, 3)` uint8."""
        return self.sequence.frames()

    @cached_property
    def mask(self) -> np.ndarray | None:
        """Foreground `(H, W)` bool of the query frame, of --foreground_mask_path or the sequence's masks, else None."""
        options = self.options
        if options.foreground_mask_path:
            return read_mask(Path(options.foreground_mask_path), self.size, options.max_pixels, options.mask_label)
        return self.sequence.mask(self.query_frame, options.mask_label)

    @cached_property
    def points(self) -> np.ndarray:
        """The drawn points `(N, 2)` of the query frame: a regular grid, or its part inside the mask."""
        return self.grid(self.spacing)

    def grid(self, interval: int) -> np.ndarray:
        """As `points`, `interval` pixels apart. UserError if no point lies in the foreground."""
        points = point_grid(self.size, interval)
        options = self.options
        if not (options.use_mask or options.foreground_mask_path):
            return points
        if self.mask is None:
            raise UserError(f"--use_mask: {self.sequence.root / 'mask'} has no masks; give --foreground_mask_path")
        if not self.mask.any():
            folder = self.sequence.root / "mask"
            where = options.foreground_mask_path or f"the mask of frame {self.query_frame} in {folder}"
            raise UserError(f"{where} has no object: give another mask with --foreground_mask_path")
        inside = _at(self.mask, points)
        if not inside.any():
            raise UserError(f"the foreground of frame {options.query_frame_id} has no point of the grid: try a smaller "
                            "--grid_interval")
        return points[inside]

    @property
    def spacing(self) -> int:
        """Pixels between the points of the drawn grid."""
        return self.options.grid_interval or grid_spacing(self.size)

    @cached_property
    def tracks(self) -> Tracks:
        """Tracks of `points` through all frames."""
        return self.track(self.query_frame, self.points)

    def track(self, t: int | np.ndarray, points: np.ndarray, frames: Sequence[int] | None = None) -> Tracks:
        """Tracks of points `(N, 2)` of frame t, or of frames `(N,)`, through all frames, or through `frames`."""
        queries = np.column_stack([np.broadcast_to(t, len(points)), points[:, ::-1]]).astype(np.float32)  # (N, 3)
        return self.tracker.track(queries, frames)

    @cached_property
    def scene(self) -> tuple[Tracks, np.ndarray]:
        """Tracks of a coarse grid over the whole query frame, and which of them are foreground `(M,)` bool.

        The foreground is that of the mask; without a mask, the tracks that do not move with the background."""
        points = point_grid(self.size)
        same = np.array_equal(points, self.points)
        found = self.tracks if same else self.track(self.query_frame, points)
        if self.mask is not None:
            return found, _at(self.mask, points)
        moving = foreground_tracks(found.tracks, found.visible, self.size, self.options.seed)
        log.info("no mask: %d of %d tracks do not move with the background and count as foreground", moving.sum(),
                 len(moving))
        return found, moving

    @cached_property
    def foreground(self) -> np.ndarray:
        """Which of `points` are foreground `(N,)`."""
        if self.mask is not None:
            return _at(self.mask, self.points)
        moving = self.scene[1].reshape(grid_shape(self.size)).astype(np.float32)
        return _at(cv2.resize(moving, self.size[::-1]) > 0.5, self.points)

    @cached_property
    def background_steps(self) -> np.ndarray:
        """Homographies `(T - 1, 3, 3)` of the background's motion from each frame to the next."""
        points = point_grid(self.size)
        found, moving = self.scene
        out = []
        for t in range(self.T - 1):
            nearest = np.array([((found.tracks[:, t] - p) ** 2).sum(-1).argmin() for p in points])
            still = points[~moving[nearest]]
            out.append(background_step(still, self.tracker.correspond(still, t, t + 1) if len(still) else still))
        return np.array(out)

    @cached_property
    def interval(self) -> int:
        """Pixels between columns and rows of the grid of dense results."""
        if self.options.dense_interval:
            return self.options.dense_interval
        interval = dense.grid_interval(self.tracker)
        if interval > 1:
            log.info("on the CPU, dense results are %d pixels apart (--dense_interval 1: every pixel)", interval)
        return interval

    def renderings(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Rendered colors `(T', h, w, 3)` in [0, 1] and depths `(T', h, w)` of frames `ids`, float16."""
        pairs = self._each(self._rendered, "rendering", ids,
                           lambda t: dense.colors_and_depths(self.tracker, t, self.interval))
        return tuple(np.stack(arrays).astype(np.float16) for arrays in zip(*pairs, strict=True))

    def flows(self, ids: Sequence[int]) -> np.ndarray:
        """Flow from each frame of `ids` to the next frame of the video `(T', h, w, 2)` in pixels."""
        return np.stack(self._each(self._flows, "flow", ids,
                                   lambda t: dense.coarse_flow(self.tracker, t, t + 1, self.interval)))

    @cached_property
    def errors(self) -> np.ndarray | None:
        """The accumulated error map `(T, h', w')` in pixels; None if the checkpoint has none."""
        state = self.run.checkpoint.error_map
        if state is None or not state["counts"].any():
            return None
        cell = int(self.run.checkpoint.options["error_map_cell"])
        error_map = ErrorMap(self.T, self.size, cell)
        error_map.load_state_dict(state)
        return error_map.mean().numpy()

    def canonical_cloud(self, frames: int = 6, points: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
        """About `points` canonical surface points `(N, 3)` seen in `frames` frames, and their colors `(N, 3)` uint8."""
        ids = np.unique(np.linspace(0, self.T - 1, frames).astype(int))
        interval = max(1, round((self.size[0] * self.size[1] * len(ids) / points) ** 0.5))
        pixels, _ = dense.grid_pixels(self.size, interval)
        found = [dense.canonical_points(self.tracker, int(t), pixels) for t in tqdm(ids, "canonical points")]
        return np.concatenate(found), np.concatenate([_at(self.frames[t], pixels) for t in ids])

    @property
    def target_frame(self) -> int:
        """The second frame of a pair: --target_frame_id, else half the video away from the query frame."""
        t = self.options.target_frame_id
        if t < 0:
            return (self.query_frame + self.T // 2) % self.T
        if t >= self.T:
            raise UserError(f"--target_frame_id {t}: the sequence has frames 0 to {self.T - 1}")
        return t

    def _each(self, known: dict, name: str, ids: Sequence[int], compute: Callable[[int], Any]) -> list:
        """`compute(t)` for each frame of `ids`; results are cached in `known`."""
        missing = [t for t in ids if t not in known]
        with torch.no_grad(), self.tracker.model.bound():
            for t in tqdm(missing, name, disable=not missing):
                known[t] = compute(t)
        return [known[t] for t in ids]


def _at(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Values of an image `(H, W, ...)` at points `(N, 2)`, rounded down to whole pixels."""
    x, y = points.astype(int).T
    return image[y, x]
