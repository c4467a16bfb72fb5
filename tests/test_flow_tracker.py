"""--follow_flow: tracks follow the flow, and the model where the forward-backward check fails."""

import shutil

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.geometry import sample
from configs.options import parse
from evaluation.baselines import chained_flow_tracks, static_tracks
from inference.flow_guided_tracker import FlowGuidedTracker, Followed, follow
from inference.load_run import new_tracker
from inference.tracker import Tracker
from loaders.correspondence_format import StoredPair
from loaders.correspondences import open_correspondences
from loaders.sequence import open_sequence
from loaders.track_files import save_tracks
from models.factory import new_model
from preprocessing.track_correspondences import build_from_files

H, W, T, SPEED = 40, 60, 9, np.array([2.0, 1.0], np.float32)
ONES, BLACK = np.ones(H * W, bool), np.zeros((T, H, W, 3), np.uint8)


class Moving:
    """A stand-in for the correspondence store in which every point moves by SPEED per frame.

    cut: frames c for which the flow from c - 1 to c has a forward-backward error of `gap` pixels. confirmed: ordered
    pairs that are stored in addition to those of adjacent frames. Their flow has an error of `off` pixels in x; they
    have correspondences at the pixels `stored`, which are valid where `flagged`."""

    def __init__(self, cut: int | tuple = (), confirmed: tuple = (), off: float = 0.0, gap: float = 5.0,
                 stored: np.ndarray = ONES, flagged: np.ndarray = ONES, keep: str = "all"):
        self.size, self.num_frames, self.root, self.cut, self.gap, self.off = (H, W), T, "store", cut, gap, off
        self.confirmed, self.kept, self.flagged = confirmed, np.flatnonzero(stored), flagged.ravel()
        self.counts, self.meta = np.zeros((T, T), int), {"method": {"keep": keep}}
        self.pairs = np.array([*((a, a + 1) for a in range(T - 1)), *((a + 1, a) for a in range(T - 1)), *confirmed])
        self.counts[tuple(self.pairs.T)] = 1

    def index(self, a: int, b: int) -> StoredPair:
        kept = np.arange(H * W) if abs(a - b) == 1 else self.kept
        flow = np.broadcast_to(SPEED * (b - a), (len(kept), 2)).copy()
        if abs(a - b) > 1:
            assert (a, b) in self.confirmed
            flow[:, 0] += self.off
        elif b == a + 1 and b in np.atleast_1d(self.cut):
            flow[:, 0] += self.gap
        return StoredPair(kept, np.rint(flow * 16).astype(np.int16), self.flagged[kept], ~self.flagged[kept])


def straight(queries: np.ndarray) -> np.ndarray:
    """The truth `(M, T, 2)`."""
    return queries[:, None, :0:-1] + SPEED * (np.arange(T)[:, None] - queries[:, :1, None])


GRIDS = ["--device", "cpu", "--deform", "grid", "--field", "grid", "--grid_levels", "2", "--num_samples_ray", "4"]
QUERIES = np.array([[0, 10, 12], [4, 20, 30.5], [8, 25.25, 40]], np.float32)


def run(queries: np.ndarray, model: np.ndarray, store: Moving, frames: np.ndarray = BLACK,
        shown: bool = True) -> Followed:
    """`follow` with a model that shows every point in every frame, or none."""
    return follow(queries, model, np.full(model.shape[:2], shown), store, frames)


def blobs(speed: np.ndarray) -> np.ndarray:
    """Frames whose picture, a smooth one, moves by `speed` a frame."""
    y, x = np.mgrid[:H, :W]
    places = [(x - speed[0] * t, y - speed[1] * t) for t in range(T)]
    frames = [np.stack([np.sin(x / 3), np.cos(y / 4), np.sin((x + y) / 5)], -1) for x, y in places]
    return (np.stack(frames) * 100 + 120).astype(np.uint8)


def test_tracks_follow_flow_that_passes_the_forward_backward_check():
    """Also if the model is far from the flow and its patch does not match better."""
    found = run(QUERIES, straight(QUERIES) + 7, Moving())
    assert np.allclose(found.tracks, straight(QUERIES), atol=1e-4) and found.followed.all()


@pytest.mark.parametrize("gap,breaks", [(0.9, False), (1.1, True)])
def test_the_forward_backward_check_fails_above_one_pixel(gap, breaks):
    assert run(QUERIES, straight(QUERIES), Moving(5, gap=gap)).followed.all() != breaks


