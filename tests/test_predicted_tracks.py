"""Tracks as CoTracker's and TAPIR's users save them: every name, layout and type gives the same tracks, or one line."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from loaders.correspondences import open_correspondences
from loaders.predicted_tracks import OCCLUDED, POSITIONS, VISIBLE, load_tracks, read_tracks
from loaders.source_frames import resize_points, source_of
from loaders.track_export import export_tracks
from loaders.track_files import Annotations, PointTracks, load_annotations, sample_queries, save_annotations
from loaders.video import write_video
from preprocessing.cli import main
from preprocessing.extract_frames import extract_frames
from tests.launch import launch

SIZE = (40, 50)  # (H, W)


def made(N, T, seed=0):
    """Random tracks of N points through T frames with whole positions, so that every dtype holds them; each starts at
    its query point."""
    rng = np.random.default_rng(seed)
    tracks = rng.integers(0, 40, (N, T, 2)).astype(np.float32)
    frames = rng.integers(0, max(T, 1), N)
    start = tracks[np.arange(N), frames] if T else np.zeros((N, 2), np.float32)
    queries = np.stack([frames, start[:, 1], start[:, 0]], -1).astype(np.float32)
    return PointTracks(tracks, rng.random((N, T)) > 0.4, queries, SIZE)


def same(found, expected):
    assert found.tracks.dtype == np.float32 and found.visible.dtype == bool and found.tracks.flags.c_contiguous
    assert np.array_equal(found.tracks, expected.tracks) and np.array_equal(found.visible, expected.visible)


def write(path, arrays):
    """Write arrays by name as .npz or .pt."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        torch.save({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}, path)
    return path


@st.composite
def saved(draw):
    """Tracks, and the arrays by name as some tracker's user saves them."""
    N = draw(st.integers(1, 6))
    T = draw(st.integers(1, 7).filter(lambda T: T != N))
    expected = made(N, T, draw(st.integers(0, 99)))
    name = draw(st.sampled_from(VISIBLE + OCCLUDED))
    visible = ~expected.visible if name in OCCLUDED else expected.visible
    dtype = draw(st.sampled_from([bool, np.uint8, np.int64, np.float32, np.float16, "probability"]))
    if dtype == "probability":
        visible = np.where(visible, 0.51, 0.5) if name in VISIBLE else np.where(visible, 0.5, 0.49)
    else:
        visible = visible.astype(dtype)
    tracks = expected.tracks.astype(draw(st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.uint8])))
    if draw(st.booleans()):
        tracks = tracks.swapaxes(0, 1)
    if draw(st.booleans()):
        visible = visible.T
    if draw(st.booleans()):
        tracks = tracks[None]
    if draw(st.booleans()):
        visible = visible[None]
    if draw(st.booleans()):
        visible = visible[..., None]
    return expected, {draw(st.sampled_from(POSITIONS)): tracks, name: visible}


@settings(max_examples=150, deadline=None)
@given(saved(), st.sampled_from([".npz", ".pt", ".pth"]), st.booleans())
def test_every_name_layout_and_type_is_read(tmp_path_factory, case, suffix, queries_inside):
    expected, arrays = case
    if queries_inside:
        arrays = arrays | {"query_points": expected.query_points, "frame_size": np.array(SIZE)}
    path = write(tmp_path_factory.getbasetemp() / f"tracks{suffix}", arrays)
    num_frames = expected.tracks.shape[1]
    found = load_tracks(path, num_frames, None if queries_inside else expected.query_points, SIZE)
    same(found, expected)
    assert np.array_equal(found.query_points, expected.query_points) and found.frame_size == SIZE
    same(read_tracks(path, num_frames), expected)  # as --tracks, where the number of tracks is not known


