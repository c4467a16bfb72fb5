"""--follow_flow: tracks that follow stored flow, and the model where flow is lost."""

import shutil
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.tracking_rules import tracked
from common.errors import UserError
from common.geometry import sample
from configs.options import parse
from evaluation.baselines import chained_flow_tracks, static_tracks
from inference.flow_guided_tracker import (
    COLOR_ERROR,
    FlowGuidedTracker,
    ModelProposal,
    StoredFlow,
    guide,
)
from inference.frame_colors import FrameColors
from inference.load_run import new_tracker
from inference.multi_interval_flow import Paths
from inference.tracker import Tracker
from loaders.correspondence_format import StoredPair
from loaders.correspondences import open_correspondences
from loaders.sequence import open_sequence
from loaders.track_files import save_tracks
from models.factory import new_model
from preprocessing.track_correspondences import build_from_files

H, W, T, SPEED = 64, 96, 9, np.array([2.0, 1.0], np.float32)
ALL = np.ones(H * W, bool)
QUERIES = np.array([[0, 10, 12], [4, 20, 30.5], [8, 25.25, 40]], np.float32)
GRIDS = ["--device", "cpu", "--deform", "grid", "--field", "grid", "--grid_levels", "2", "--num_samples_ray", "4"]


class Moving:
    """A store in which everything moves by SPEED a frame. The pairs `wrong` lead 20 px aside, and not back. Besides the
    interval 1, the intervals `far` are stored; their pairs hold the pixels `stored` `(H W,)`."""

    def __init__(self, wrong=(), far: tuple[int, ...] = (), stored: np.ndarray = ALL):
        self.size, self.num_frames, self.root = (H, W), T, "store"
        self.wrong, self.kept = wrong, np.flatnonzero(stored)
        self.pairs = np.array([(a, b) for a in range(T) for b in range(T) if abs(a - b) in (1, *far)])
        self.counts = np.ones((T, T), int)

    def index(self, a: int, b: int) -> StoredPair:
        kept = np.arange(H * W) if abs(a - b) == 1 else self.kept
        flow = np.broadcast_to(SPEED * (b - a), (len(kept), 2)).copy()
        if (a, b) in self.wrong:
            flow += 20
        cycle = np.ones(len(kept), bool)
        return StoredPair(kept, np.rint(flow * 16).astype(np.int16), cycle, ~cycle)


def straight(queries: np.ndarray) -> np.ndarray:
    """The true tracks `(M, T, 2)`."""
    return queries[:, None, :0:-1] + SPEED * (np.arange(T)[:, None] - queries[:, :1, None])


def proposal(model: np.ndarray, shown: np.ndarray | bool = True) -> ModelProposal:
    """A model with these positions `(M, T, 2)`, whose visibility is `shown`."""
    return ModelProposal(model.astype(np.float32), np.broadcast_to(shown, model.shape[:2]), W)


def run(model: np.ndarray, store: Moving, shown: np.ndarray | bool = True, queries: np.ndarray = QUERIES) -> Paths:
    """`guide` with a model whose visibility is `shown`."""
    return guide(queries, StoredFlow(store), proposal(model, shown))


def across(cut: int) -> set[tuple[int, int]]:
    """All ordered pairs between a frame before `cut` and another one."""
    return {(a, b) for a in range(T) for b in range(T) if (a < cut) != (b < cut)}


@pytest.mark.parametrize("off", [0.0, 7.0])
def test_tracks_follow_consistent_flow_wherever_the_model_is(off):
    found = run(straight(QUERIES) + off, Moving())
    assert np.allclose(found.tracks, straight(QUERIES), atol=1e-4) and found.visible.all()


def test_long_intervals_pass_over_inconsistent_flow():
    """The flow between frames 4 and 5 is wrong; pairs two frames apart are not."""
    store = Moving({(4, 5), (5, 4)}, far=(2,))
    queries = QUERIES[::2]
    found = run(straight(queries) + 7, store, queries=queries)
    assert np.allclose(found.tracks, straight(queries), atol=1e-4) and found.visible.all()


def test_a_model_that_agreed_with_the_track_goes_on_where_flow_is_lost():
    """No flow leads from the frames before 5 to those after them. The model, half a pixel off, does; then flow is
    followed from its position."""
    model = straight(QUERIES) + np.array([0.5, 0])
    found = run(model, Moving(across(5)))
    assert np.abs(found.tracks - straight(QUERIES)).max() <= 0.51
    assert found.visible.all()


def test_a_model_that_was_elsewhere_is_not_believed_where_flow_is_lost():
    """20 px off before: where flow is lost the point is hidden."""
    found = run(straight(QUERIES[:1]) + 20, Moving(across(5)), queries=QUERIES[:1])
    assert np.allclose(found.tracks[0, :5], straight(QUERIES)[0, :5], atol=1e-4)
    assert (found.visible[0] == (np.arange(T) < 5)).all()