def test_after_a_failed_check_tracks_are_the_models_until_a_correspondence_confirms_them():
    """The break is between frames 4 and 5; frames 6 (from 2 and 4) and 3 (from 7) are confirmed."""
    model = straight(QUERIES) + 0.1
    found = run(QUERIES, model, Moving(5, ((2, 6), (4, 6), (7, 3))))
    expected = np.ones((3, T), bool)
    expected[:2, 5] = False
    expected[2, 4] = False
    assert (found.followed == expected).all()
    assert np.allclose(found.tracks[0], np.where(np.arange(T)[:, None] < 5, straight(QUERIES)[0], model[0]), atol=1e-4)
    assert np.allclose(found.tracks[2], np.where(np.arange(T)[:, None] > 4, straight(QUERIES)[2], model[2]), atol=1e-4)


@pytest.mark.parametrize("off,trusted", [(0.0, True), (0.4, True), (0.5, False), (7.0, False)])
def test_a_model_near_the_flow_is_trusted_after_a_failed_check(off, trusted):
    """The limit is 2/256 of the width of 60 px: 0.47 px."""
    queries = QUERIES[1:2]
    found = run(queries, straight(queries) + np.array([off, 0], np.float32), Moving(5))
    assert (found.trusted[0, 5:] == trusted).all() and (found.visible[0, 5:] == trusted).all()


@pytest.mark.parametrize("query,broken", [([2, 10, 12], (5, 6, 7, 8)), ([8, 25.25, 40], (4, 3, 2, 1, 0))])
def test_a_track_drifts_after_a_failed_check_if_the_model_is_elsewhere(query, broken):
    """The model is 7 px away. The point is hidden, and its position is that of the flow."""
    queries, broken = np.array([query], np.float32), list(broken)
    found = run(queries, straight(queries) + 7, Moving(5, gap=5))
    beyond = straight(queries) + np.array([5, 0]) * (query[0] < 5)
    assert np.allclose(found.tracks[0, broken], beyond[0, broken], atol=1e-4)
    assert not found.followed[0, broken].any() and not found.visible[0, broken].any()


@pytest.mark.parametrize("gap,off,to", [(1.5, 1.5, "flow"), (5, 7, "model"), (5, 20, None)])
def test_a_drifting_track_is_confirmed_where_a_correspondence_ends(gap, off, to):
    """At the position of the flow or of the model. From there the track follows the flow and is visible."""
    queries = np.array([[2, 10, 12]], np.float32)
    model = straight(queries) + np.array([7, 0])
    found = run(queries, model, Moving(5, ((2, 6),), gap=gap, off=off))
    assert found.followed[0].tolist() == [True] * 5 + [False] + [to is not None] * 3
    goes = model if to == "model" else straight(queries) + np.array([gap, 0])
    assert np.allclose(found.tracks[0, 6:], goes[0, 6:], atol=1e-4)
    assert (found.visible[0] == found.followed[0]).all()


def test_lost_flow_is_confirmed_although_a_trusted_model_has_moved_away():
    """The check fails between frames 4 and 5; from 6 the model stands still; a correspondence ends at the flow."""
    queries = np.array([[2, 10, 12]], np.float32)
    model = straight(queries)
    model[:, 6:] = model[:, 5:6]
    found = run(queries, model, Moving(5, ((3, 7),), gap=1.5, off=1.5))
    assert found.followed[0].tolist() == [True] * 5 + [False] * 2 + [True] * 2 and found.trusted[0, 5:7].all()
    assert np.allclose(found.tracks[0, 5:7], model[0, 5:7])
    assert np.allclose(found.tracks[0, 7:], straight(queries)[0, 7:] + np.array([1.5, 0]), atol=1e-4)


@pytest.mark.parametrize("again", [5, 6])
def test_a_drifting_track_switches_to_a_model_whose_patch_matches_better(again):
    """The model is right from the frame of the failed check, or from the next one; then the point is hidden, because
    no correspondence has confirmed it."""
    queries = np.array([[2, 10, 12]], np.float32)
    model = straight(queries)
    model[:, :again] += 7
    found = run(queries, model, Moving(5), blobs(SPEED))
    assert np.allclose(found.tracks[0, again:], straight(queries)[0, again:], atol=1e-4)
    assert np.allclose(found.tracks[0, 5:again], straight(queries)[0, 5:again] + np.array([5, 0]), atol=1e-4)
    assert found.followed[0].tolist() == [True] * 5 + [False] * 4
    assert (found.visible[0, 5:] == (again == 5)).all()


