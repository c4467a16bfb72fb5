"""Motion layers as one similarity a frame each, from the tracks of stores whose motion is known."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from loaders.correspondence_format import DensePair
from tests.fake_store import FakeStore
from training import layer_similarities
from training.layer_similarities import find_layers
from training.similarity import apply, similarity

SIZE, T = (48, 66), 17
CENTER = np.array([32.5, 23.5])


def motion(shift, angle=0.0, zoom=1.0):
    """Similarities about the frame's center to frames 0 to T - 1 `(T, 3, 3)`; identity in frame T // 2. shift: pixels a
    frame; angle, zoom: of the whole clip."""
    out = np.tile(np.eye(3), (T, 1, 1))
    for t in range(T):
        share = (t - T // 2) / (T - 1)
        a, z = angle * share, zoom ** share
        R = z * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
        out[t, :2] = np.concatenate([R, (CENTER - R @ CENTER + share * (T - 1) * R @ shift)[:, None]], 1)
    return out


class TwoLayers(FakeStore):
    """A background, and a disc in front of it in the frames `shown`. Their motions `(T, 3, 3)` are from the middle
    frame to every frame."""

    def __init__(self, background, disc, center=(35.0, 23.0), radius=11.0, shown=range(T)):
        super().__init__(SIZE, T)
        self.background = background
        self.disc = disc
        self.center = np.array(center)
        self.radius = radius
        self.shown = shown
        self.index = cache(self.index)

    def on_disc(self, t, p):
        """Whether positions p of frame t are on the disc."""
        home = apply(np.linalg.inv(self.disc[t]), p)
        return (np.linalg.norm(home - self.center, axis=-1) < self.radius) & (t in self.shown)

    def dense(self, i, j):
        H, W = SIZE
        p = np.stack(np.meshgrid(np.arange(W), np.arange(H)), -1).astype(float)
        on_disc = self.on_disc(i, p)
        q = np.where(on_disc[..., None], apply(self.disc[j] @ np.linalg.inv(self.disc[i]), p),
                     apply(self.background[j] @ np.linalg.inv(self.background[i]), p))
        inside = ((q >= 0) & (q <= [W - 1, H - 1])).all(-1)
        seen = inside & (self.on_disc(j, q) == on_disc)
        return DensePair((q - p).astype(np.float32), seen, seen, ~seen)

    def errors(self, found):
        """Largest error of both layers in every frame `(2, T)`, in pixels of that frame: of the background over the
        frame, of the disc over its extent."""
        border = np.stack(np.meshgrid([0, 33, 65], [0, 24, 47]), -1).reshape(-1, 2).astype(float)
        out = []
        for maps, truth, home in ((found.background, self.background, None),
                                  (found.foreground, self.disc, self.center + self.radius * np.array(
                                      [[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]]))):
            for t in range(T):
                p = border if home is None else apply(truth[t], home)
                to_middle = np.vstack([maps[t], [0, 0, 1]])
                out.append(np.abs(apply(truth[t] @ to_middle, p) - p).max())
        return np.array(out).reshape(2, T)


def two_layers(store):
    """The two layers that are found, `(T, 2, 3)` each."""
    foreground, background = find_layers(store, 2)
    return SimpleNamespace(foreground=foreground, background=background)


STEADY = motion(np.array([0.7, -0.3]), angle=0.3, zoom=1.3)
TRAVELING = motion(np.array([12.0, 0.0]), angle=1.0, zoom=1.6)
FAST = motion(np.array([17.0, 0.0]), angle=1.0, zoom=1.6)  # a quarter of the frame with each frame
DISC = motion(np.array([-0.9, 0.5]), angle=-0.8, zoom=0.9)      # stays in the frame


def corrupted(monkeypatch, share):
    """Replace a share of all tracks by random walks that count as visible."""
    follow = layer_similarities.follow_intervals

    def wrong(*arguments):
        paths = follow(*arguments)
        rng = np.random.default_rng(0)
        rows = rng.random(len(paths.tracks)) < share
        start = arguments[0][rows, :0:-1]
        k = int(arguments[0][0, 0])
        walk = rng.normal(0, 3, (rows.sum(), T, 2)).cumsum(1)
        paths.tracks[rows] = start[:, None] + walk - walk[:, k:k + 1]
        paths.visible[rows] = True
        return paths

    monkeypatch.setattr(layer_similarities, "follow_intervals", wrong)


@pytest.mark.parametrize("wrong", [0.0, 0.3])
@pytest.mark.parametrize("background", [STEADY, TRAVELING], ids=["steady", "traveling"])
def test_both_layers_are_found_within_a_pixel(background, wrong, monkeypatch):
    """Where the camera travels, the first and the last frame have nothing in common with the middle one."""
    store = TwoLayers(background, DISC)
    if background is TRAVELING:
        assert not any(store.index(t, T // 2).cycle[~store.on_disc(t, pixels()).ravel()].any() for t in (0, T - 1))
    if wrong:
        corrupted(monkeypatch, wrong)
    found = two_layers(store)
    assert np.allclose(found.background[T // 2], np.eye(3)[:2])
    assert np.allclose(found.foreground[T // 2], np.eye(3)[:2])
    errors = store.errors(found)
    assert errors.max() < 1, errors.round(1)


@pytest.mark.parametrize("reach", [4, 6])
def test_tracks_need_not_be_followed_through_the_whole_clip(reach, monkeypatch):
    monkeypatch.setattr(layer_similarities, "MAX_REACH", reach)
    store = TwoLayers(STEADY, DISC)
    assert store.errors(two_layers(store)).max() < 1


def test_the_background_is_followed_from_frame_to_frame_if_need_be():
    store = TwoLayers(FAST, DISC)
    assert store.errors(two_layers(store)).max() < 1


def pixels():
    return np.stack(np.meshgrid(np.arange(SIZE[1]), np.arange(SIZE[0])), -1).astype(float)


def test_a_layer_that_is_lost_goes_on_at_its_velocity_against_the_background():
    """The disc is not seen in the first three frames and the last three."""
    store = TwoLayers(motion(np.array([1.5, -0.5])), motion(np.array([-0.9, 0.5])), shown=range(3, T - 3))
    errors = store.errors(two_layers(store))
    assert errors.max() < 1, errors.round(1)


def test_an_object_that_leaves_the_frame_rests_outside():
    store = TwoLayers(STEADY, motion(np.array([8.0, 0.0])), radius=8.0)
    found = two_layers(store)
    assert store.errors(found)[0].max() < 1
    angles = np.linspace(0, 2 * np.pi, 16)
    disc = store.center + store.radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for t in (0, T - 1):
        x, y = apply(np.linalg.inv(np.vstack([found.foreground[t], [0, 0, 1]])), disc).T
        assert not ((x > 0) & (x < SIZE[1] - 1) & (y > 0) & (y < SIZE[0] - 1)).any()
        assert np.abs(x - SIZE[1] / 2).min() < SIZE[1]  # the true disc is farther away


def test_without_a_foreground_its_layer_moves_as_the_background():
    found = two_layers(TwoLayers(STEADY, DISC, shown=()))
    assert np.allclose(found.foreground, found.background)


def test_where_no_flow_is_stored_the_layers_rest(monkeypatch):
    store = TwoLayers(STEADY, DISC)
    store.counts[:4] = store.counts[:, :4] = 0
    found = two_layers(store)
    for maps in (found.background, found.foreground):
        assert np.allclose(maps[:4], maps[4])
    assert store.errors(found)[:, 4:].max() < 1
    store.counts[:] = 0
    followed = []
    follow = layer_similarities.follow_intervals
    monkeypatch.setattr(layer_similarities, "follow_intervals", lambda *a: followed.append(a) or follow(*a))
    nothing = two_layers(store)
    assert len(followed) <= 3  # the start frames' tracks, not those of every frame
    assert np.array_equal(nothing.background, np.tile(np.eye(3)[:2], (T, 1, 1)))
    assert np.allclose(nothing.foreground, nothing.background)


@pytest.mark.parametrize("outliers", [0.0, 0.4])
def test_a_similarity_is_fitted_despite_outliers(outliers):
    rng = np.random.default_rng(0)
    S = np.array([[0.8, -0.6, 300.0], [0.6, 0.8, -50.0]]) * 1.5
    p = rng.uniform(0, 200, (100, 2))
    q = apply(S, p) + rng.normal(0, 0.05, p.shape)
    wrong = rng.random(100) < outliers
    q[wrong] += rng.normal(0, 80, (wrong.sum(), 2))
    assert np.abs(apply(similarity(p, q, 1.0), p) - apply(S, p)).max() < 0.2
    weights = np.where(wrong, 0, 1)
    assert np.abs(apply(similarity(p, q, 1.0, weights=weights), p) - apply(S, p)).max() < 0.2
    assert similarity(p[:5], q[:5], 1.0) is None


def test_a_blank_frame_loses_no_layer():
    store = TwoLayers(STEADY, DISC)
    blank = T // 2 + 3
    store.counts[blank] = store.counts[:, blank] = 0
    errors = np.delete(store.errors(two_layers(store)), blank, axis=1)
    assert errors.max() < 1


@pytest.mark.parametrize("cut", [5, 7, 9, 12])
def test_after_a_cut_the_layers_follow_the_other_scene(cut):
    """The position of the other scene in canonical space is arbitrary, but its frames fit each other."""
    store = TwoLayers(STEADY, DISC)
    store.counts[:cut, cut:] = store.counts[cut:, :cut] = 0
    found = two_layers(store)
    p = np.array([[0, 0], [65, 0], [0, 47], [65, 47]], float)
    for t in range(cut + 1, T):
        for maps, truth, points in ((found.background, store.background, p),
                                    (found.foreground, store.disc, store.center[None])):
            to_cut = np.linalg.inv(np.vstack([maps[cut], [0, 0, 1]])) @ np.vstack([maps[t], [0, 0, 1]])
            expected = truth[cut] @ np.linalg.inv(truth[t])
            start = points if points is p else apply(truth[t], points)
            assert np.abs(apply(to_cut, start) - apply(expected, start)).max() < 1, t


class ThreeLayers(TwoLayers):
    """Another disc, behind the first one or in front of it."""

    def __init__(self, background, disc, other, other_in_front=False, other_center=(18.0, 30.0), **kind):
        super().__init__(background, disc, **kind)
        self.other = other
        self.other_center = np.array(other_center)
        self.other_in_front = other_in_front

    def surface(self, t, p):
        """0 where a position of frame t shows the background, 1 where the disc, 2 where the other one."""
        first = self.on_disc(t, p)
        second = np.linalg.norm(apply(np.linalg.inv(self.other[t]), p) - self.other_center, axis=-1) < self.radius
        return np.where(second & (~first | self.other_in_front), 2, first.astype(int))

    def dense(self, i, j):
        H, W = SIZE
        p = np.stack(np.meshgrid(np.arange(W), np.arange(H)), -1).astype(float)
        surface = self.surface(i, p)
        q = np.zeros_like(p)
        for k, maps in enumerate((self.background, self.disc, self.other)):
            q[surface == k] = apply(maps[j] @ np.linalg.inv(maps[i]), p[surface == k])
        seen = ((q >= 0) & (q <= [W - 1, H - 1])).all(-1) & (self.surface(j, q) == surface)
        return DensePair((q - p).astype(np.float32), seen, seen, ~seen)


OTHER = motion(np.array([1.5, -0.5]), angle=0.5)


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("other_in_front", [False, True])
def test_two_objects_get_a_layer_each_and_the_one_that_hides_the_other_is_in_front(other_in_front, count):
    store = ThreeLayers(STEADY, DISC, OTHER, other_in_front)
    layers = find_layers(store, count)
    assert len(layers) == 3
    truths = [(store.disc, store.center), (store.other, store.other_center)]
    for layer, (truth, center) in zip(layers, truths[::-1] if other_in_front else truths, strict=False):
        rim = center + store.radius * np.array([[0, 0], [0.8, 0], [-0.8, 0], [0, 0.8], [0, -0.8]])
        for t in range(T):
            error = np.abs(apply(layer[t], apply(truth[t], rim)) - rim).max()
            assert error < 2.5, t  # in the last frames, little of the disc behind is seen; the motions differ by 20


def test_two_objects_that_move_alike_share_a_layer():
    assert len(find_layers(ThreeLayers(STEADY, DISC, DISC))) == 2


def test_layers_that_are_asked_for_and_not_there_move_as_the_background():
    layers = find_layers(TwoLayers(STEADY, DISC, shown=()), 4)
    assert len(layers) == 4
    for layer in layers[:-1]:
        assert np.allclose(layer, layers[-1])


def test_a_layer_does_not_jump():
    """A disc that jumps by a fifth of the frame is not followed any more: where objects leave the frame, other tracks
    may support a fit."""
    disc = DISC.copy()
    disc[T // 2 + 2:, 0, 2] += 14
    found = two_layers(TwoLayers(STEADY, disc))
    center = np.array([apply(np.linalg.inv(np.vstack([F, [0, 0, 1]])), CENTER) for F in found.foreground])
    steps = np.linalg.norm(np.diff(center, axis=0), axis=1)
    assert 1 < steps.max() < 3


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_very_short_clips(num_frames, count):
    class Short(TwoLayers):
        def __init__(self):
            super().__init__(STEADY, DISC)
            self.num_frames = num_frames
            self.counts = self.counts[:num_frames, :num_frames]

    layers = find_layers(Short(), count)
    assert np.isfinite(layers).all() and layers.shape[1:] == (num_frames, 2, 3)
    assert len(layers) == count or count == 0


def test_an_object_that_is_seen_for_a_small_part_of_a_long_clip_is_followed(monkeypatch):
    """For three of 17 frames, if tracks are followed through seven."""
    monkeypatch.setattr(layer_similarities, "MAX_REACH", 3)
    shown = range(T // 2 - 1, T // 2 + 2)
    store = TwoLayers(STEADY, DISC, shown=shown)
    assert store.errors(two_layers(store))[1, shown.start:shown.stop].max() < 1