@pytest.mark.parametrize("N,T", [(1, 5), (5, 1), (3, 8), (8, 3), (4, 4), (1, 1)])
@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_written_tracks_are_read_back(N, T, suffix, tmp_path):
    """Also where N = T: both formats have one layout."""
    expected = made(N, T)
    export_tracks(tmp_path / f"t{suffix}", expected)
    same(load_tracks(tmp_path / f"t{suffix}", T, expected.query_points, SIZE), expected)
    same(load_tracks(tmp_path / f"t{suffix}", None, expected.query_points, SIZE), expected)


def test_cotrackers_outputs(tmp_path):
    expected = made(3, 8)
    tracks = torch.from_numpy(expected.tracks.copy()).transpose(0, 1)[None]
    visible = torch.from_numpy(expected.visible.T.copy())[None]
    path = tmp_path / "t.pt"
    for content in ((tracks, visible), [tracks, visible.float()], (tracks[0], visible[0]),
                    (tracks.bfloat16().requires_grad_(), visible),
                    {"pred_tracks": tracks, "pred_visibility": visible, "model": "cotracker3", "shape": (8, 3)}):
        torch.save(content, path)
        same(load_tracks(path, 8, expected.query_points, SIZE), expected)
    torch.save((tracks, visible), path, _use_new_zipfile_serialization=False)
    same(load_tracks(path, 8, expected.query_points, SIZE), expected)
    np.savez(tmp_path / "t.npz", tracks.numpy(), visible.numpy())  # arr_0, arr_1
    same(load_tracks(tmp_path / "t.npz", 8, expected.query_points, SIZE), expected)


def test_positions_alone_are_visible(tmp_path, caplog):
    expected = made(3, 8)
    np.save(tmp_path / "t.npy", expected.tracks.swapaxes(0, 1))
    torch.save(torch.from_numpy(expected.tracks), tmp_path / "t.pt")
    with caplog.at_level(logging.INFO):
        for name in ("t.npy", "t.pt"):
            found = load_tracks(tmp_path / name, 8, expected.query_points, SIZE)
            assert np.array_equal(found.tracks, expected.tracks) and found.visible.all()
    assert caplog.text.count("has no visibility: all points count as visible") == 2


def test_the_threshold_of_probabilities(tmp_path):
    expected = made(2, 5)
    p = np.linspace(0, 1, 10).reshape(2, 5)
    for name, values in (("visibility", p), ("occlusion", 1 - p)):
        np.savez(tmp_path / "t.npz", tracks=expected.tracks, **{name: values})
        for th in (0.25, 0.5, 0.9):
            assert np.array_equal(read_tracks(tmp_path / "t.npz", 5, visible_th=th).visible, p > th)
    np.savez(tmp_path / "t.npz", tracks=expected.tracks, visible=expected.visible)
    assert np.array_equal(read_tracks(tmp_path / "t.npz", 5, visible_th=0.0).visible, expected.visible)


def test_queries_of_either_order_are_where_the_tracks_start(tmp_path):
    expected = made(4, 7)
    for order in ([0, 1, 2], [0, 2, 1]):
        np.savez(tmp_path / "t.npz", tracks=expected.tracks, visible=expected.visible,
                 queries=expected.query_points[None][..., order])
        found = load_tracks(tmp_path / "t.npz", 7, None, SIZE)
        assert np.array_equal(found.query_points, expected.query_points)
    np.savez(tmp_path / "t.npz", tracks=expected.tracks + 9, visible=expected.visible, queries=expected.query_points)
    with pytest.raises(UserError, match=r"`queries` may be \(t, x, y\) or \(t, y, x\): name them `query_points`"):
        load_tracks(tmp_path / "t.npz", 7, None, SIZE)


