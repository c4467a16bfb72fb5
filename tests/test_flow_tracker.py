"""--follow_flow: tracks that go with the flow, and with the model where it breaks."""

import numpy as np
import pytest
import torch

from configs.options import parse
from errors import UserError
from evaluation.flow_tracker import FlowTracker, follow
from inference import new_tracker
from loaders.sequence import open_sequence
from loaders.store import open_correspondences
from loaders.store_format import DensePair, StoredPair
from models.build import new_model
from models.tracker import Tracker

H, W, T, SPEED = 40, 60, 9, np.array([2.0, 1.0], np.float32)


class Moving:
    """Everything moves by SPEED a frame. `cut`: the flow between frames cut - 1 and cut is wrong, there and back;
    `confirmed`: ordered pairs that are stored with flags, beside those of adjacent frames."""

    def __init__(self, cut: int = -1, confirmed: tuple = (), off: float = 0.0):
        self.size, self.num_frames, self.cut, self.off = (H, W), T, cut, off
        self.counts = np.zeros((T, T), int)
        for a, b in [*((a, a + 1) for a in range(T - 1)), *((a + 1, a) for a in range(T - 1)), *confirmed]:
            self.counts[a, b] = 1

    def dense(self, a: int, b: int) -> DensePair:
        flow = np.broadcast_to(SPEED * (b - a), (H, W, 2)).copy()
        if max(a, b) == self.cut:
            flow += 5
        ones = np.ones((H, W), bool)
        return DensePair(flow, ones, ones, ~ones)

    def index(self, a: int, b: int) -> StoredPair:
        flow = np.broadcast_to(SPEED * (b - a) + self.off, (H * W, 2))
        return StoredPair(np.arange(H * W), (flow * 16).astype(np.int16), np.ones(H * W, bool), np.zeros(H * W, bool))


def straight(queries: np.ndarray) -> np.ndarray:
    """The truth `(M, T, 2)`."""
    return queries[:, None, :0:-1] + SPEED * (np.arange(T)[:, None] - queries[:, :1, None])


QUERIES = np.array([[0, 10, 12], [4, 20, 30.5], [8, 25.25, 40]], np.float32)


def test_tracks_go_with_flow_that_closes():
    """However far off the model is."""
    tracks, followed = follow(QUERIES, straight(QUERIES) + 7, Moving())
    assert np.allclose(tracks, straight(QUERIES), atol=1e-4) and followed.all()


def test_where_flow_breaks_tracks_are_the_models_until_a_correspondence_confirms_them():
    """The break is between frames 4 and 5; frames 6 (from 2 and 4) and 3 (from 7) are confirmed."""
    model = straight(QUERIES) + 0.1
    tracks, followed = follow(QUERIES, model, Moving(5, ((2, 6), (4, 6), (7, 3))))
    expected = np.ones((3, T), bool)
    expected[:2, 5] = False
    expected[2, 4] = False
    assert (followed == expected).all()
    assert np.allclose(tracks[0], np.where(np.arange(T)[:, None] < 5, straight(QUERIES)[0], model[0]), atol=1e-4)
    assert np.allclose(tracks[2], np.where(np.arange(T)[:, None] > 4, straight(QUERIES)[2], model[2]), atol=1e-4)


@pytest.mark.parametrize("confirmed,off,model_off", [((), 0, 0), (((2, 6),), 3.0, 0), (((2, 6),), 0, 3.0)])
def test_nothing_is_confirmed_without_agreement(confirmed, off, model_off):
    """There is no correspondence, or it ends elsewhere, or the model is elsewhere."""
    model = straight(QUERIES[:1]) + model_off
    tracks, followed = follow(QUERIES[:1], model, Moving(5, confirmed, off))
    assert followed[0].tolist() == [True] * 5 + [False] * 4
    assert np.allclose(tracks[0, 5:], model[0, 5:])


def test_outside_the_frame_flow_is_not_followed():
    queries = np.array([[0, 10, 50]], np.float32)
    tracks, followed = follow(queries, straight(queries) + 1, Moving())
    assert followed[0].tolist() == [True] * 5 + [False] * 4
    assert np.allclose(tracks[0, 5:], straight(queries)[0, 5:] + 1)


def test_a_store_without_adjacent_pairs_leaves_the_model_as_it_is():
    store = Moving()
    store.counts[:] = 0
    tracks, followed = follow(QUERIES, straight(QUERIES) + 2, store)
    own = np.arange(T) == QUERIES[:, :1]
    assert (followed == own).all() and np.allclose(tracks[~own], (straight(QUERIES) + 2)[~own])


def test_the_tracker_of_a_run(small_sequence, tmp_path):
    """On a rendered clip with a model that is still: tracks move, what the model hides stays hidden, and some frames
    are those of all."""
    options = parse("eval", ["--data_dir", str(small_sequence), "--device", "cpu", "--deform", "grid", "--field",
                             "grid", "--grid_levels", "2", "--num_samples_ray", "4", "--follow_flow", "1"])
    sequence = open_sequence(small_sequence)
    model = new_model(options, len(sequence), sequence.size, torch.device("cpu"))
    tracker, plain = new_tracker(model, sequence, options), Tracker(model)
    assert isinstance(tracker, FlowTracker)
    queries = np.stack([np.arange(6) % len(sequence), *np.random.default_rng(0).uniform(12, 50, (2, 6))], -1)
    found, still = tracker.track(queries), plain.track(queries)
    expected, followed = follow(queries, still.tracks, open_correspondences(sequence))
    assert np.array_equal(found.tracks, expected) and np.abs(found.tracks - still.tracks).max() > 0.5
    assert (found.visible == (still.visible & followed)).all() and np.array_equal(found.depth, still.depth)
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
