"""Annotation, query and track files: round trips, TAP-Vid's query sampling, and one clear line for every bad file."""

from dataclasses import replace

import numpy as np
import pytest

from common.errors import UserError
from loaders.predicted_tracks import load_tracks
from loaders.track_files import (
    Annotations,
    PointTracks,
    load_annotations,
    load_queries,
    resize_points,
    sample_queries,
    save_annotations,
    save_tracks,
)

N, T = 4, 12


@pytest.fixture
def truth():
    rng = np.random.default_rng(0)
    occluded = rng.random((N, T)) < 0.4
    occluded[:, 5] = False
    return Annotations(rng.uniform(0, 30, (N, T, 2)).astype(np.float32), occluded, (40, 50))


def write(path, **changes):
    """A good annotation file with some entries changed, or left out where None."""
    entries = {"points": np.full((N, T, 2), 3, np.float32), "occluded": np.zeros((N, T), bool),
               "frame_size": np.array([40, 50]), **changes}
    np.savez(path, **{key: value for key, value in entries.items() if value is not None})
    return path


def test_annotations_round_trip(truth, tmp_path):
    path = tmp_path / "new" / "annotations.npz"
    save_annotations(path, truth)
    back = load_annotations(path, num_frames=T)
    assert np.array_equal(back.points, truth.points) and back.points.dtype == np.float32
    assert np.array_equal(back.occluded, truth.occluded) and back.frame_size == (40, 50)
    assert back.query_points is None and back.evaluated is None
    assert [p.name for p in path.parent.iterdir()] == ["annotations.npz"]
    queries = np.array([[0, 1, 2]] * N, np.float32)
    save_annotations(path, Annotations(truth.points, truth.occluded, (40, 50), queries, truth.occluded))
    back = load_annotations(path)
    assert np.array_equal(back.query_points, queries) and np.array_equal(back.evaluated, truth.occluded)


def test_positions_that_nobody_knows_may_be_missing(tmp_path):
    points, occluded, evaluated = np.full((N, T, 2), 3.0), np.zeros((N, T), bool), np.ones((N, T), bool)
    points[0, 0] = points[1, 1] = np.nan
    occluded[0, 0], evaluated[1, 1] = True, False
    back = load_annotations(write(tmp_path / "a.npz", points=points, occluded=occluded, evaluated=evaluated))
    assert np.isfinite(back.points).all()


@pytest.mark.parametrize("changes, words", [
    ({"points": None}, "has no `points`"),
    ({"points": np.zeros((N, T, 3), np.float32)}, "`points` has the shape"),
    ({"points": np.zeros((N, T, 2), int)}, "`points` is int64"),
    ({"occluded": np.zeros((N, T - 1), bool)}, "`occluded` has the shape"),
    ({"occluded": np.zeros((N, T), np.uint8)}, "`occluded` is uint8"),
    ({"points": np.full((N, T, 2), np.nan, np.float32)}, "no finite position for point 0 in frame 0"),
    ({"frame_size": np.array([40.0, 50.0])}, "`frame_size` is float64"),
    ({"frame_size": np.array([40, 0])}, "`frame_size`"),
    ({"evaluated": np.zeros((N, T), int)}, "`evaluated` is int64"),
    ({"query_points": np.zeros((N + 1, 3), np.float32)}, "`query_points` has the shape"),
    ({"query_points": np.array([[T, 1, 1]] * N, np.float32)}, "row 0"),
    ({"query_points": np.array([[0, 1, 1]] * (N - 1) + [[0, 1, 50]], np.float32)}, "row 3"),
    ({"points": np.array([{}], object)}, "cannot be read"),
])
def test_bad_annotations_are_named(tmp_path, changes, words):
    with pytest.raises(UserError) as caught:
        load_annotations(write(tmp_path / "bad.npz", **changes))
    assert words in str(caught.value) and "bad.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_annotations_of_another_clip(tmp_path):
    with pytest.raises(UserError, match="12 frames, the sequence 20"):
        load_annotations(write(tmp_path / "a.npz"), num_frames=20)


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 cut off"])
def test_damaged_files(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    for load in (load_annotations, load_queries, load_tracks):
        with pytest.raises(UserError, match=r"a\.npz cannot be read"):
            load(tmp_path / "a.npz")
    whole = write(tmp_path / "b.npz").read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match=r"b\.npz cannot be read"):
        load_annotations(tmp_path / "b.npz")
    with pytest.raises(UserError, match="no file"):
        load_annotations(tmp_path / "missing.npz")


def test_a_single_array_is_not_an_npz(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(UserError, match="cannot be read"):
        load_annotations(tmp_path / "a.npy")


def test_first_queries_are_the_first_visible_frames():
    occluded = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 0]], bool)
    points = np.arange(32, dtype=np.float32).reshape(4, 4, 2)
    queries, rows = sample_queries(Annotations(points, occluded, (9, 9)), "first")
    assert rows.tolist() == [0, 1, 3]
    assert queries.tolist() == [[2, 5, 4], [0, 9, 8], [1, 27, 26]]  # (t, y, x)
    evaluated = np.ones((4, 4), bool)
    evaluated[0, 2] = evaluated[1, 0] = False
    queries, rows = sample_queries(Annotations(points, occluded, (9, 9), evaluated=evaluated), "first")
    assert rows.tolist() == [0, 3] and queries[:, 0].tolist() == [3, 1]


def test_strided_queries_are_every_fifth_frame(truth):
    queries, rows = sample_queries(truth, "strided")
    expected = [(t, n) for t in (0, 5, 10) for n in range(N) if not truth.occluded[n, t]]
    assert [(int(q[0]), int(n)) for q, n in zip(queries, rows, strict=True)] == expected
    assert np.array_equal(queries[:, :0:-1], truth.points[rows, queries[:, 0].astype(int)])


