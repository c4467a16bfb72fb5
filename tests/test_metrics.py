"""Metrics against TAP-Vid's definitions: by hand, by properties, and by a slow count of every entry."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from evaluation.metrics import THRESHOLDS, counted_frames, error_since_query, tapvid_metrics, temporal_coherence

SIZE = (256, 256)


def clip(seed, M=6, T=7, noise=4.0):
    """Random queries, truth and prediction; every query is visible at its frame."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, T - 1, M)
    tracks = rng.uniform(0, 255, (M, T, 2)).astype(np.float32)
    occluded = rng.random((M, T)) < 0.3
    occluded[np.arange(M), frames] = False
    occluded[0, -1] = False
    points = tracks[np.arange(M), frames]
    queries = np.stack([frames, points[:, 1], points[:, 0]], -1).astype(np.float32)
    predicted = (tracks + rng.normal(0, noise, tracks.shape)).astype(np.float32)
    return queries, occluded, tracks, rng.random((M, T)) < 0.3, predicted


def slow(queries, occluded, tracks, pred_occluded, predicted, mode, evaluated=None):
    """The definitions, entry by entry, for 256x256 frames."""
    M, T = occluded.shape
    agree = total = visible = said_hidden = hidden = both = 0
    within, hits, false = ({d: 0 for d in THRESHOLDS} for _ in range(3))
    for n in range(M):
        for t in range(T):
            query = int(queries[n, 0])
            if (t <= query if mode == "first" else t == query) or (evaluated is not None and not evaluated[n, t]):
                continue
            total += 1
            agree += bool(occluded[n, t]) == bool(pred_occluded[n, t])
            visible += not occluded[n, t]
            said_hidden += pred_occluded[n, t]
            hidden += occluded[n, t]
            both += pred_occluded[n, t] and occluded[n, t]
            error = np.hypot(*(predicted[n, t].astype(float) - tracks[n, t]))
            for d in THRESHOLDS:
                good = error < d and not occluded[n, t]
                within[d] += good
                hits[d] += good and not pred_occluded[n, t]
                false[d] += not good and not pred_occluded[n, t]
    out = {"occlusion_accuracy": agree / total}
    if said_hidden:
        out["occluded_precision"] = both / said_hidden
    if hidden:
        out["occluded_recall"] = both / hidden
    for d in THRESHOLDS:
        out[f"pts_within_{d}"] = within[d] / visible
        out[f"jaccard_{d}"] = hits[d] / (visible + false[d])
    out["average_jaccard"] = sum(out[f"jaccard_{d}"] for d in THRESHOLDS) / 5
    out["average_pts_within_thresh"] = sum(out[f"pts_within_{d}"] for d in THRESHOLDS) / 5
    return out


def test_by_hand():
    """One point queried at frame 1 of 4. Truth: visible, visible, visible, occluded. Predicted: 3 px off and visible;
    the query; 1.5 px off and visible; visible."""
    queries = np.array([[1, 10, 20]], np.float32)
    tracks = np.array([[[20, 10], [20, 10], [20, 10], [20, 10]]], np.float32)
    predicted = tracks + np.array([[[3, 0], [0, 0], [0, 1.5], [0, 0]]], np.float32)
    occluded = np.array([[False, False, False, True]])
    nowhere = np.zeros((1, 4), bool)

    first = tapvid_metrics(queries, occluded, tracks, nowhere, predicted, "first", SIZE)  # frames 2 and 3
    assert first["occlusion_accuracy"] == 0.5
    assert [first[f"pts_within_{d}"] for d in THRESHOLDS] == [0, 1, 1, 1, 1]
    assert first["average_pts_within_thresh"] == pytest.approx(0.8)
    # 1 truly visible; false positives: the occluded frame, and at 1 px also the other
    assert [first[f"jaccard_{d}"] for d in THRESHOLDS] == [0, 0.5, 0.5, 0.5, 0.5]
    assert first["average_jaccard"] == pytest.approx(0.4)

    strided = tapvid_metrics(queries, occluded, tracks, nowhere, predicted, "strided", SIZE)  # frames 0, 2 and 3
    assert strided["occlusion_accuracy"] == pytest.approx(2 / 3)
    assert [strided[f"pts_within_{d}"] for d in THRESHOLDS] == [0, 0.5, 1, 1, 1]
    assert [strided[f"jaccard_{d}"] for d in THRESHOLDS] == pytest.approx([0, 1 / 4, 2 / 3, 2 / 3, 2 / 3])
    assert strided["average_jaccard"] == pytest.approx((1 / 4 + 2) / 5)


def test_predicted_occlusion_costs_jaccard_but_not_position():
    queries = np.array([[0, 5, 5]], np.float32)
    tracks = np.full((1, 3, 2), 5, np.float32)
    visible = np.zeros((1, 3), bool)
    out = tapvid_metrics(queries, visible, tracks, np.array([[False, True, False]]), tracks, "first", SIZE)
    assert out["average_pts_within_thresh"] == 1 and out["average_jaccard"] == 0.5 and out["occlusion_accuracy"] == 0.5