@pytest.mark.parametrize("off,hidden", [(0.5, True), (20.0, False)])
def test_the_model_says_where_a_point_is_occluded_if_it_agrees(off, hidden):
    """Flow does not notice: it goes on with the surface in front, here the same motion. In frame 6 the model shows the
    point again."""
    shown = ~np.isin(np.arange(T), (4, 5))
    query = QUERIES[:1]
    found = run(straight(query) + np.array([off, 0]), Moving(far=(2, 4)), shown, queries=query)
    assert (found.visible[0] == (shown | (not hidden))).all()


@pytest.mark.parametrize("pair", [(4, 5), (5, 4)])
def test_a_pair_that_is_missing_in_one_direction_is_no_flow(pair):
    """Positions are the model's from there on, hidden since the model was elsewhere."""
    store = Moving()
    store.pairs = np.array([p for p in store.pairs.tolist() if tuple(p) != pair])
    found = run(straight(QUERIES[:1]) + 20, store, queries=QUERIES[:1])
    assert (found.visible[0] == (np.arange(T) < 5)).all()
    assert np.allclose(found.tracks[0, 5], straight(QUERIES)[0, 5] + 20)


def test_points_outside_the_frame_are_hidden():
    query = np.array([[0, 10, 86]], np.float32)
    found = run(straight(query), Moving(far=(2,)), queries=query)
    assert (found.visible[0] == (straight(query)[0, :, 0] <= W - 0.5)).all() and not found.visible.all()


@pytest.mark.parametrize("off", [0.1, 7.0])
def test_tracks_in_some_frames_equal_those_in_all_frames(off):
    queries = np.array([[2, 10, 12], [4, 20, 30.5]], np.float32)
    model = (straight(queries) + off).astype(np.float32)
    store = Moving({(5, 6), (6, 5)}, far=(2,))
    shown = np.random.default_rng(0).random((2, T)) < 0.5
    whole = guide(queries, StoredFlow(store), proposal(model, shown))
    part = guide(queries, StoredFlow(store, 2), proposal(model[:, 2:8], shown[:, 2:8]))
    assert all(np.array_equal(vars(whole)[key][:, 2:8], some) for key, some in vars(part).items())


def test_flow_between_pixels_is_bilinear_and_uses_the_stored_pixels_only():
    """Of every second pixel of a checkerboard, two of four corners are left; constant flow stays constant."""
    points = np.random.default_rng(1).uniform(1, 60, (300, 2)).astype(np.float32)
    checkerboard = np.indices((H, W)).sum(0).ravel() % 2 == 0
    ends, squared = StoredFlow(Moving(far=(2,), stored=checkerboard)).step(0, 2, points)
    known = np.isfinite(squared)
    assert known.mean() > 0.8 and np.allclose(ends[known], points[known] + 2 * SPEED, atol=1e-4)
    corner = np.arange(H * W) == 0  # not next to any point
    assert np.isinf(StoredFlow(Moving(far=(2,), stored=corner)).step(0, 2, points)[1]).all()

    values = np.random.default_rng(0).integers(-40, 40, (H * W, 2)).astype(np.int16)
    store = Moving()
    store.index = lambda a, b: StoredPair(np.arange(H * W), values, ALL, ~ALL)
    ends, _ = StoredFlow(store).step(0, 1, points)
    assert np.allclose(ends - points, sample(values.reshape(H, W, 2) / 16, points), atol=1e-4)


@pytest.mark.parametrize("parity", [0, 1])
def test_every_other_pixel_tells_a_linear_flow_exactly(parity):
    """Each pair of a store with half of the pixels: a zoom moves points between its pixels as if all were stored."""
    y, x = np.indices((H, W))
    center = np.array([W / 2, H / 2])
    pixels = np.flatnonzero((x + y + parity) % 2 == 0)
    flow = (np.stack([x, y], -1) - center).reshape(-1, 2)[pixels]  # of a zoom by 2: 16 steps of 1/16 pixel
    store = Moving(far=(2,))
    store.index = lambda a, b: StoredPair(pixels, (16 * flow).astype(np.int16), pixels >= 0, pixels < 0)
    points = np.random.default_rng(0).uniform([1, 1], [W - 2, H - 2], (300, 2)).astype(np.float32)
    ends, squared = StoredFlow(store).step(0, 2, points)
    assert np.isfinite(squared).all() and np.allclose(ends - points, points - center, atol=1e-4)


GRAY = np.full((H, W, 3), 90, np.uint8)
LIGHTER = np.full((H, W, 3), 120, np.uint8)
LIGHTNESS = {90: 38.2, 120: 50.5}  # CIELAB