def test_query_points_in_cotrackers_order_are_noticed(tmp_path, caplog):
    expected = made(4, 7)
    np.savez(tmp_path / "t.npz", tracks=expected.tracks, query_points=expected.query_points[:, [0, 2, 1]])
    with caplog.at_level(logging.INFO):
        assert np.array_equal(load_tracks(tmp_path / "t.npz", 7, None, SIZE).query_points, expected.query_points)
    assert "`query_points` are read as (t, x, y)" in caplog.text
    np.savez(tmp_path / "t.npz", tracks=expected.tracks + 9, query_points=expected.query_points)  # start elsewhere
    assert np.array_equal(load_tracks(tmp_path / "t.npz", 7, None, SIZE).query_points, expected.query_points)


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1]])
def test_as_many_tracks_as_frames_are_read_in_the_layout_in_which_they_start_at_their_queries(order, tmp_path):
    expected = made(5, 5)
    for tracks, visible in ((expected.tracks, expected.visible), (expected.tracks.swapaxes(0, 1), expected.visible.T)):
        np.savez(tmp_path / "t.npz", tracks=tracks, visible=visible, query_points=expected.query_points[:, order],
                 frame_size=SIZE)
        found = load_tracks(tmp_path / "t.npz", 5)
        same(found, expected)
        assert np.array_equal(found.query_points, expected.query_points)


@pytest.mark.parametrize("T", [4, 7])
def test_cotrackers_tracks_visibility_and_queries(T, tmp_path):
    expected = made(4, T)
    content = [torch.from_numpy(array.copy())[None] for array in (
        expected.tracks.swapaxes(0, 1), expected.visible.T, expected.query_points[:, [0, 2, 1]])]
    torch.save(tuple(content), tmp_path / "t.pt")
    np.savez(tmp_path / "t.npz", *(array.numpy() for array in content))
    for name in ("t.pt", "t.npz"):
        found = load_tracks(tmp_path / name, T, None, SIZE)
        same(found, expected)
        assert np.array_equal(found.query_points, expected.query_points)


def test_missing_positions_of_hidden_points(tmp_path):
    expected = made(3, 8)
    tracks = np.where(expected.visible[..., None], expected.tracks, np.nan)
    np.savez(tmp_path / "t.npz", tracks=tracks, visible=expected.visible)
    found = read_tracks(tmp_path / "t.npz", 8, hidden=False)
    assert np.array_equal(found.tracks, np.nan_to_num(tracks)) and np.array_equal(found.visible, expected.visible)
    n, t = np.argwhere(~expected.visible)[0]
    with pytest.raises(UserError, match=f"not finite, the first of track {n} in frame {t}"):
        read_tracks(tmp_path / "t.npz", 8)


GOOD = made(3, 8)
T38, V38 = GOOD.tracks, GOOD.visible


