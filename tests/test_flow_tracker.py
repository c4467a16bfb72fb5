"""--follow_flow: tracks that go with the flow, and with the model where it breaks."""

import shutil

import numpy as np
import pytest
import torch

from configs.options import parse
from errors import UserError
from flow_tracker import FlowTracker, follow
from inference import new_tracker
from loaders.annotations import save_tracks
from loaders.sequence import open_sequence
from loaders.store import open_correspondences
from loaders.store_format import StoredPair
from models.build import new_model
from models.tracker import Tracker
from preprocessing.baselines import chained_flow_tracks, sample, static_tracks
from preprocessing.tracks import build_from_files

H, W, T, SPEED = 40, 60, 9, np.array([2.0, 1.0], np.float32)
ONES, BLACK = np.ones(H * W, bool), np.zeros((T, H, W, 3), np.uint8)


class Moving:
    """Everything moves by SPEED a frame. Flow between frames cut - 1 and cut does not lead back, by `gap` pixels."""

    def __init__(self, cut: int = -1, gap: float = 5.0):
        self.size, self.num_frames, self.cut, self.gap = (H, W), T, cut, gap
        self.pairs = np.array([*((a, a + 1) for a in range(T - 1)), *((a + 1, a) for a in range(T - 1))])

    def index(self, a: int, b: int) -> StoredPair:
        assert abs(a - b) == 1 or (a, b) == (0, 1)
        flow = np.broadcast_to(SPEED * (b - a), (H * W, 2)).copy()
        if (a, b) == (self.cut - 1, self.cut):
            flow[:, 0] += self.gap
        return StoredPair(np.arange(H * W), np.rint(flow * 16).astype(np.int16), ONES, ~ONES)


def straight(queries: np.ndarray) -> np.ndarray:
    """The truth `(M, T, 2)`."""
    return queries[:, None, :0:-1] + SPEED * (np.arange(T)[:, None] - queries[:, :1, None])


GRIDS = ["--device", "cpu", "--deform", "grid", "--field", "grid", "--grid_levels", "2", "--num_samples_ray", "4"]
QUERIES = np.array([[0, 10, 12], [4, 20, 30.5], [8, 25.25, 40]], np.float32)


def blobs(speed: np.ndarray) -> np.ndarray:
    """Frames whose picture, a smooth one, moves by `speed` a frame."""
    y, x = np.mgrid[:H, :W]
    places = [(x - speed[0] * t, y - speed[1] * t) for t in range(T)]
    frames = [np.stack([np.sin(x / 3), np.cos(y / 4), np.sin((x + y) / 5)], -1) for x, y in places]
    return (np.stack(frames) * 100 + 120).astype(np.uint8)


def test_tracks_go_with_flow_that_closes():
    """However far off the model is, if nothing speaks for it."""
    tracks, followed = follow(QUERIES, straight(QUERIES) + 7, Moving(), BLACK)
    assert np.allclose(tracks, straight(QUERIES), atol=1e-4) and followed.all()


@pytest.mark.parametrize("gap,breaks", [(0.9, False), (1.1, True)])
def test_flow_breaks_from_a_pixel_on(gap, breaks):
    assert follow(QUERIES, straight(QUERIES), Moving(5, gap), BLACK)[1].all() != breaks


def test_from_where_flow_breaks_tracks_are_the_models():
    """The break is between frames 4 and 5, on either side of the queries."""
    model = straight(QUERIES) + 0.1
    tracks, followed = follow(QUERIES, model, Moving(5), BLACK)
    assert (followed[:2] == (np.arange(T) < 5)).all() and (followed[2] == (np.arange(T) > 4)).all()
    assert np.allclose(tracks, np.where(followed[..., None], straight(QUERIES), model), atol=1e-4)


@pytest.mark.parametrize("query", [[0, 12, 20], [8, 25.25, 40]])
def test_flow_that_slides_off_is_left_for_a_model_that_looks_better(query):
    """What is seen moves by 0.3 px a frame more than the flow says: the model is 2/256 of 60 px apart in the second
    frame, and looks better for good from the third at the latest."""
    queries, drift = np.array([query], np.float32), np.array([0.3, 0], np.float32)
    away = np.abs(np.arange(T) - query[0])
    model = straight(queries) + drift * (np.arange(T)[:, None] - query[0])
    tracks, followed = follow(queries, model, Moving(), blobs(SPEED + drift))
    assert followed[0, away <= 1].all() and not followed[0, away >= 3].any()
    assert np.allclose(tracks[0, away >= 3], model[0, away >= 3])