def gray_from(t: int) -> FrameColors:
    """Frames that are lighter from frame t on."""
    return FrameColors(lambda frame: LIGHTER if frame >= t else GRAY)


def test_tentative_flow_is_followed_where_colors_are_compared():
    """Correspondences to points that are occluded are not."""
    points = np.array([[20, 30]], np.float32)
    store = Moving(far=(2,))
    plain = store.index
    for flags, expected in (((ALL, ~ALL), 0), ((ALL, ALL), 0), ((~ALL, ALL), np.inf)):
        store.index = lambda a, b, flags=flags: replace(plain(a, b), cycle=flags[0], occlusion=flags[1])
        assert StoredFlow(store, 0, gray_from(T)).step(0, 2, points)[1] == pytest.approx(expected)
        without = StoredFlow(store).step(0, 2, points)[1]
        assert without == (np.inf if flags[1] is ALL else expected)

    store.counts[0, 2] = 0
    store.index = lambda a, b: replace(plain(a, b), cycle=ALL, occlusion=ALL)
    assert StoredFlow(store, 0, gray_from(T)).step(0, 2, points)[1] == pytest.approx(0)


@pytest.mark.parametrize("first", [0, 2])
def test_flow_costs_the_difference_in_color_of_its_ends(first):
    """Frames are counted from `first`. Flow between adjacent frames costs nothing."""
    flow = StoredFlow(Moving(far=(2, 4)), first, gray_from(4))
    points = np.array([[20, 30], [40.5, 20.25]], np.float32)
    expected = (COLOR_ERROR * W * (LIGHTNESS[120] - LIGHTNESS[90])) ** 2
    for a, b in ((2, 4), (4, 2), (3, 5), (2, 6), (0, 4), (5, 1)):
        if min(a, b) >= first:
            assert flow.step(a - first, b - first, points)[1] == pytest.approx([expected] * 2, rel=0.1)
    for a, b in ((2, 3), (3, 4), (4, 3)):
        assert flow.step(a - first, b - first, points)[1] == pytest.approx([0, 0], abs=1e-6)


def test_tracks_keep_to_their_color():
    """Flow between frames 2 and 4 leads a point of the dark half into the light half, and back again without error. All
    other flow stays in the dark half, with a forward-backward error of half a pixel."""
    image = GRAY.copy()
    image[:, 48:] = 220
    store = Moving(far=(2,))
    plain = store.index
    aside = np.array([16 * 16, 0], np.int16)
    drift = np.array([8, 0], np.int16)

    def index(a: int, b: int) -> StoredPair:
        pair = plain(a, b)
        change = np.sign(b - a) * aside if abs(a - b) == 2 and max(a, b) == 4 else drift * (a < b)
        return replace(pair, flow_q=pair.flow_q + change)

    store.index = index
    query = np.array([[0, 10, 34]], np.float32)
    away = np.full((1, T, 2), 500, np.float32)
    for colors, dark in ((None, False), (FrameColors(lambda t: image), True)):
        found = guide(query, StoredFlow(store, 0, colors), proposal(away, False))
        assert (found.tracks[0, 4, 0] < 48) == dark


def test_the_model_hides_points_above_the_threshold(small_sequence, monkeypatch):
    monkeypatch.setattr(Tracker, "_track_some", in_doubt_everywhere(Tracker._track_some))
    options = parse("eval", [*GRIDS, "--data_dir", str(small_sequence), "--follow_flow", "1"])
    sequence = open_sequence(small_sequence)
    model = new_model(options, len(sequence), sequence.size, torch.device("cpu"))
    queries = np.stack([np.arange(20) % 3, *np.random.default_rng(0).uniform(12, 50, (2, 20))], -1)
    hiding, trusting = (new_tracker(model, sequence, Namespace(**vars(options) | {"occlusion_th": threshold}))
                        for threshold in (0.85, 0.95))
    found = hiding.track(queries)
    some = hiding.track(queries, [3, 1])
    assert np.array_equal(some.tracks, found.tracks[:, [3, 1]])
    assert np.array_equal(some.visible, found.visible[:, [3, 1]])
    assert found.visible.sum() < trusting.track(queries).visible.sum()


def in_doubt_everywhere(track_some):
    """`Tracker._track_some` with occlusion scores of 0.9."""
    def replaced(self, *args):
        positions, depths, scores = track_some(self, *args)
        return positions, depths, np.full_like(scores, 0.9)
    return replaced


@pytest.mark.parametrize("colors", [False, True])
def test_a_pair_without_correspondences_is_no_flow(colors):
    store = Moving(far=(2,), stored=~ALL)
    store.counts[0, 2] = 0
    flow = StoredFlow(store, 0, gray_from(T) if colors else None)
    found = flow.step(0, 2, np.array([[20, 30]], np.float32))
    assert np.isinf(found[1]).all() if colors else found is None
    store.counts[0, 1] = 0  # a cut
    assert StoredFlow(store, 0, gray_from(T)).step(0, 1, np.array([[20, 30]], np.float32)) is None


