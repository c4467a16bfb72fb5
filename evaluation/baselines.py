"""Baselines without a model: points that do not move, and points that follow optical flow.

Notation
    M, T   query points, frames
    query  (t, y, x)
    fb     forward-backward error: distance of a point from itself after one step forward and back, pixels
"""

from collections.abc import Callable

import numpy as np

from common.geometry import inside, sample
from inference.multi_interval_flow import follow_intervals
from loaders.correspondences import MAX_FB, check_adjacent_flow
from loaders.scenes import Scenes
from loaders.sequence import VideoSequence
from loaders.track_files import PointTracks
from preprocessing.flow import FlowModel, flow_between
from preprocessing.scenes import find_scenes


def static_tracks(query_points: np.ndarray, num_frames: int, size: tuple[int, int]) -> PointTracks:
    """Query points `(M, 3)` that stay where they are, visible in all frames."""
    tracks = np.repeat(query_points[:, None, :0:-1], num_frames, axis=1).astype(np.float32)  # (M, T, 2)
    return PointTracks(tracks, np.ones(tracks.shape[:2], bool), query_points, size)


def chained_flow_tracks(query_points: np.ndarray, store, scenes: Scenes | None = None) -> PointTracks:
    """Query points `(M, 3)` moved along the flow between adjacent frames, forward and backward from their frame.

    store: a CorrespondenceStore. scenes: of the video; a point is visible in its own scene only. UserError unless the
    store has the flow of every pixel of adjacent frames.
    Once fb exceeds MAX_FB, a point counts as occluded in all later frames of the chain, since the chain may then follow
    the occluder; its position is still chained. A point outside the frame is occluded only while it is outside.
    Of the variants with MAX_FB of 1 or 3 px, with or without recovery after a large fb, and with or without keeping the
    last position before it, this one has the best average_jaccard on the synthetic scenes and on a real clip."""
    check_adjacent_flow(store)
    M, T = len(query_points), store.num_frames
    start = np.round(query_points[:, 0]).astype(np.int64)
    tracks = np.repeat(query_points[:, None, :0:-1], T, axis=1).astype(np.float32)  # (M, T, 2)
    lost = np.zeros((M, T), bool)
    for step, frames in ((1, range(T - 1)), (-1, range(T - 1, 0, -1))):
        for a in frames:
            b = a + step
            rows = np.flatnonzero(start <= a if step > 0 else start >= a)
            move = sample(store.dense(a, b).flow, tracks[rows, a])
            tracks[rows, b] = tracks[rows, a] + move
            fb = np.linalg.norm(move + sample(store.dense(b, a).flow, tracks[rows, b]), axis=-1)
            lost[rows, b] = lost[rows, a] | (fb > MAX_FB)
    visible = ~lost & inside(tracks, store.size)
    if scenes is not None:
        visible &= scenes.can_be_seen(start)
    return PointTracks(tracks, visible, query_points, store.size)


def multi_interval_flow_tracks(query_points: np.ndarray, sequence: VideoSequence, model: FlowModel,
                               frame: Callable[[int], np.ndarray]) -> PointTracks:
    """Query points `(M, 3)` that follow optical flow over 1, 2, 4, ... frames and from their query frame; of all paths
    to a frame, the one with the smallest forward-backward error counts (inference/multi_interval_flow.py).

    frame: t -> image `(H', W', 3)` uint8 RGB from which flow is computed
    Computes about 2 log2(T) flows per frame; needs no correspondences."""
    def step(a: int, b: int, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        there, back = flow_between(model, frame(a), frame(b), abs(a - b) == 1, sequence.size)
        move = sample(there, points)
        end = points + move
        return end, ((move + sample(back, end)) ** 2).sum(axis=-1)

    paths = follow_intervals(query_points, len(sequence), sequence.size, step)
    scenes = find_scenes(sequence.frame(t) for t in range(len(sequence)))
    start = np.round(query_points[:, 0]).astype(np.int64)
    visible = paths.visible & scenes.can_be_seen(start)
    return PointTracks(paths.tracks, visible, query_points, sequence.size)
