"""Correspondences from point tracks: CoTracker's, or files of any tracker.

Notation
    N, T     number of tracks and of frames
    i, j     source and target frame

A track that is visible in both frames gives one correspondence: the pixel nearest to it in frame i, and its
displacement from i to j. Correspondences of distant frames come from the tracks directly; nothing is chained.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from loaders.clip_files import default_size, points_of_clip
from loaders.correspondence_format import block_bytes
from loaders.correspondences import CorrespondenceStore, open_correspondences
from loaders.images import size_text
from loaders.predicted_tracks import read_tracks
from loaders.sequence import VideoSequence
from loaders.source_frames import source_of
from preprocessing.correspondence_writer import StoreWriter, finished_store
from preprocessing.flow import ModelOptions
from preprocessing.frame_cache import FrameCache
from preprocessing.pair_selection import check_disk, intervals, ordered_pairs
from preprocessing.pretrained import find_weights
from preprocessing.scenes import scenes_of

log = logging.getLogger(__name__)
Tracks = tuple[np.ndarray, np.ndarray]  # (N, T, 2) float32 pixels and (N, T) bool visible
POINTS = 2_048   # query points that CoTracker tracks per call
MEMORY = 1 << 30  # bytes of tracks to keep in memory while CoTracker runs


@dataclass(frozen=True)
class TrackerOptions:
    """Settings of CoTracker. It tracks a grid of points of each query frame through the whole video."""
    checkout: Path | None = None  # local checkout of its repository; None: GitHub
    grid: int = 4                 # pixels between query points
    every: int = 8                # frames between query frames; the last frame is always a query frame


def build_from_files(sequence: VideoSequence, paths: list[Path], pairs: str = "all", resume: bool = False,
                     visible_th: float = 0.5, find_scenes: bool = True,
                     coordinates: str = "source") -> CorrespondenceStore:
    """Make a store from files of tracks (formats: loaders/predicted_tracks.py), or open it if it is finished.

    visible_th: probability above which a point is visible. coordinates: "source" or "frames", in whose pixels files
    without a frame size are. pairs, resume, find_scenes: as in preprocessing.pipeline.build_store and Method.
    UserError if a file does not fit the sequence, if there is a store of other frames or settings, or if the disk is
    too small."""
    clip = source_of(sequence)

    def read() -> Iterable[Tracks]:
        for path in paths:
            tracks = read_tracks(path, len(sequence), visible_th=visible_th, hidden=False)
            size = tracks.frame_size or default_size(clip, coordinates)
            if tracks.frame_size is None and clip.size != clip.source_size:
                log.info("%s has no frame size: its tracks are read in pixels of the %s, %s", path, coordinates,
                         size_text(size))
            yield points_of_clip(tracks.tracks, size, path, clip), tracks.visible

    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"no file {missing[0]}")
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths]
    settings = {"flow": "tracks", "tracks": hashes, "pairs": pairs}
    if visible_th != 0.5:  # left out, as in stores from before this option
        settings["visible_th"] = visible_th
    if coordinates != "source" and clip.known:
        settings["coordinates"] = coordinates
    return _build(sequence, lambda writer: read(), settings, resume, find_scenes)


def build_from_cotracker(sequence: VideoSequence, options: TrackerOptions, models: ModelOptions, pairs: str = "all",
                         resume: bool = False, find_scenes: bool = True) -> CorrespondenceStore:
    """Make a store from CoTracker's tracks, or open it if it is finished. Correspondences are valid where CoTracker
    predicts that the point is visible in both frames.

    Arguments and errors as in `build_from_files`; UserError also if CoTracker cannot be loaded."""
    from third_party.cotracker import ENTRY, CoTracker

    T = len(sequence)
    starts = sorted({*range(0, T, options.every), T - 1})

    @cache  # loaded on first use: a resumed run may not need it
    def tracker_and_video() -> tuple[CoTracker, np.ndarray]:
        weights = find_weights(["scaled_offline.pth"], models.weights_dir, models.offline)
        return CoTracker(weights, options.checkout, models.device), sequence.frames()

    def track(t: int) -> Tracks:
        """The tracks of the query points of frame t."""
        queries = query_grid(t, sequence.size, options.grid)
        tracker, video = tracker_and_video()
        results = [tracker(video, queries[k: k + POINTS]) for k in range(0, len(queries), POINTS)]
        return tuple(np.concatenate(arrays) for arrays in zip(*results, strict=True))

    def read(writer: StoreWriter) -> Iterable[Tracks]:
        tracks = FrameCache(track, MEMORY, writer.scratch("tracks"))  # files that a resumed run reads again
        return [tracks[t] for t in tqdm(starts, desc="tracks")]

    settings = {"flow": "cotracker", "flow_weights": ENTRY, "grid": options.grid, "query_frames": starts,
                "pairs": pairs}
    return _build(sequence, read, settings, resume, find_scenes)


def query_grid(t: int, size: tuple[int, int], step: int) -> np.ndarray:
    """Query points `(N, 3)` = (t, y, x) on every `step`-th pixel of frame t; the grid is centered in the frame."""
    y, x = (np.arange((n - 1) % step // 2, n, step, dtype=np.float32) for n in size)
    y, x = (a.ravel() for a in np.meshgrid(y, x, indexing="ij"))
    return np.stack([np.full_like(y, t), y, x], axis=-1)


def correspondences(tracks: np.ndarray, visible: np.ndarray, i: int, j: int,
                    size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Flow from frame i to j `(H, W, 2)`, and where it is valid `(H, W)` bool, from tracks `(N, T, 2)`, `(N, T)`.

    If several tracks are at one pixel, the one nearest to its center is used; among equally near ones the first."""
    H, W = size
    pixel = np.rint(tracks[:, i]).astype(np.int64)  # (N, 2)
    rows = np.flatnonzero(visible[:, i] & visible[:, j] & (pixel >= 0).all(-1) & (pixel < (W, H)).all(-1))
    off_center = np.abs(tracks[rows, i] - pixel[rows]).sum(-1)
    rows = rows[np.argsort(off_center, kind="stable")]
    flat, first = np.unique(pixel[rows, 1] * W + pixel[rows, 0], return_index=True)
    flow = np.zeros((H * W, 2), np.float32)
    valid = np.zeros(H * W, bool)
    flow[flat] = tracks[rows[first], j] - tracks[rows[first], i]
    valid[flat] = True
    return flow.reshape(H, W, 2), valid.reshape(H, W)