@pytest.mark.parametrize("arrays, words", [
    ({"flow": T38}, "has no `tracks`: it has flow"),
    ({"tracks": made(4, 4).tracks, "visibility": made(4, 4).visible}, "may be (tracks, frames) or (frames, tracks)"),
    ({"tracks": made(4, 4).tracks.swapaxes(0, 1)[None], "visible": V38}, "may be (tracks, frames)"),
    ({"tracks": np.stack([T38, T38]), "visible": V38}, "a batch of 2 clips"),
    ({"tracks": T38[..., :1], "visible": V38}, "must be positions (x, y)"),
    ({"tracks": T38[0], "visible": V38}, "has the shape (8, 2)"),
    ({"tracks": T38 > 3, "visible": V38}, "`tracks` is bool"),
    ({"tracks": T38, "pred_tracks": T38}, "has `tracks` and `pred_tracks`"),
    ({"tracks": T38[:, :7], "visible": V38[:, :7]}, "has 7 frames, 8 are needed"),
    ({"tracks": T38[:2], "visible": V38[:2]}, "does not fit 3 queries and 8 frames"),
    ({"tracks": T38, "visible": V38[:, :7]}, "`visible` has the shape (3, 7), it must be one value"),
    ({"tracks": T38, "occlusion": np.where(V38, -4.5, 3.25)}, "from -4.5 to 3.25"),
    ({"tracks": T38, "visible": V38.astype(np.uint8) * 255}, "from 0 to 255"),
    ({"tracks": T38, "visible": np.where(V38, 1, np.nan)}, "nan"),
    ({"tracks": np.where(V38[..., None], T38, np.inf), "visible": V38}, "not finite"),
    ({"tracks": T38.astype(np.float64) + 1e300, "visible": V38}, "24 positions that are not finite"),
    ({"tracks": T38, "visible": V38, "query_points": np.zeros((3, 2))}, "`query_points` is float64"),
    ({"tracks": T38, "visible": V38, "query_points": np.full((3, 3), 9.0)}, "row 0 (t, y, x)"),
    ({"tracks": T38, "visible": V38, "frame_size": np.array([0, 4])}, "`frame_size`"),
    ({"tracks": T38, "visible": V38, "depth": T38}, "`depth` has the shape"),
    ({"tracks": T38, "visible": V38, "depth": V38}, "`depth` is bool"),
])
@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_bad_tracks_are_one_line(arrays, words, suffix, tmp_path):
    path = write(tmp_path / f"t{suffix}", arrays)
    square = next(iter(arrays.values())).shape[-3:-1] == (4, 4)
    with pytest.raises(UserError) as caught:
        load_tracks(path, *((4, made(4, 4).query_points) if square else (8, GOOD.query_points)), SIZE)
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content, words", [
    ("text", "holds a str"), ((torch.zeros(1, 8, 3, 2),) * 4, "holds 4 values without names"),
    ((torch.zeros(1, 8, 4, 2), torch.ones(1, 8, 4), torch.ones(1, 8, 4)), "`queries` is float32 of the shape (8, 4)"),
    ({"tracks": torch.zeros(8, 3, 2, dtype=torch.complex64)}, "complex64"),
    ({"tracks": torch.zeros(8, 3, 2).to_sparse()}, "sparse"),
    ({"tracks": torch.zeros(1).expand(10**6, 10**6, 2)}, "GB unpacked"),
    ((), "has no `tracks`"), ([None], "has no `tracks`"),
])
def test_bad_tensors_are_one_line(content, words, tmp_path):
    torch.save(content, tmp_path / "t.pt")
    with pytest.raises(UserError) as caught:
        load_tracks(tmp_path / "t.pt", 8, GOOD.query_points, SIZE)
    assert words in str(caught.value) and "t.pt" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_tracks(tmp_path):
    np.save(tmp_path / "t.npy", {"tracks": T38}, allow_pickle=True)
    torch.save({"tracks": T38}, tmp_path / "t.pt")  # numpy's array inside: not a tensor
    (tmp_path / "t.csv").write_text("1,2\n")
    (tmp_path / "u.pt").write_bytes(b"PK\x03\x04 cut off")
    for name, words in (("t.npy", "cannot be read as arrays"), ("t.pt", "it holds numpy arrays, and only tensors"),
                        ("t.csv", "ends in '.csv'"), ("u.pt", "cannot be read as tensors"), ("v.pt", "no file"),
                        ("v.npy", "no file")):
        with pytest.raises(UserError, match=words) as caught:
            load_tracks(tmp_path / name, 8, GOOD.query_points, SIZE)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_missing_is_asked_for(tmp_path):
    np.savez(tmp_path / "t.npz", tracks=T38, visible=V38)
    with pytest.raises(UserError, match="no query points: give --queries FILE"):
        load_tracks(tmp_path / "t.npz", 8)
    with pytest.raises(UserError, match="no `frame_size`: give --data_dir"):
        load_tracks(tmp_path / "t.npz", 8, GOOD.query_points)
    with pytest.raises(UserError, match="or give --queries FILE or --data_dir"):
        load_tracks(tmp_path / "t.npz")