def test_a_change_of_light_hides_nothing():
    """From frame 5 on everything is far lighter, and no flow leads from frame 4 to frame 5."""
    white = np.full((H, W, 3), 250, np.uint8)
    colors = FrameColors(lambda t: white if t >= 5 else GRAY)
    query = QUERIES[:1]
    away = straight(query) + 50
    flow = StoredFlow(Moving({(4, 5), (5, 4)}, far=(2,)), 0, colors)
    found = guide(query, flow, proposal(away, False))
    assert found.visible.all() and np.allclose(found.tracks, straight(query), atol=1e-4)


@pytest.mark.parametrize("size", [(32, 48), (300, 520), (2, 300)])
def test_colors_at_points_are_those_of_the_frame(size):
    """Of a gradient, frames of any size; many points at once, and none."""
    H, W = size
    ramp = np.linspace(60, 190, W)[None, :, None].repeat(H, axis=0).repeat(3, axis=2).astype(np.uint8)
    plain = np.full((H, W, 3), 60, np.uint8)
    colors = FrameColors([ramp, plain].__getitem__)
    x = np.random.default_rng(0).uniform(W * 0.1, W * 0.9, 3_000)
    p = np.column_stack([x, np.full(3_000, (H - 1) / 2)]).astype(np.float32)
    lightness = 24.4 + (p[:, 0] / (W - 1)) * (76.8 - 24.4)  # of gray 60 and 190; between them nearly linear
    assert np.abs(colors.difference(0, p, 1, p) - (lightness - 24.4)).max() < 2.5
    assert colors.difference(0, p[:0], 1, p[:0]).shape == (0,)


def test_colors_of_frames_are_cielab_and_hide_fine_texture():
    """A checkerboard of single pixels has the color of its mean."""
    checkers = (np.indices((256, 256)).sum(0) % 2 * 100 + 50).astype(np.uint8)[..., None].repeat(3, axis=2)
    frames = [checkers, np.full_like(checkers, 100), np.full_like(checkers, (255, 0, 0)), np.zeros_like(checkers)]
    colors = FrameColors(frames.__getitem__)
    p = np.random.default_rng(0).uniform(20, 230, (50, 2)).astype(np.float32)
    assert colors.difference(0, p, 1, p[::-1]).max() < 1
    red = np.linalg.norm([53.2, 80.1, 67.2])  # CIELAB of sRGB's red
    assert colors.difference(2, p, 3, p) == pytest.approx([red] * 50, abs=1)


def test_the_benchmark_of_the_rules_leaves_out_what_it_says(small_sequence):
    """With all rules it tracks as --follow_flow does. Without the model, visible points do not depend on it; a model
    that may not decide about occlusion hides nothing that flow follows."""
    options = parse("eval", [*GRIDS, "--data_dir", str(small_sequence), "--follow_flow", "1"])
    sequence = open_sequence(small_sequence)
    model = new_model(options, len(sequence), sequence.size, torch.device("cpu"))
    queries = np.stack([np.zeros(40), *np.random.default_rng(0).uniform(1, 62, (2, 40))], -1)
    still = Tracker(model).track(queries)
    context = open_correspondences(sequence), FrameColors(sequence.frame)

    expected = new_tracker(model, sequence, options).track(queries)
    found = tracked(queries, still, *context)
    assert np.array_equal(found.tracks, expected.tracks) and np.array_equal(found.visible, expected.visible)

    alone, elsewhere = (tracked(queries, replace(still, tracks=still.tracks + off), *context, use_model=False)
                        for off in (0, 40))
    assert np.array_equal(alone.visible, elsewhere.visible) and alone.visible[:, 1:].any()
    followed = (alone.tracks == elsewhere.tracks).all(axis=-1)  # elsewhere, no flow leads to the frame
    assert followed[alone.visible].all() and followed[~alone.visible].any()

    hiding = replace(still, visible=np.zeros_like(still.visible))
    believed, not_believed = (tracked(queries, hiding, *context, model_occludes=rule) for rule in (True, False))
    assert not_believed.visible.sum() > believed.visible.sum()
    assert np.array_equal(not_believed.visible, alone.visible)


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
    with pytest.raises(UserError, match="or say --no-follow_flow"):
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
    flow = StoredFlow(open_correspondences(sequence), 0, FrameColors(sequence.frame))
    expected = guide(queries, flow, ModelProposal(still.tracks, still.visible, max(sequence.size)))
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
    with pytest.raises(UserError, match="--no-follow_flow"):
        new_tracker(model, open_sequence(bare), options)
