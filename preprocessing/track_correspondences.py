"""Correspondences from point tracks, of CoTracker or of any tracker's files.

Notation
    N, T     tracks, frames
    i, j     frames; a track that is visible in both gives one correspondence, from the pixel nearest to it in frame i
             by its displacement. Long pairs come from the tracks directly and are not chained.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from loaders.correspondence_format import block_bytes
from loaders.correspondences import CorrespondenceStore, StoreWriter, finished_store, open_correspondences
from loaders.sequence import VideoSequence
from loaders.track_files import load_tracks
from preprocessing.flow import ModelOptions
from preprocessing.frame_cache import FrameCache
from preprocessing.pair_selection import Cost, check_disk, intervals, pairs_at
from preprocessing.pretrained import find_weights

log = logging.getLogger(__name__)
Tracks = tuple[np.ndarray, np.ndarray]  # (N, T, 2) float32 pixels and (N, T) bool visible
POINTS = 2_048  # query points that CoTracker follows at a time


@dataclass(frozen=True)
class TrackerOptions:
    """How CoTracker is asked: a grid of points in some frames, each followed through the whole video."""
    checkout: Path | None = None
    grid: int = 4      # pixels between query points
    every: int = 8     # frames between query frames; the last frame is always one


def build_from_files(sequence: VideoSequence, paths: list[Path], pairs: str = "all",
                     resume: bool = False) -> CorrespondenceStore:
    """A store from files of tracks. UserError if one does not fit the sequence, or as `build_store` has it."""
    def read() -> Iterable[Tracks]:
        for path in paths:
            tracks = load_tracks(path, len(sequence))
            if tracks.frame_size != sequence.size:
                raise UserError(f"{path}: its tracks are for frames of {tracks.frame_size[1]}x{tracks.frame_size[0]}, "
                                f"these are {sequence.size[1]}x{sequence.size[0]}: resize the frames or the tracks")
            yield tracks.tracks, tracks.visible

    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"no file {missing[0]}")
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths]
    return _build(sequence, lambda writer: read(), {"flow": "tracks", "tracks": hashes, "pairs": pairs}, resume)


def build_from_cotracker(sequence: VideoSequence, options: TrackerOptions, models: ModelOptions, pairs: str = "all",
                         resume: bool = False) -> CorrespondenceStore:
    """A store from CoTracker's tracks of query grids in several frames; its visibility is the validity."""
    from third_party.cotracker import ENTRY, CoTracker

    T = len(sequence)
    starts = sorted({*range(0, T, options.every), T - 1})

    def follow(writer: StoreWriter) -> Iterable[Tracks]:
        tracker, video = None, None

        def of_frame(t: int) -> Tracks:
            nonlocal tracker, video
            if tracker is None:  # not before it is needed: on resuming it may not be
                weights = find_weights(["scaled_offline.pth"], models.weights_dir, models.offline)
                tracker, video = CoTracker(weights, options.checkout, models.device), sequence.frames()
            queries = query_grid(t, sequence.size, options.grid)
            found = [tracker(video, queries[k: k + POINTS]) for k in range(0, len(queries), POINTS)]
            return tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True))

        kept = FrameCache(of_frame, 1 << 30, writer.scratch("tracks"))
        with tqdm(starts, desc="tracks") as bar:
            return [kept[t] for t in bar]

    settings = {"flow": "cotracker", "flow_weights": ENTRY, "grid": options.grid, "query_frames": starts,
                "pairs": pairs}
    return _build(sequence, follow, settings, resume)


def query_grid(t: int, size: tuple[int, int], step: int) -> np.ndarray:
    """Query points `(N, 3)` = (t, y, x) on every `step`-th pixel of frame t, the grid in the frame's middle."""
    y, x = (np.arange((n - 1) % step // 2, n, step, dtype=np.float32) for n in size)
    y, x = (a.ravel() for a in np.meshgrid(y, x, indexing="ij"))
    return np.stack([np.full_like(y, t), y, x], axis=-1)


def correspondences(tracks: np.ndarray, visible: np.ndarray, i: int, j: int,
                    size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Tracks `(N, T, 2)`, `(N, T)` as the flow from frame i to j `(H, W, 2)` and where there is one `(H, W)` bool.

    Of several tracks at one pixel the one nearest to its center counts; the first, if they are equally near."""
    H, W = size
    pixel = np.rint(tracks[:, i]).astype(np.int64)  # (N, 2)
    rows = np.flatnonzero(visible[:, i] & visible[:, j] & (pixel >= 0).all(-1) & (pixel < (W, H)).all(-1))
    off_center = np.abs(tracks[rows, i] - pixel[rows]).sum(-1)
    rows = rows[np.argsort(off_center, kind="stable")]
    flat, first = np.unique(pixel[rows, 1] * W + pixel[rows, 0], return_index=True)
    flow, valid = np.zeros((H * W, 2), np.float32), np.zeros(H * W, bool)
    flow[flat] = tracks[rows[first], j] - tracks[rows[first], i]
    valid[flat] = True
    return flow.reshape(H, W, 2), valid.reshape(H, W)


def _build(sequence: VideoSequence, source: Callable[[StoreWriter], Iterable[Tracks]], settings: dict,
           resume: bool) -> CorrespondenceStore:
    if finished := finished_store(sequence, settings):
        return finished
    T, size = len(sequence), sequence.size
    chosen = intervals(settings["pairs"], T)
    writer = StoreWriter(sequence, settings, resume)
    tracks, visible = (np.concatenate(arrays) for arrays in zip(*source(writer), strict=True))  # (N, T, 2), (N, T)
    pairs = [pair for d in chosen for i, j in pairs_at(d, T) for pair in ((i, j), (j, i))]
    most = min(int(visible.sum(0).max()), size[0] * size[1])
    if not (visible.sum(1) > 1).any():
        raise UserError("no track is visible in two frames, so there is no correspondence: give other tracks")
    left = [pair for pair in pairs if not writer.has(*pair)]
    disk = len(pairs) * block_bytes(most, size)
    cost = Cost(len(pairs), len(pairs) - len(left), 0, disk, disk)
    log.info("%d tracks; %d ordered pairs of frames, at most %.0f MiB", len(tracks), len(pairs), disk / 2**20)
    check_disk(cost, writer.root, writer.used_bytes())
    nothing = np.zeros(size, bool)
    for i, j in tqdm(left, desc="pairs"):
        flow, valid = correspondences(tracks, visible, i, j, size)
        writer.write(i, j, flow, valid, nothing, every_pixel=False)
    writer.finish()
    return open_correspondences(sequence)