def test_what_does_not_fit_is_told(tmp_path):
    np.savez(tmp_path / "t.npz", tracks=T38, visible=V38)
    for numbers, words in (((9, None), "does not fit 9 frames: give tracks through all frames of the clip"),
                           ((9, 4), "does not fit 4 queries and 9 frames: track the query points of --annotations"),
                           ((None, 4), "does not fit 4 queries: track"), ((9, 3), "has 8 frames, 9 are needed")):
        with pytest.raises(UserError, match=words):
            read_tracks(tmp_path / "t.npz", *numbers)


def evaluated(*arguments):
    result = launch("eval.py", *arguments)
    assert result.returncode == 0, result.stderr
    return result


def test_eval_scores_and_converts_every_format(small_sequence, tmp_path):
    truth = load_annotations(small_sequence / "annotations.npz")
    queries, rows = sample_queries(truth, "first")
    rng = np.random.default_rng(0)
    tracks = (truth.points[rows] + rng.normal(0, 2, truth.points[rows].shape)).astype(np.float32)
    visible = ~truth.occluded[rows]
    expected = PointTracks(tracks, visible, queries, truth.frame_size)
    export_tracks(tmp_path / "own.npz", expected)
    score = ["--annotations", small_sequence / "annotations.npz", "--query_mode", "first", "--out", tmp_path / "m.json"]
    evaluated("--predictions", tmp_path / "own.npz", *score)
    metrics = (tmp_path / "m.json").read_text()
    evaluated("--predictions", tmp_path / "own.npz", "--out", tmp_path / "own.pt")
    np.save(tmp_path / "a.npy", tracks.swapaxes(0, 1))
    np.savez(tmp_path / "b.npz", pred_tracks=tracks.swapaxes(0, 1)[None], pred_visibility=visible.T[None] * 0.6)
    for name in ("own.pt", "b.npz"):
        evaluated("--predictions", tmp_path / name, *score)
        assert (tmp_path / "m.json").read_text() == metrics, name
    evaluated("--predictions", tmp_path / "b.npz", *score, "--visible_th", "0.7")
    assert (tmp_path / "m.json").read_text() != metrics
    assert "all points count as visible" in evaluated("--predictions", tmp_path / "a.npy", *score).stderr
    np.savez(tmp_path / "q.npz", query_points=queries, frame_size=truth.frame_size)
    for name in ("own.pt", "b.npz"):
        evaluated("--predictions", tmp_path / name, "--queries", tmp_path / "q.npz", "--data_dir", small_sequence,
                  "--out", tmp_path / "back.npz")
        back = load_tracks(tmp_path / "back.npz")
        same(back, expected)
        assert np.array_equal(back.query_points, queries) and back.frame_size == truth.frame_size
    np.savez(tmp_path / "q.npz", query_points=queries[1:], frame_size=truth.frame_size)
    result = launch("eval.py", "--predictions", tmp_path / "own.npz", "--queries", tmp_path / "q.npz", *score)
    assert result.returncode == 2 and "leave --queries out" in result.stderr


def test_tracks_of_other_points_are_told(small_sequence, tmp_path):
    truth = load_annotations(small_sequence / "annotations.npz")
    _, rows = sample_queries(truth, "first")
    np.savez(tmp_path / "t.npz", tracks=truth.points[rows[::-1]], occluded=truth.occluded[rows[::-1]])
    result = evaluated("--predictions", tmp_path / "t.npz", "--annotations", small_sequence / "annotations.npz",
                       "--query_mode", "first")
    assert "px (median) from their query points: are they in the queries' order" in result.stderr