def test_after_a_second_failed_check_the_track_is_the_models():
    """Failed check at 5 with the model elsewhere, confirmed at the model in 6, failed check at 7 near the model."""
    queries = np.array([[2, 10, 12]], np.float32)
    model = straight(queries)
    model[:, :6] += 7
    found = run(queries, model, Moving((5, 7), ((2, 6),)))
    assert found.followed[0].tolist() == [True] * 5 + [False, True, False, False]
    assert np.allclose(found.tracks[0, 6:], model[0, 6:]) and found.trusted[0, 7:].all()


@pytest.mark.parametrize("change,visible", [(0, True), (2, False), (60, False)])
def test_a_followed_point_with_a_matching_patch_is_visible_although_the_model_hides_it(change, visible):
    """Colors change by one a frame while the model shows the point, and by `change` after that."""
    queries, shown = np.array([[1, 10, 12]], np.float32), np.ones((1, T), bool)
    shown[0, 4:6] = False
    frames = BLACK + np.arange(T, dtype=np.uint8)[:, None, None, None]
    frames[4:] = frames[3] + change
    found = follow(queries, straight(queries), shown, Moving(), frames)
    assert found.followed.all() and found.visible[0].tolist() == [True] * 4 + [visible] * 2 + [True] * 3


def test_a_point_that_the_model_never_shows_is_hidden():
    """There is no patch of a visible frame to compare with."""
    assert not run(QUERIES, straight(QUERIES), Moving(), shown=False).visible.any()


EVERY_OTHER = tuple((a, a + 2 * step) for step in (1, -1) for a in range(T) if 0 <= a + 2 * step < T)


@pytest.mark.parametrize("query", [[0, 12, 20], [8, 25.25, 40]])
@pytest.mark.parametrize("confirmed", [(), EVERY_OTHER])
def test_a_track_leaves_drifting_flow_for_a_model_whose_patch_matches_better(query, confirmed):
    """The picture moves by 0.3 px per frame more than the flow. The model, which is right, is 2/256 of the width away
    from the flow in the second frame. From the third frame at the latest the track is the model's, also if
    correspondences of that flow confirm it."""
    queries, drift = np.array([query], np.float32), np.array([0.3, 0], np.float32)
    away = np.abs(np.arange(T) - query[0])
    model = straight(queries) + drift * (np.arange(T)[:, None] - query[0])
    found = run(queries, model, Moving(confirmed=confirmed), blobs(SPEED + drift))
    assert found.followed[0, away <= 1].all() and not found.followed[0, away >= 3].any()
    assert np.allclose(found.tracks[0, away >= 3], model[0, away >= 3]) and found.trusted[0, away >= 3].all()


@pytest.mark.parametrize("off", [0.3, 3.0, 12.0])
def test_a_model_whose_patch_matches_worse_is_ignored(off):
    """The flow is right; the model is far from it or near it."""
    found = run(QUERIES, straight(QUERIES) + np.array([off, 0]), Moving(), blobs(SPEED))
    assert found.followed.all() and np.allclose(found.tracks, straight(QUERIES), atol=1e-4)


NOWHERE = np.zeros(H * W, bool)
ODD = np.indices((H, W)).sum(0).ravel() % 2 == 1  # pixels of a pair that --density half stores


@pytest.mark.parametrize("options,model_off,confirms", [
    ({}, 0.0, True),
    ({"confirmed": ()}, 0.0, False),
    ({"off": 0.15}, 0.0, True), ({"off": 0.35}, 0.0, False),  # a 256th of 60 px is 0.23
    ({}, 0.15, True), ({}, 0.35, False),                      # the model is elsewhere
    ({"flagged": NOWHERE}, 0.0, False), ({"stored": NOWHERE}, 0.0, False),
    ({"stored": ODD, "keep": "half"}, 0.0, True), ({"stored": ~ODD, "keep": "half"}, 0.0, True),
    ({"stored": ~ODD}, 0.0, True), ({"stored": ODD}, 0.0, False),  # no correspondence of this pixel
    ({"confirmed": ((5, 7), (5, 8))}, 0.0, False),            # from a frame in which the point was lost
    ({"confirmed": ((0, 6),)}, 0.0, False),                   # from before the query
])
def test_which_correspondences_confirm_the_model(options, model_off, confirms):
    query = np.array([[2, 10, 12]], np.float32)
    model = straight(query) + np.array([model_off, 0], np.float32)
    found = run(query, model, Moving(**{"cut": 5, "confirmed": ((2, 6),)} | options))
    assert found.followed[0].tolist() == [True] * 5 + [False] + [confirms] * 3
    assert np.allclose(found.tracks[0, 5:], model[0, 5:], atol=1e-4)