@pytest.mark.parametrize("mode", ["first", "strided"])
def test_given_queries_are_used_as_they_are(truth, mode):
    given = np.array([[3, 1.5, 2]] * N, np.float32)
    queries, rows = sample_queries(Annotations(truth.points, truth.occluded, (40, 50), given), mode)
    assert np.array_equal(queries, given) and rows.tolist() == list(range(N))


def test_sampling_errors(truth):
    with pytest.raises(UserError, match="query mode"):
        sample_queries(truth, "last")
    with pytest.raises(UserError, match="no visible point"):
        sample_queries(Annotations(truth.points, np.ones((N, T), bool), (40, 50)), "first")


def test_queries_from_both_kinds_of_file(tmp_path):
    (tmp_path / "q.csv").write_text("t, y, x\n0,1.5,2\n3,4,5.25\n")
    np.savez(tmp_path / "q.npz", query_points=np.array([[0, 1.5, 2], [3, 4, 5.25]]))
    for name in ("q.csv", "q.npz"):
        queries = load_queries(tmp_path / name, num_frames=4, size=(6, 7))
        assert queries.dtype == np.float32 and queries.tolist() == [[0, 1.5, 2], [3, 4, 5.25]]


@pytest.mark.parametrize("text, words", [
    ("x,y,t\n1,2,3\n", "t,y,x"), ("", "t,y,x"), ("t,y,x\n", "no query points"), ("t,y,x\n1,2\n", "three numbers"),
    ("t,y,x\n1,2,three\n", "three numbers"), ("t,y,x\n0.5,2,3\n", "row 0"), ("t,y,x\n0,2,3\n9,2,3\n", "row 1"),
    ("t,y,x\n0,2,nan\n", "row 0"), ("t,y,x\n0,-3,3\n", "row 0"), ("t,y,x\n0,2,70\n", "row 0"),
])
def test_bad_queries(tmp_path, text, words):
    (tmp_path / "q.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        load_queries(tmp_path / "q.csv", num_frames=9, size=(60, 70))
    assert words in str(caught.value) and "q.csv" in str(caught.value)


def test_tracks_round_trip_with_and_without_depth(tmp_path):
    queries = np.array([[0, 1, 2], [3, 4, 5]], np.float32)
    tracks, visible = np.random.default_rng(0).random((2, 5, 2), np.float32), np.ones((2, 5), bool)
    score = np.zeros((2, 5), np.float32)
    for record in (PointTracks(tracks, visible, queries, (8, 9)),
                   PointTracks(tracks, visible, queries, (8, 9), score, score + 1)):
        save_tracks(tmp_path / "t.npz", record)
        back = load_tracks(tmp_path / "t.npz", num_frames=5)
        assert np.array_equal(back.tracks, tracks) and np.array_equal(back.visible, visible)
        assert np.array_equal(back.query_points, queries) and back.frame_size == (8, 9)
        assert (back.depth is None) == (record.depth is None)
    with pytest.raises(UserError, match="5 frames"):
        load_tracks(tmp_path / "t.npz", num_frames=6)
    tracks[0, 0] = np.nan
    save_tracks(tmp_path / "t.npz", PointTracks(tracks, visible, queries, (8, 9)))
    with pytest.raises(UserError, match="not finite"):
        load_tracks(tmp_path / "t.npz")


def test_resizing_keeps_the_edges_of_the_frame(truth):
    edges = np.array([[-0.5, -0.5], [49.5, 39.5], [24.5, 19.5]])
    assert np.allclose(resize_points(edges, (40, 50), (256, 100)), [[-0.5, -0.5], [99.5, 255.5], [49.5, 127.5]])
    given = np.array([[3, 1.5, 2]] * N, np.float32)
    bigger = Annotations(truth.points, truth.occluded, (40, 50), given).resized((80, 150))
    assert bigger.frame_size == (80, 150)
    assert np.allclose(bigger.query_points[0], [3, 3.5, 7])
    assert np.allclose(bigger.resized((40, 50)).points, truth.points, atol=1e-4)


def test_human_annotations_of_the_bear(shared):
    truth = load_annotations(shared("data/bear/annotations.npz"), num_frames=82)
    assert truth.points.shape == (20, 82, 2) and truth.frame_size == (480, 854) and truth.evaluated.sum() == 300
    queries, rows = sample_queries(truth, "first")
    assert len(queries) == 20 and (queries[:, 0] == 2).all() and rows.tolist() == list(range(20))


def test_every_annotated_position_is_a_query(truth):
    from benchmarks.every_query import every_query

    evaluated = np.arange(T) % 3 != 1
    for some, expected in ((truth, ~truth.occluded),
                           (replace(truth, evaluated=np.tile(evaluated, (N, 1))), ~truth.occluded & evaluated)):
        queries, rows = every_query(some)
        assert len(queries) == expected.sum() and expected[rows, queries[:, 0].astype(int)].all()
        assert np.array_equal(queries[:, :0:-1], truth.points[rows, queries[:, 0].astype(int)])


def test_every_scored_position_is_so_far_from_its_query(truth):
    from benchmarks.every_query import every_query, far_apart

    some = replace(truth, evaluated=np.arange(N * T).reshape(N, T) % 3 != 1)
    queries, rows = every_query(some)
    parts = far_apart(some, queries, rows)
    away = np.abs(np.arange(T) - queries[:, :1])
    for name, part in parts.items():
        low, high = map(int, name.split(" to "))
        assert np.array_equal(part.evaluated, some.evaluated[rows] & (away >= low) & (away <= high))
        assert np.array_equal(part.points, some.points[rows])
    assert np.array_equal(sum(part.evaluated.astype(int) for part in parts.values()), some.evaluated[rows] & (away > 0))