@pytest.fixture
def resized(tmp_path):
    """A sequence of frames 3, 5, ..., 15 of a clip, at half of its size; its tracks, and their ground truth in all
    frames and pixels of the clip."""
    rng = np.random.default_rng(0)
    write_video(tmp_path / "clip.mp4", [rng.integers(0, 255, (80, 100, 3), np.uint8) for _ in range(16)], 25)
    sequence = extract_frames(str(tmp_path / "clip.mp4"), tmp_path / "seq", 3, None, 2, None, None, 40)
    whole = rng.uniform(5, 75, (4, 16, 2)).astype(np.float32)
    truth = Annotations(whole, np.zeros((4, 16), bool), (80, 100), evaluated=np.tile(np.arange(16) >= 3, (4, 1)))
    clip = source_of(sequence)
    positions = resize_points(whole[:, clip.numbers], (80, 100), (40, 50))
    queries = np.concatenate([np.zeros((4, 1)), positions[:, 0, ::-1]], axis=1).astype(np.float32)
    visible = rng.random((4, 7)) > 0.3
    return sequence, PointTracks(positions, visible, queries, (40, 50), source=clip), truth


def test_files_without_frame_size_have_the_sources_pixels(resized, tmp_path):
    sequence, tracks, truth = resized
    save_annotations(tmp_path / "gt.npz", truth)
    save_annotations(tmp_path / "gt7.npz", truth.at_frames(tracks.source.numbers))
    for name in ("t.npz", "t.pt"):
        export_tracks(tmp_path / name, tracks, sequence)
    turned = torch.load(tmp_path / "t.pt", weights_only=True)[0][0].transpose(0, 1).numpy()
    assert np.allclose(turned, truth.points[:, tracks.source.numbers], atol=1e-4)
    scores = []
    for name, annotations, more in (("t.npz", "gt.npz", []), ("t.npz", "gt7.npz", []), ("t.pt", "gt7.npz", []),
                                    ("t.pt", "gt7.npz", ["--data_dir", sequence.root]),
                                    ("t.npz", "gt.npz", ["--data_dir", sequence.root]),
                                    ("t.pt", "gt.npz", ["--data_dir", sequence.root])):
        evaluated("--predictions", tmp_path / name, "--annotations", tmp_path / annotations, "--query_mode", "first",
                  "--out", tmp_path / "m.json", *more)
        scores.append(json.loads((tmp_path / "m.json").read_text()))
    assert scores[0]["average_pts_within_thresh"] == 1
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], abs=1e-4)
    np.savez(tmp_path / "q.npz", query_points=tracks.query_points, frame_size=(40, 50))
    for coordinates in ("source", "frames"):
        export_tracks(tmp_path / "t.pt", tracks, sequence, coordinates)
        evaluated("--predictions", tmp_path / "t.pt", "--queries", tmp_path / "q.npz", "--data_dir", sequence.root,
                  "--coordinates", coordinates, "--out", tmp_path / "back.npz")
        back = load_tracks(tmp_path / "back.npz")
        assert back.frame_size == (40, 50) and np.allclose(back.query_points, tracks.query_points, atol=1e-4)
        assert np.allclose(back.tracks, tracks.tracks, atol=1e-4) and np.array_equal(back.visible, tracks.visible)


def test_correspondences_of_tracks_without_frame_size(resized, tmp_path):
    sequence, tracks, truth = resized
    flows = []
    np.save(tmp_path / "source.npy", truth.points[:, tracks.source.numbers])
    np.save(tmp_path / "frames.npy", tracks.tracks)
    np.savez(tmp_path / "sized.npz", tracks=truth.points[:, tracks.source.numbers], frame_size=(80, 100))
    for name, coordinates in (("source.npy", "source"), ("frames.npy", "frames"), ("sized.npz", "frames")):
        shutil.rmtree(sequence.root / "correspondences", ignore_errors=True)
        main(["--data_dir", str(sequence.root), "--tracks", str(tmp_path / name), "--coordinates", coordinates])
        pair = open_correspondences(sequence).stored(0, 4)
        flows.append((pair.pixels, pair.flow(slice(None))))
    assert len(flows[0][0]) == 4
    for pixels, flow in flows[1:]:
        assert np.array_equal(pixels, flows[0][0]) and np.allclose(flow, flows[0][1], atol=0.05)