def _build(sequence: VideoSequence, source: Callable[[StoreWriter], Iterable[Tracks]], settings: dict,
           resume: bool, find_scenes: bool) -> CorrespondenceStore:
    """Make a store from the tracks that `source` returns. settings: written to meta.json."""
    size = sequence.size
    if not find_scenes:
        settings = settings | {"find_scenes": False}
    chosen = intervals(settings["pairs"], len(sequence))
    if finished := finished_store(sequence, settings, chosen):
        return finished
    writer = StoreWriter(sequence, settings, resume, partial(scenes_of, sequence, find_scenes))
    tracks, visible = (np.concatenate(arrays) for arrays in zip(*source(writer), strict=True))  # (N, T, 2), (N, T)
    pairs = ordered_pairs(chosen, writer.scenes)
    most = min(int(visible.sum(0).max()), size[0] * size[1])
    if not (visible.sum(1) > 1).any():
        raise UserError("no track is visible in two frames, so there is no correspondence: give other tracks")
    left = [pair for pair in pairs if not writer.has(*pair)]
    disk = len(pairs) * block_bytes(most, size)
    log.info("%d tracks; %d ordered pairs of frames, at most %.0f MiB", len(tracks), len(pairs), disk / 2**20)
    check_disk(disk, writer.root, writer.used_bytes())
    no_occlusion = np.zeros(size, bool)
    for i, j in tqdm(left, desc="pairs"):
        flow, valid = correspondences(tracks, visible, i, j, size)
        valid &= writer.scenes.same(i, j)
        writer.write(i, j, flow, valid, no_occlusion, every_pixel=False)
    writer.finish(pairs)
    return open_correspondences(sequence)
