"""Label propagation and bootstrap of benchmarks.real_clips on small cases whose results are known."""

import numpy as np
import pytest

from benchmarks.real_clips import (
    TRACKERS,
    bootstrap,
    label_queries,
    labels_table,
    metrics_table,
    occlusion_table,
    propagated_iou,
)
from benchmarks.results import result_text
from loaders.track_files import Annotations, PointTracks

SIZE, T = (40, 60), 12


def moving_masks(speed: int) -> np.ndarray:
    """A square that moves right by `speed` pixels a frame, `(T, H, W)` bool."""
    masks = np.zeros((T, *SIZE), bool)
    for t in range(T):
        masks[t, 10:26, 8 + speed * t:24 + speed * t] = True
    return masks


@pytest.mark.parametrize("speed,tracked,expected", [(0, 0, 1.0), (2, 2, 1.0), (2, 0, None), (2, -40, 0.0)])
def test_labels_move_with_the_tracks(speed, tracked, expected):
    """1 for the true motion; for points that do not move, the overlap of the squares."""
    queries = label_queries(SIZE, T)
    assert np.unique(queries[:, 0]).tolist() == [5, 10] and len(queries) == 2 * 10 * 15
    ends = queries[:, :0:-1] - np.column_stack([tracked * queries[:, 0], 0 * queries[:, 0]])
    iou = propagated_iou(queries, ends, np.ones(len(queries), bool), moving_masks(speed))
    assert 0 < iou < 0.5 if expected is None else iou == expected


def test_hidden_points_are_background():
    queries = label_queries(SIZE, T)
    assert propagated_iou(queries, queries[:, :0:-1], np.zeros(len(queries), bool), moving_masks(0)) == 0
    assert np.isnan(propagated_iou(queries, queries[:, :0:-1], np.ones(len(queries), bool), np.zeros((T, *SIZE), bool)))


def tracks_off_by(off: np.ndarray) -> tuple[PointTracks, Annotations]:
    """Standing points and tracks that are `off` `(M,)` pixels away in all frames but the first."""
    M = len(off)
    points = np.tile(np.linspace(5, 35, M)[:, None, None], (1, T, 2)).astype(np.float32)
    truth = Annotations(points, np.zeros((M, T), bool), (256, 256))
    queries = np.concatenate([np.zeros((M, 1)), points[:, 0, ::-1]], axis=1).astype(np.float32)
    moved = points + np.array([1, 0], np.float32) * off[:, None, None] * (np.arange(T) > 0)[:, None]
    return PointTracks(moved.astype(np.float32), np.ones((M, T), bool), queries, (256, 256)), truth


def test_bootstrap_of_a_difference():
    """The interval of equal trackers is 0; it contains the mean; the same difference at all points has no spread."""
    rows = np.arange(30)
    exact, truth = tracks_off_by(np.zeros(30))
    half, _ = tracks_off_by(np.where(rows % 2, 100.0, 0.0))
    all_off, _ = tracks_off_by(np.full(30, 100.0))
    metric = "average_pts_within_thresh"
    assert bootstrap([(exact, exact, truth, rows)], 50)[metric] == (0, 0, 0)
    assert bootstrap([(exact, all_off, truth, rows)], 50)[metric] == (1, 1, 1)
    mean, low, high = bootstrap([(exact, half, truth, rows)] * 2, 200)[metric]
    assert mean == 0.5 and 0.3 < low < 0.5 < high < 0.7


def test_means_of_precision_and_recall_are_over_the_clips_where_they_are_defined():
    nan = np.nan
    chain = [[0.5, nan], [1.0, 0.25], [nan, 0.75]]
    table = occlusion_table(["a", "b", "c"], {"chain": chain, "static": [[nan, nan]] * 3})
    assert table["rows"] == [["a", "0.500 / -", "- / -"], ["b", "1.000 / 0.250", "- / -"], ["c", "- / 0.750", "- / -"],
                             ["mean where defined", "0.750 / 0.500", "- / -"]]


def test_tables_have_the_clips_and_their_mean():
    """A clip without masks is not in the table of label propagation."""
    values = {name: np.array([[0.1 * k, 0.2, 0.3, 0.5], [0.3 * k, 0.4, 0.5, np.nan]])
              for k, name in enumerate(TRACKERS)}
    table = metrics_table(["a", "b"], [10, 20], values)
    assert table["columns"] == ["clip", "frames", *TRACKERS]
    assert [row[:2] for row in table["rows"]] == [["a", 10], ["b", 20], ["mean", None]]
    assert [row[3] for row in table["rows"]] == ["0.100 / 0.200 / 0.300", "0.300 / 0.400 / 0.500",
                                                 "0.200 / 0.300 / 0.400"]
    assert labels_table(["a", "b"], values)["rows"] == [["a", *[0.5] * 5], ["mean", *[0.5] * 5]]
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert "| mean |  | 0.000 / 0.300 / 0.400 |" in result_text(table)
