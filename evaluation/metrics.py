"""The benchmark's metrics: TAP-Vid's, and OmniMotion's temporal coherence. NumPy, float64.

Notation
    M, T       query points, frames
    query      (t, y, x)
    counted    (M, T) frames of each query that its mode evaluates
    a scaled   distance is in pixels of the video resized to 256x256: x times 256 / W, y times 256 / H

Sources: TAP-Vid (Doersch et al., NeurIPS 2022, section 3 and its released evaluation code); OmniMotion (Wang et al.,
ICCV 2023, section 5).
"""

import numpy as np

from common.errors import UserError

THRESHOLDS = (1, 2, 4, 8, 16)  # scaled pixels
RESOLUTION = 256  # pixels, side of the frame in which distances are measured


def tapvid_metrics(query_points: np.ndarray, gt_occluded: np.ndarray, gt_tracks: np.ndarray,
                   pred_occluded: np.ndarray, pred_tracks: np.ndarray, query_mode: str, frame_size: tuple[int, int],
                   evaluated: np.ndarray | None = None) -> dict[str, float]:
    """Metrics of one video; the metrics of a benchmark are their plain means over its videos.

    query_points `(M, 3)`, occluded `(M, T)` bool, tracks `(M, T, 2)` pixels of frames of `frame_size` (H, W);
    `evaluated` `(M, T)` bool restricts the counted frames (sparse human annotation). query_mode 'first' counts the
    frames after the query, 'strided' all frames but the query's.

    Each ratio is of sums over all points of the video:
      occlusion_accuracy         share of the counted frames whose occlusion is predicted correctly
      pts_within_D               share of the counted, truly visible frames with a distance strictly below D, whether or
                                 not they are predicted to be visible
      jaccard_D                  true positives (visible in both, distance below D) / (truly visible + false positives),
                                 a false positive being predicted visible and either occluded or not within D
      average_*                  means over D = 1, 2, 4, 8, 16
      occluded_precision         share of the counted frames predicted occluded that are truly occluded (not TAP-Vid's)
      occluded_recall            share of the counted, truly occluded frames that are predicted occluded (not TAP-Vid's)
      temporal_coherence         see `temporal_coherence`
    Of the last three, those that are not defined are left out: nothing is predicted occluded, nothing is occluded, or
    no three frames in a row are counted. Means over videos are then over those where they are defined.

    UserError if the arrays do not fit each other, the mode is unknown, or no counted frame has a visible point (then
    no ratio is defined)."""
    _check_shapes(query_points, gt_occluded, gt_tracks, pred_occluded, pred_tracks, evaluated)
    counted = counted_frames(query_points, gt_occluded.shape[1], query_mode)
    if evaluated is not None:
        counted &= evaluated
    visible = ~gt_occluded & counted  # (M, T)
    pred_visible = ~pred_occluded & counted
    if not visible.any():
        raise UserError(f"nothing to score: no point is visible in a frame that the query mode '{query_mode}' counts")
    scale = _scale(frame_size)
    error = np.where(visible[..., None], np.asarray(pred_tracks, np.float64) - gt_tracks, 0) * scale  # (M, T, 2)
    square = (error ** 2).sum(axis=-1)
    out = {"occlusion_accuracy": (pred_occluded == gt_occluded)[counted].mean()}
    for name, among in (("occluded_precision", pred_occluded & counted), ("occluded_recall", gt_occluded & counted)):
        if among.any():
            out[name] = (pred_occluded & gt_occluded & counted).sum() / among.sum()
    for threshold in THRESHOLDS:
        correct = visible & (square < threshold ** 2)
        positives = (correct & pred_visible).sum()
        false_positives = (pred_visible & ~correct).sum()
        out[f"pts_within_{threshold}"] = correct.sum() / visible.sum()
        out[f"jaccard_{threshold}"] = positives / (visible.sum() + false_positives)
    out["average_jaccard"] = np.mean([out[f"jaccard_{threshold}"] for threshold in THRESHOLDS])
    out["average_pts_within_thresh"] = np.mean([out[f"pts_within_{threshold}"] for threshold in THRESHOLDS])
    coherence = temporal_coherence(query_points, gt_occluded, gt_tracks, pred_tracks, query_mode, frame_size, evaluated)
    if coherence is not None:
        out["temporal_coherence"] = coherence
    return {key: float(value) for key, value in out.items()}