@pytest.mark.parametrize("mode", ["first", "strided"])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_slow_count(mode, seed):
    arguments = clip(seed, M=15, T=9)
    fast = tapvid_metrics(*arguments, mode, SIZE)
    fast.pop("temporal_coherence", None)
    assert fast == pytest.approx(slow(*arguments, mode))
    evaluated = np.random.default_rng(seed).random((15, 9)) < 0.5
    sparse = tapvid_metrics(*arguments, mode, SIZE, evaluated)
    sparse.pop("temporal_coherence", None)
    assert sparse == pytest.approx(slow(*arguments, mode, evaluated))


@pytest.mark.parametrize("mode", ["first", "strided"])
def test_perfect_is_one(mode):
    queries, occluded, tracks, _, _ = clip(0)
    out = tapvid_metrics(queries, occluded, tracks, occluded, tracks, mode, (480, 854))
    assert out.pop("temporal_coherence") == 0
    assert set(out.values()) == {1.0} and len(out) == 15


@pytest.mark.parametrize("mode", ["first", "strided"])
def test_predicted_occluded_everywhere(mode):
    queries, occluded, tracks, _, _ = clip(1)
    out = tapvid_metrics(queries, occluded, tracks, np.ones_like(occluded), tracks, mode, SIZE)
    counted = counted_frames(queries, occluded.shape[1], mode)
    assert out["average_jaccard"] == 0 and out["average_pts_within_thresh"] == 1
    assert out["occlusion_accuracy"] == pytest.approx(occluded[counted].mean())


def test_precision_and_recall_of_occluded_by_hand():
    """Frames after the query of one point: truly occluded in 1, 2, 3; predicted in 2, 3, 4, 5; frame 3 not evaluated.
    What does not exist is left out."""
    queries, tracks = np.array([[0, 5, 5]], np.float32), np.full((1, 7, 2), 5, np.float32)
    truth, predicted, evaluated = (np.array([[k in frames for k in range(7)]]) for frames in (
        (1, 2, 3), (2, 3, 4, 5), (0, 1, 2, 4, 5, 6)))
    out = tapvid_metrics(queries, truth, tracks, predicted, tracks, "first", SIZE)
    assert out["occluded_precision"] == 2 / 4 and out["occluded_recall"] == 2 / 3
    out = tapvid_metrics(queries, truth, tracks, predicted, tracks, "first", SIZE, evaluated)
    assert out["occluded_precision"] == 1 / 3 and out["occluded_recall"] == 1 / 2
    nowhere = np.zeros_like(truth)
    out = tapvid_metrics(queries, truth, tracks, nowhere, tracks, "first", SIZE)
    assert "occluded_precision" not in out and out["occluded_recall"] == 0
    out = tapvid_metrics(queries, nowhere, tracks, predicted, tracks, "first", SIZE)
    assert "occluded_recall" not in out and out["occluded_precision"] == 0


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_exactly_at_a_threshold_is_outside(threshold):
    queries, tracks = np.array([[0, 8, 8]], np.float32), np.full((1, 2, 2), 8, np.float32)
    nowhere = np.zeros((1, 2), bool)
    at = tapvid_metrics(queries, nowhere, tracks, nowhere, tracks + np.float32([threshold, 0]), "first", SIZE)
    assert at[f"pts_within_{threshold}"] == 0 and at[f"jaccard_{threshold}"] == 0
    inside = tracks + np.float32([0, np.nextafter(np.float32(threshold), 0) - 1e-5])
    assert tapvid_metrics(queries, nowhere, tracks, nowhere, inside, "first", SIZE)[f"pts_within_{threshold}"] == 1


def test_errors_are_scaled_by_each_side():
    """In frames of 512 columns and 128 rows an error of 3 px counts 1.5 along x and 6 along y."""
    queries, tracks = np.array([[0, 50, 50]], np.float32), np.full((1, 2, 2), 50, np.float32)
    nowhere = np.zeros((1, 2), bool)
    for offset, passed in (((3, 0), [0, 1, 1, 1, 1]), ((0, 3), [0, 0, 0, 1, 1])):
        out = tapvid_metrics(queries, nowhere, tracks, nowhere, tracks + np.float32(offset), "first", (128, 512))
        assert [out[f"pts_within_{d}"] for d in THRESHOLDS] == passed


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10 ** 6), st.sampled_from(["first", "strided"]), st.integers(1, 8), st.integers(3, 9),
       st.floats(0, 30))
def test_bounds_and_order_of_the_points(seed, mode, M, T, noise):
    arguments = clip(seed, M, T, noise)
    out = tapvid_metrics(*arguments, mode, (200, 300))
    coherence = out.pop("temporal_coherence", 0.0)
    assert coherence >= 0 and all(0 <= value <= 1 for value in out.values())
    within = [out[f"pts_within_{d}"] for d in THRESHOLDS]
    jaccard = [out[f"jaccard_{d}"] for d in THRESHOLDS]
    assert within == sorted(within) and jaccard == sorted(jaccard)
    assert all(j <= w for j, w in zip(jaccard, within, strict=True))
    order = np.random.default_rng(seed).permutation(M)
    shuffled = tapvid_metrics(*(a[order] for a in arguments), mode, (200, 300))
    assert shuffled.pop("temporal_coherence", 0.0) == pytest.approx(coherence)
    assert shuffled == out