@pytest.mark.parametrize("off", [0.1, 7.0])
def test_tracks_in_some_frames_equal_those_in_all_frames(off):
    model, store, frames = straight(QUERIES[:2]) + off, Moving(5, ((2, 6), (3, 7))), blobs(SPEED + 0.1)
    queries = np.array([[2, 10, 12], [4, 20, 30.5]], np.float32)
    shown = np.random.default_rng(0).random((2, T)) < 0.5
    whole, part = follow(queries, model, shown, store, frames), follow(
        queries, model[:, 2:8], shown[:, 2:8], store, frames, 2)
    assert all(np.array_equal(vars(whole)[key][:, 2:8], some) for key, some in vars(part).items())


@pytest.mark.parametrize("pair", [(4, 5), (5, 4)])
def test_a_missing_pair_is_a_failed_check(pair):
    store = Moving()
    store.pairs = np.array([p for p in store.pairs.tolist() if tuple(p) != pair])
    found = run(QUERIES, straight(QUERIES) + 7, store, blobs(SPEED))
    assert (found.followed[0] == (np.arange(T) < 5)).all() and (found.visible[0] == (np.arange(T) < 5)).all()
    assert np.allclose(found.tracks[0, 5:], straight(QUERIES)[0, 5:] + 7)  # there is no flow to follow


def test_points_outside_the_frame_are_not_confirmed():
    """The frame is 60 px wide. Extrapolated flow at the border can pass the check."""
    queries = np.array([[0, 10, 50]], np.float32)
    found = run(queries, straight(queries), Moving(confirmed=((3, 5), (4, 6))))
    assert not found.followed[0, 5:].any()


def test_tracks_that_leave_the_frame_are_the_models():
    """Outside the frame there is no flow, and the flow of the border must not be used."""
    queries = np.array([[0, 10, 50]], np.float32)
    model = straight(queries) + 1
    found = run(queries, model, Moving())
    assert not found.followed[0, 5:].any() and np.allclose(found.tracks[0, 5:], model[0, 5:])


def test_outside_the_frame_flow_is_not_followed():
    queries = np.array([[0, 10, 50]], np.float32)
    found = run(queries, straight(queries) + 0.1, Moving())
    assert found.followed[0].tolist() == [True] * 5 + [False] * 4
    assert np.allclose(found.tracks[0, 5:], straight(queries)[0, 5:] + 0.1)


def test_flow_between_pixels_is_interpolated_as_for_chains():
    from inference.flow_guided_tracker import _flow

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


def test_the_tracker_of_a_run_with_follow_flow(small_sequence, tmp_path):
    """On a rendered clip, with a model in which nothing moves: tracks move, depths are the model's, and tracks in some
    frames equal those in all frames."""
    options = parse("eval", [*GRIDS, "--data_dir", str(small_sequence), "--follow_flow", "1"])
    sequence = open_sequence(small_sequence)
    model = new_model(options, len(sequence), sequence.size, torch.device("cpu"))
    tracker, plain = new_tracker(model, sequence, options), Tracker(model)
    assert isinstance(tracker, FlowGuidedTracker)
    queries = np.stack([np.arange(6) % len(sequence), *np.random.default_rng(0).uniform(12, 50, (2, 6))], -1)
    found, still = tracker.track(queries), plain.track(queries)
    expected = follow(queries, still.tracks, still.visible, open_correspondences(sequence), sequence.frames())
    assert np.array_equal(found.tracks, expected.tracks) and np.abs(found.tracks - still.tracks).max() > 0.5
    assert np.array_equal(found.visible, expected.visible)
    assert np.array_equal(found.depth, still.depth)
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