@pytest.mark.parametrize("off", [0.3, 3.0, 12.0])
def test_a_model_that_looks_worse_is_not_believed(off):
    """Flow is right; the model is apart from it, or hardly."""
    tracks, followed = follow(QUERIES, straight(QUERIES) + np.array([off, 0]), Moving(), blobs(SPEED))
    assert followed.all() and np.allclose(tracks, straight(QUERIES), atol=1e-4)


def test_some_frames_are_those_of_all():
    model, store, frames = straight(QUERIES[:2]) + 0.6, Moving(5), blobs(SPEED + 0.1)
    queries = np.array([[2, 10, 12], [4, 20, 30.5]], np.float32)
    whole, part = follow(queries, model, store, frames), follow(queries, model[:, 2:8], store, frames, 2)
    assert np.array_equal(whole[0][:, 2:8], part[0]) and np.array_equal(whole[1][:, 2:8], part[1])


def test_outside_the_frame_flow_is_not_followed():
    queries = np.array([[0, 10, 50]], np.float32)
    tracks, followed = follow(queries, straight(queries) + 1, Moving(), BLACK)
    assert followed[0].tolist() == [True] * 5 + [False] * 4
    assert np.allclose(tracks[0, 5:], straight(queries)[0, 5:] + 1)


def test_flow_between_pixels_is_that_of_the_chain():
    from flow_tracker import _flow

    flow = np.random.default_rng(0).integers(-40, 40, (H * W, 2)).astype(np.int16)
    pair = StoredPair(np.arange(H * W), flow, ONES, ~ONES)
    points = np.random.default_rng(1).uniform(-3, 63, (300, 2)).astype(np.float32)
    assert np.allclose(_flow(pair, points, (H, W)), sample(flow.reshape(H, W, 2) / 16, points), atol=1e-5)


def test_correspondences_of_tracks_are_refused(small_sequence, tmp_path):
    """They have no flow between adjacent frames, and 0 where nothing is stored: points would stand still."""
    shutil.copytree(small_sequence / "color", tmp_path / "seq" / "color")
    sequence = open_sequence(tmp_path / "seq")
    size, T = sequence.size, len(sequence)
    queries = np.stack([np.zeros(20), *np.random.default_rng(0).uniform(5, 55, (2, 20))], -1)
    save_tracks(tmp_path / "tracks.npz", static_tracks(queries, T, size))
    store = build_from_files(sequence, [tmp_path / "tracks.npz"], "all", False)
    with pytest.raises(UserError, match="--flow dis or raft"):
        chained_flow_tracks(queries, store)
    options = parse("eval", [*GRIDS, "--data_dir", str(tmp_path / "seq"), "--follow_flow", "1"])
    model = new_model(options, T, size, torch.device("cpu"))
    with pytest.raises(UserError, match="or say --follow_flow 0"):
        new_tracker(model, sequence, options)


def test_the_tracker_of_a_run(small_sequence, tmp_path):
    """On a rendered clip with a model that is still: tracks move, what the model hides is hidden, and some frames are
    those of all."""
    options = parse("eval", [*GRIDS, "--data_dir", str(small_sequence), "--follow_flow", "1"])
    sequence = open_sequence(small_sequence)
    model = new_model(options, len(sequence), sequence.size, torch.device("cpu"))
    tracker, plain = new_tracker(model, sequence, options), Tracker(model)
    assert isinstance(tracker, FlowTracker)
    queries = np.stack([np.arange(6) % len(sequence), *np.random.default_rng(0).uniform(12, 50, (2, 6))], -1)
    found, still = tracker.track(queries), plain.track(queries)
    expected = follow(queries, still.tracks, open_correspondences(sequence), sequence.frames())[0]
    assert np.array_equal(found.tracks, expected) and np.abs(found.tracks - still.tracks).max() > 0.5
    assert (found.visible == still.visible).all() and np.array_equal(found.depth, still.depth)
    assert found.visible[np.arange(6), queries[:, 0].astype(int)].all()
    some = tracker.track(queries, [3, 1])
    assert np.array_equal(some.tracks, found.tracks[:, [3, 1]])
    assert np.array_equal(some.visible, found.visible[:, [3, 1]])

    bare = tmp_path / "bare"
    (bare / "color").mkdir(parents=True)
    for path in (small_sequence / "color").iterdir():
        (bare / "color" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="--follow_flow 0"):
        new_tracker(model, open_sequence(bare), options)