def test_unknown_positions_do_not_matter():
    queries, occluded, tracks, pred_occluded, predicted = clip(4)
    unknown = np.where(occluded[..., None], np.nan, tracks)
    a = tapvid_metrics(queries, occluded, tracks, pred_occluded, predicted, "strided", SIZE)
    assert tapvid_metrics(queries, occluded, unknown, pred_occluded, predicted, "strided", SIZE) == a


def test_temporal_coherence_by_hand():
    """A point that should stand still and jumps by 4 px in frame 2: accelerations 4, -8 and 4 px around it."""
    queries, tracks = np.array([[1, 0, 0]], np.float32), np.zeros((1, 6, 2), np.float32)
    predicted = tracks.copy()
    predicted[0, 2, 0] = 4
    visible = np.zeros((1, 6), bool)
    whole = temporal_coherence(queries, visible, tracks, predicted, "strided", SIZE)
    assert whole == pytest.approx((4 + 8 + 4 + 0) / 4)
    assert temporal_coherence(queries, visible, tracks, predicted, "first", SIZE) == pytest.approx((8 + 4 + 0) / 3)
    assert temporal_coherence(queries, visible, tracks, predicted, "strided", (256, 512)) == pytest.approx(whole / 2)
    hidden = np.array([[False, False, False, False, True, False]])  # leaves the triples around frames 1 and 2
    assert temporal_coherence(queries, hidden, tracks, predicted, "strided", SIZE) == pytest.approx((4 + 8) / 2)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10 ** 6))
def test_temporal_coherence_ignores_drift_at_even_speed(seed):
    queries, _, tracks, _, _ = clip(seed, M=3, T=5)
    drift = tracks + np.random.default_rng(seed).normal(size=(3, 1, 2)) * np.arange(5)[None, :, None] + 2
    visible = np.zeros((3, 5), bool)
    assert temporal_coherence(queries, visible, tracks, drift, "strided", SIZE) == pytest.approx(0, abs=1e-9)


def test_temporal_coherence_needs_three_frames_in_a_row():
    queries, occluded, tracks, _, _ = clip(0, T=9)
    sparse = np.zeros_like(occluded)
    sparse[:, ::3] = True
    assert temporal_coherence(queries, occluded, tracks, tracks, "strided", SIZE, sparse) is None
    assert "temporal_coherence" not in tapvid_metrics(queries, occluded & ~sparse, tracks, occluded, tracks, "strided",
                                                      SIZE, sparse)


def test_error_since_the_query_by_hand():
    """Two points queried at frames 1 and 2 of 5, off by 4 px and by 1 px a frame; the second is hidden in frame 0."""
    queries, tracks = np.array([[1, 0, 0], [2, 0, 0]], np.float32), np.zeros((2, 5, 2), np.float32)
    predicted = tracks.copy()
    predicted[0, :, 0] = 4
    predicted[1, :, 1] = [2, 1, 0, 1, 2]
    hidden = np.zeros((2, 5), bool)
    hidden[1, 0] = True
    whole = error_since_query(queries, hidden, tracks, predicted, "strided", SIZE)
    assert whole == {"frames": [1, 2, 3], "count": [4, 2, 1], "median": [2.5, 3, 4]}
    first = error_since_query(queries, hidden, tracks, predicted, "first", (512, 256))  # half the scale along y
    assert first == {"frames": [1, 2, 3], "count": [2, 2, 1], "median": [2.25, 2.5, 4]}


def test_nothing_to_score_is_an_error():
    queries, occluded, tracks, pred_occluded, predicted = clip(0)
    with pytest.raises(UserError, match="nothing to score"):
        tapvid_metrics(queries, np.ones_like(occluded), tracks, pred_occluded, predicted, "strided", SIZE)
    with pytest.raises(UserError, match="nothing to score"):
        tapvid_metrics(*(a[:0] for a in (queries, occluded, tracks, pred_occluded, predicted)), "strided", SIZE)


def test_bad_input_is_an_error():
    queries, occluded, tracks, pred_occluded, predicted = clip(0)
    with pytest.raises(UserError, match="predicted tracks"):
        tapvid_metrics(queries, occluded, tracks, pred_occluded, predicted[:, :-1], "first", SIZE)
    with pytest.raises(UserError, match="query mode"):
        tapvid_metrics(queries, occluded, tracks, pred_occluded, predicted, "second", SIZE)
    queries[2, 0] = 7
    with pytest.raises(UserError, match="outside"):
        tapvid_metrics(queries, occluded, tracks, pred_occluded, predicted, "first", SIZE)