def temporal_coherence(query_points: np.ndarray, gt_occluded: np.ndarray, gt_tracks: np.ndarray,
                       pred_tracks: np.ndarray, query_mode: str, frame_size: tuple[int, int],
                       evaluated: np.ndarray | None = None) -> float | None:
    """Mean distance between the predicted and the true acceleration, scaled pixels; 0 is best. Shapes as above.

    The acceleration at frame t is the difference of two adjacent flows, p(t+1) - 2 p(t) + p(t-1). It is taken where
    the true point is visible (and evaluated) in all three frames, and the mean is over all such triples of the video.
    The OmniMotion paper defines this metric in one sentence (acceleration as flow difference, visible points), and no
    code for it was released. This implementation adds: a point must be visible in the ground truth in all three frames;
    the units are those of TAP-Vid's thresholds; with 'first', triples start at the query's frame or later (its position
    is given, but the flows from it are predicted); with 'strided', all triples count, also those that contain the
    query's frame.

    None where there is no such triple, for instance with annotations of every fifth frame.
    UserError if the arrays do not fit each other or the mode is unknown."""
    _check_shapes(query_points, gt_occluded, gt_tracks, None, pred_tracks, evaluated)
    used = ~gt_occluded
    if evaluated is not None:
        used &= evaluated
    if query_mode == "first":
        used &= np.arange(used.shape[1]) >= _query_frames(query_points)[:, None]
    elif query_mode != "strided":
        raise UserError(f"no query mode '{query_mode}': choose first or strided")
    triples = used[:, :-2] & used[:, 1:-1] & used[:, 2:]  # (M, T - 2)
    if not triples.any():
        return None
    error = np.where(used[..., None], np.asarray(pred_tracks, np.float64) - gt_tracks, 0) * _scale(frame_size)
    acceleration = np.diff(error, n=2, axis=1)  # (M, T - 2, 2) difference of accelerations
    return float(np.linalg.norm(acceleration, axis=-1)[triples].mean())


def error_since_query(query_points: np.ndarray, gt_occluded: np.ndarray, gt_tracks: np.ndarray,
                      pred_tracks: np.ndarray, query_mode: str, frame_size: tuple[int, int],
                      evaluated: np.ndarray | None = None) -> dict[str, list]:
    """Tracking error by distance in frames from the query; arguments and errors as in `tapvid_metrics`.

    `frames` lists the distances, before or after the query, that have counted frames with a truly visible point. For
    each, `count` is the number of these positions, and `median` is their median error in scaled pixels."""
    _check_shapes(query_points, gt_occluded, gt_tracks, None, pred_tracks, evaluated)
    used = counted_frames(query_points, gt_occluded.shape[1], query_mode) & ~gt_occluded
    if evaluated is not None:
        used &= evaluated
    error = np.linalg.norm((np.asarray(pred_tracks, np.float64) - gt_tracks)[used] * _scale(frame_size), axis=-1)
    since = np.abs(np.arange(gt_occluded.shape[1]) - _query_frames(query_points)[:, None])[used]  # (n,)
    frames, counts = np.unique(since, return_counts=True)
    return {"frames": frames.tolist(), "count": counts.tolist(),
            "median": [float(np.median(error[since == t])) for t in frames]}


def counted_frames(query_points: np.ndarray, num_frames: int, query_mode: str) -> np.ndarray:
    """Frames `(M, T)` bool that count for each query: 'first', those after it; 'strided', all but it.

    UserError for an unknown mode or a query outside the clip."""
    frames = np.arange(num_frames)
    query_frames = _query_frames(query_points)[:, None]
    if ((query_frames < 0) | (query_frames >= num_frames)).any():
        raise UserError(f"a query is outside the {num_frames} frames of the clip: give queries of this clip")
    if query_mode == "first":
        return frames > query_frames
    if query_mode == "strided":
        return frames != query_frames
    raise UserError(f"no query mode '{query_mode}': choose first or strided")


def _query_frames(query_points: np.ndarray) -> np.ndarray:
    return np.round(query_points[:, 0]).astype(np.int64)


def _scale(frame_size: tuple[int, int]) -> np.ndarray:
    return np.array([RESOLUTION / frame_size[1], RESOLUTION / frame_size[0]])


def _check_shapes(query_points, gt_occluded, gt_tracks, pred_occluded, pred_tracks, evaluated) -> None:
    M, T = gt_occluded.shape
    wanted = {"query points": (query_points, (M, 3)), "true tracks": (gt_tracks, (M, T, 2)),
              "predicted tracks": (pred_tracks, (M, T, 2)), "predicted occlusion": (pred_occluded, (M, T)),
              "evaluated frames": (evaluated, (M, T))}
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise UserError(f"the {name} have the shape {array.shape}, {shape} is needed for {M} queries and {T} "
                            "frames: score tracks of the same queries and clip")
