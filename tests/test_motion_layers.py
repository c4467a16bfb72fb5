"""Initialization from motion layers: the background and what moves against it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.errors import UserError
from configs.options import parse
from loaders.correspondence_format import DensePair
from models.grid_deformation import GridNetwork
from models.grid_field import GridField
from models.layer_images import LayerImages
from models.omnimotion import ModelConfig, OmniMotion
from tests.fake_store import FakeStore
from training.initialization import set_maps
from training.layer_similarities import find_layers
from training.motion_layers import _votes, layer_votes, layers_of_motion
from training.similarity import apply
from training.trainer import Trainer

H, W, T = 96, 128, 9


class Moving(FakeStore):
    """Correspondences of a background that follows similarities and a square that moves against it."""

    def __init__(self, background, square, size=(H, W), num_frames=T, center=(60, 50)):
        super().__init__(size, num_frames)
        self.background = background
        self.square = square
        self.center = np.array(center)

    def place(self, t, p):
        """Positions in frame t of points of the background and of the square, given before any motion."""
        a, s, shift = (value * t for value in self.background)
        R = (1 + s) * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
        return p @ R.T + shift, p + np.asarray(self.square) * t

    def back(self, t, p):
        a, s, shift = (value * t for value in self.background)
        R = (1 + s) * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
        return (p - shift) @ np.linalg.inv(R).T

    def dense(self, i, j):
        H, W = self.size
        p = np.stack(np.meshgrid(np.arange(W), np.arange(H)), -1).astype(float)
        home = p - np.asarray(self.square) * i
        inside = (np.abs(home - self.center) < 16).all(-1)
        to = np.where(inside[..., None], home + np.asarray(self.square) * j, self.place(j, self.back(i, p))[0])
        believed = ((to >= 0) & (to <= [W - 1, H - 1])).all(-1)
        return DensePair((to - p).astype(np.float32), believed, believed, ~believed)


@pytest.fixture
def scene():
    return Moving((0.004, 0.003, np.array([1.5, -0.5])), [-2.0, 1.0])


def displacements(scene, p, layers=2):
    """Motion of every frame and layer to the middle frame `(T, S, R, R, 2)`."""
    return layers_of_motion(scene, p, find_layers(scene, layers))


def vertices(sides=9, size=(H, W)):
    return np.stack(np.meshgrid(np.linspace(-12, size[1] + 12, sides), np.linspace(-9, size[0] + 9, sides)), -1)


@pytest.mark.parametrize("size", [(301, 533), (533, 301), (130, 130)])
@pytest.mark.parametrize("num_frames", [2, 5])
def test_the_background_of_frames_larger_than_the_raster(size, num_frames):
    scene, p = Moving((0.004, 0.003, np.array([1.5, -0.5])), [-3.0, 1.0], size, num_frames), vertices(9, size)
    far, m = displacements(scene, p)[:, 1], num_frames // 2
    for t in range(num_frames):
        assert np.abs(far[t] - (scene.place(m, scene.back(t, p))[0] - p)).max() < 0.5, t


def test_motion_layers_of_a_background_and_a_moving_square(scene):
    p = vertices()
    near, far = displacements(scene, p).swapaxes(0, 1)
    for t in range(T):
        expected = scene.place(T // 2, scene.back(t, p))[0] - p
        assert np.abs(far[t] - expected).max() < 0.3, t
        center = np.array([60, 50]) + np.array(scene.square) * t  # of the square
        vertex = np.unravel_index(np.linalg.norm(p - center, axis=-1).argmin(), p.shape[:2])
        moved = np.array(scene.square) * (T // 2 - t)
        if abs(t - T // 2) >= 2:  # it is apart from the background by more than 3/256 of the frame
            assert np.abs(near[t][vertex] - moved).max() < 0.5, t
    assert np.allclose(near[T // 2], 0) and np.allclose(far[T // 2], 0)


def test_a_square_that_crosses_the_picture_is_found_in_the_frames_that_show_it():
    """It enters at the left and leaves at the right, and is in the middle frame or not."""
    for center in ((10, 50), (-70, 50)):
        scene = Moving((0.004, 0.003, np.array([1.5, -0.5])), [13.0, -1.0], center=center, num_frames=15)
        similarities = find_layers(scene)
        front = similarities[0]
        for t in range(14):
            home = scene.center + np.array(scene.square) * t
            if 10 < home[0] < W - 26:
                before, after = (np.vstack([F, [0, 0, 1]]) for F in front[t:t + 2])
                moved = apply(np.linalg.inv(after) @ before, home) - home
                assert np.abs(moved - scene.square).max() < 1, (center, t)


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (2, 300)])
def test_frames_of_a_row_or_a_column(size):
    scene = Moving((0.0, 0.0, np.array([0.5, 0.0])), [0.0, 0.0], size, 4)
    assert np.isfinite(displacements(scene, vertices(5, size))).all()


def test_initial_displacements_do_not_fold():
    """Two neighbors exchange places: displacements that are only averaged locally would fold."""
    scene, p = Moving((0.0, 0.0, np.zeros(2)), [-9.0, 0.0], center=(70, 50)), vertices(65)
    near = displacements(scene, p)[:, 0]
    x, y = np.diff(p + near, axis=2)[:, :-1], np.diff(p + near, axis=1)[:, :, :-1]
    assert (x[..., 0] * y[..., 1] - x[..., 1] * y[..., 0]).min() > 0


def test_nothing_moves_in_a_still_clip():
    near, far = displacements(Moving((0.0, 0.0, np.zeros(2)), [0.0, 0.0]), vertices()).swapaxes(0, 1)
    assert np.allclose(near, 0, atol=1e-3) and np.allclose(far, 0, atol=1e-3)


def test_frames_without_flow_take_the_motion_of_the_similarities(scene):
    """There the background rests."""
    scene.counts[:2] = scene.counts[:, :2] = 0
    similarities = find_layers(scene, 2)
    motion = layers_of_motion(scene, vertices(), similarities)
    assert np.isfinite(motion).all()
    for t in range(2):
        assert np.allclose(similarities[-1, t], similarities[-1, 2])
        near, far = (np.stack([S[:, :2] @ p + S[:, 2] - p for p in vertices().reshape(-1, 2)]).reshape(9, 9, 2)
                     for S in similarities[:, t])
        assert np.allclose(motion[t], [near, far], atol=1e-3)


def test_a_network_is_initialized_at_given_displacements(scene):
    network = GridNetwork(T, num_levels=3)
    layers = torch.randn(T, 2, 9, 9, 2) * 0.02
    network.start_at(layers)
    near, far = layers.unbind(1)
    maps, flat = network.bind(torch.arange(T)), network.vertices().reshape(1, 81, 2).expand(T, -1, -1)
    for depth, displacement in ((-0.1, near), (0.3, near), (0.99, near), (1.01, far), (2.1, far)):
        x = torch.cat([flat, torch.full((T, 81, 1), depth)], -1)
        assert torch.allclose(maps.to_canonical(x), x + torch.nn.functional.pad(displacement.flatten(1, 2), (0, 1)),
                              atol=1e-5)


def test_init_layers_initializes_grids_and_is_refused_for_mlps(small_sequence, tmp_path):
    arguments = ["--data_dir", str(small_sequence), "--save_dir", str(tmp_path), "--num_pairs", "2", "--num_pts", "8",
                 "--num_samples_ray", "4", "--no_reload", "--device", "cpu", "--init_layers", "1"]
    trainer = Trainer(parse("train", [*arguments, "--deform", "grid", "--field", "grid", "--grid_levels", "3"]))
    T, p = len(trainer.sequence), torch.tensor([[[20.0, 30.0], [40, 20]]])
    stored = trainer.sampler.store.dense(0, T // 2)
    moved = trainer.model.correspond(p, torch.tensor([0]), torch.tensor([T // 2]))[0]
    plain = SimpleNamespace(**vars(trainer.options) | {"init_layers": 0})
    still = Trainer(plain).model.correspond(p, torch.tensor([0]), torch.tensor([T // 2]))[0]
    truth = p + torch.from_numpy(stored.flow[[30, 20], [20, 40]])
    assert (moved - truth).norm(dim=-1).mean() < (still - truth).norm(dim=-1).mean()
    with pytest.raises(UserError, match="--init_layers needs motion layers: say --deform warp"):
        Trainer(parse("train", arguments))


@pytest.fixture
def start(small_sequence, tmp_path):
    """Options of a run that starts from layers of motion."""
    def options(*words):
        return parse("train", [
            "--data_dir", str(small_sequence), "--save_dir", str(tmp_path), "--num_pairs", "2", "--num_pts", "8",
            "--num_samples_ray", "4", "--device", "cpu", "--init_layers", "1", "--deform", "grid", "--field", "grid",
            "--grid_levels", "3", *words])
    return options


def test_the_number_of_layers_depends_on_the_video(start, monkeypatch):
    """A resumed run keeps its number."""
    T = len(Trainer(start("--grid_layers", "2")).sequence)
    layers = np.tile(np.eye(3)[:2], (3, T, 1, 1))
    layers[0, 0, 0, 2] = 9
    monkeypatch.setattr("training.initialization.find_layers", lambda store, count: layers)
    trainer = Trainer(start())
    W, maps = trainer.model.size[1], trainer.model.maps(torch.tensor([0]))
    moved = maps.to_canonical(torch.tensor([[[0.0, 0.0, 0.1]]]))[0, 0]
    assert trainer.model.config.grid_layers == 3
    assert torch.allclose(moved[0], torch.tensor(9 * 2 / (W - 1)), atol=0.05)
    trainer.train_step()
    trainer.save()
    again = Trainer(start())
    assert again.step == 1 and again.model.config.grid_layers == 3
    with pytest.raises(UserError, match="trained with grid_layers 3, now it is 2"):
        Trainer(start("--grid_layers", "2"))
    monkeypatch.undo()  # the video, or a threshold, is another now: the run is what it was
    assert Trainer(start()).model.config.grid_layers == 3
    other = start("--ckpt_path", str(trainer.dir / "model_000001.pth"), "--expname", "other")
    started = Trainer(other)
    started.train_step()
    started.save()
    assert Trainer(start("--expname", "other")).model.config.grid_layers == 3


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_any_number_of_layers_can_be_asked_for(start, layers):
    assert Trainer(start("--grid_layers", str(layers))).model.config.grid_layers == layers


# Which layer a place shows

def started(scene, layers=2, samples=None):
    """A model whose maps start as the trainer's do, and the votes for its layers `(S - 1, R, R)`. With a number of
    `samples` on a ray, that of `--deform grid`, otherwise that of `--deform warp`."""
    torch.manual_seed(0)
    similarities = find_layers(scene, layers)
    S = len(similarities)
    kind = {"deform": "grid", "field": "grid"} if samples else {"deform": "warp", "field": "images"}
    model = OmniMotion(ModelConfig(scene.num_frames, *scene.size, **kind, num_samples_ray=samples or S, grid_layers=S))
    set_maps(model, scene, similarities)
    return model, layer_votes(model, scene)


def depths(model, scene, t):
    """Depth `(H, W)` of frame t as the model renders it."""
    H, W = scene.size
    pixels = np.stack(np.meshgrid(np.arange(W), np.arange(H)), -1).reshape(1, -1, 2)
    with torch.no_grad():
        return model.color_and_depth(torch.from_numpy(pixels).float(), torch.tensor([t]))[1].view(H, W).numpy()


def in_and_around(scene, t, margin):
    """Pixels `(H, W)` of frame t that are well inside the square, and those well outside it and its borders."""
    y, x = np.indices(scene.size)
    far = np.abs(np.stack([x, y], -1) - scene.center - np.array(scene.square) * t).max(-1)
    outside = far > 16 + margin
    outside[:, :12] = outside[:, -12:] = outside[:12] = outside[-12:] = False
    return far < 16 - margin, outside


@pytest.mark.parametrize("size,stored,samples", [
    ((H, W), "all", None), ((H, W), "all", 16), ((H, W), "half", 32), ((260, 130), "half", None),
    ((260, 130), "half", 16), ((140, 220), "all", None)])
def test_the_initial_depth_has_the_moving_square_in_front_in_every_frame(size, stored, samples):
    """Also of frames larger than the raster, and of stores that keep half of the pixels."""
    scene = Moving((0.004, 0.003, np.array([1.5, -0.5])), [-3.0, 1.0], size)
    scene.stored = stored
    model, votes = started(scene, samples=samples)
    assert votes.shape == (1, model.field.side, model.field.side) and np.abs(votes).max() <= 1
    assert np.ptp(depths(model, scene, 0)) < 0.5  # nothing tells the square from what is around it
    model.field.start_at(torch.from_numpy(votes))
    for t in (0, 2, T - 1):
        found, (inside, outside) = depths(model, scene, t), in_and_around(scene, t, margin=5)
        assert (found[inside] < 0.6).mean() > 0.9 and (found[outside] > 0.8).mean() > 0.9, t


@pytest.mark.parametrize("samples", [None, 16])
def test_the_initial_depth_has_the_crossing_square_in_front_of_all(samples):
    scene = Moving((0.0, 0.0, np.zeros(2)), [13.0, -1.0], center=(10, 50))
    model, votes = started(scene, 0, samples)
    model.field.start_at(torch.from_numpy(votes))
    for t in (1, 3, T - 2):
        found, (inside, outside) = depths(model, scene, t), in_and_around(scene, t, margin=5)
        assert (found[inside] < 0.7).mean() > 0.9 and (found[outside] > 0.7).mean() > 0.9, t


@pytest.mark.parametrize("layers", [2, 3, 5])
def test_votes_equal_their_definition(layers):
    """Against the definition, one correspondence and layer after the other."""
    e = np.random.default_rng(layers).exponential(1.0, (4, layers, 50))
    e[0] = 0.3  # all layers move alike
    votes, some = _votes(e)
    for b, s, k in np.ndindex(4, layers - 1, 50):
        own, behind = e[b, s, k], e[b, s + 1:, k].min()
        hidden = s > 0 and e[b, :s, k].min() < min(own, behind)
        assert some[b, s, k] == (not hidden)
        assert votes[b, s, k] == (0 if hidden else np.clip(behind - own, -1, 1))


def test_layers_that_move_alike_get_weak_votes():
    """A tenth of VOTE_SCALE between the two is half a vote; ten times as much all of it."""
    votes = []
    for shift in (0.02, 0.2, 2.0, 20.0):  # pixels
        scene = Moving((0.0, 0.0, np.zeros(2)), [0.0, 0.0])
        model = OmniMotion(ModelConfig(T, H, W, deform="grid", field="grid", grid_layers=2))
        away = torch.zeros(T, 2, *model.deform.vertices().shape)
        away[::2, 0, ..., 0] = shift / (W - 1) * 2  # the nearer layer's, in every other frame
        model.deform.start_at(away)
        votes.append(layer_votes(model, scene)[0].min())
    assert votes == sorted(votes, reverse=True) and -0.2 < votes[0] and votes[-1] < -0.75, votes


def test_only_frames_with_correspondences_vote(scene):
    """A pair without any is not even opened."""
    model, _ = started(scene)
    scene.counts[:] = 0
    assert not layer_votes(model, scene).any()
    scene.counts[3, 7] = scene.counts[7, 3] = 1
    opened, index = [], scene.index
    scene.index = lambda i, j: opened.append((i, j)) or index(i, j)
    assert layer_votes(model, scene).any() and opened == [(3, 7), (7, 3)]


@pytest.mark.parametrize("S", [2, 3])
def test_initial_votes_change_the_density_in_the_depth_range_of_their_layer(S):
    """Dense and empty depth ranges alternate. Depths between the vertices of two ranges are not checked."""
    torch.manual_seed(0)
    field = GridField((0.0, 2.0))
    vertices = (torch.linspace(-1, 1, field.levels[-1].shape[2]) * 1.2 + 1)  # depths
    u = torch.stack([torch.zeros(401), torch.zeros(401), torch.linspace(0, 2, 401)], -1)
    before, signs = field(u)[1], [(-1) ** s for s in range(S - 1)]
    field.start_at(torch.stack([torch.full((field.side, field.side), float(sign)) for sign in signs]))
    after = field(u)[1]
    for s, sign in enumerate([*signs, 0]):
        own = vertices[(vertices > 2 * s / S - 1e-3) & (vertices < 2 * (s + 1) / S - 1e-3)]
        inside = (u[:, 2] >= own[0]) & (u[:, 2] <= own[-1])
        assert inside.sum() > 40 and torch.equal((after - before)[inside].sign(), torch.full_like(after[inside], sign))


GRIDS = ["--deform", "grid", "--field", "grid", "--num_samples_ray", "16"]


@pytest.mark.parametrize("more,start", [
    ([], True), (["--grid_layers", "2"], True), (GRIDS, True), (["--field", "gabor"], False)])
def test_the_trainer_initializes_the_field_from_votes(more, start, small_sequence, tmp_path):
    trainer = Trainer(parse("train", ["--config", "configs/fast.txt", "--data_dir", str(small_sequence), "--save_dir",
                                      str(tmp_path), "--device", "cpu", "--field_width", "16", *more]))
    if start:
        finest = trainer.model.field.levels[-1].detach()
        votes = layer_votes(trainer.model, trainer.sampler.store)
        assert votes.any() and not finest[:, :3].any()
        again = GridField((0.0, 2.0)) if more is GRIDS else LayerImages((0.0, 2.0), len(votes) + 1)
        again.start_at(torch.from_numpy(votes))
        assert torch.equal(finest, again.levels[-1].detach())
    else:
        assert not hasattr(trainer.model.field, "start_at")


@pytest.mark.parametrize("camera", [1.0, 12.0])
def test_images_cover_what_the_camera_sees(camera):
    """In all frames and layers, with a margin, and no more."""
    scene = Moving((0.02, 0.01, np.array([camera, -0.5])), [-3.0, 1.0])
    torch.manual_seed(0)
    model = OmniMotion(ModelConfig(T, H, W, num_samples_ray=2, deform="warp", field="images", grid_layers=2))
    set_maps(model, scene, find_layers(scene, 2))
    x, y = torch.meshgrid(torch.linspace(-1, 1, 30), torch.linspace(-1, 1, 30), indexing="xy")
    x = torch.stack([x, y], -1).view(1, -1, 1, 2).expand(T, -1, 2, 2)
    x = torch.cat([x, torch.tensor([0.5, 1.5]).view(1, 1, 2, 1).expand(T, 900, 2, 1)], -1).flatten(1, 2)
    with torch.no_grad():
        place = model.field.place(model.maps(torch.arange(T)).to_canonical(x)).abs().view(T, 900, 2, 2)
    assert place.max() < 1 and place.amax((0, 1)).min() > 0.8


def test_omnimotions_layout_gives_the_same_votes_as_the_store(small_sequence, published_sequence, tmp_path):
    densities = []
    for folder in (small_sequence, published_sequence):
        trainer = Trainer(parse("train", ["--config", "configs/fast.txt", "--data_dir", str(folder), "--save_dir",
                                          str(tmp_path), "--device", "cpu", "--grid_layers", "2"]))
        densities.append(trainer.model.field.levels[-1].detach())
    assert densities[0].any() and torch.allclose(*densities, atol=1e-3)
