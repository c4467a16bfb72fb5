"""The synthetic generator's ground truth against the pictures, and against motion worked out by hand."""

import cv2
import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from loaders.track_files import load_annotations
from preprocessing.options import synthetic_parser
from preprocessing.synthetic import render as renderer
from preprocessing.synthetic.layers import Ellipsoid, Outline, Shear, Sheet
from preprocessing.synthetic.render import front, inside, render, render_scene, sample_tracks, stratify
from preprocessing.synthetic.scenes import RECIPES, build_layers, rodrigues
from preprocessing.synthetic.textures import dead_leaves, fibers, solid

SIZE, T = (128, 160), 12


@pytest.fixture(scope="module", params=list(RECIPES))
def rendered(request):
    """Scene name, layers, and what render_scene gives."""
    layers = build_layers(request.param, SIZE, T, 3)
    return request.param, layers, *render_scene(request.param, SIZE, T, 3, 200)


def colors(frames, points, offset=(0.0, 0.0)):
    """Color of every frame at its points + offset, `(N, T, 3)`."""
    maps = (points + np.float32(offset)).astype(np.float32)
    return np.stack([cv2.remap(frame.astype(np.float32), maps[:, t, :1], maps[:, t, 1:], cv2.INTER_LINEAR,
                               borderMode=cv2.BORDER_REPLICATE)[:, 0] for t, frame in enumerate(frames)], 1)


def test_visible_points_keep_their_color(rendered):
    _, layers, frames, truth, _ = rendered
    clear = ~truth.occluded & np.stack(  # a pixel at an outline mixes two layers
        [front(layers, truth.points[:, t].astype(float), t, margin=1.5) >= 0 for t in range(T)], 1)
    seen = np.where(clear[..., None], colors(frames, truth.points), np.nan)[clear.sum(axis=1) > 2]
    reference = np.full((len(truth.points), 1, 3), np.nan, np.float32)
    reference[clear.sum(axis=1) > 2, 0] = np.nanmedian(seen, axis=1)

    def error(offset):
        distance = np.abs(colors(frames, truth.points, offset) - reference).mean(-1)
        return distance[clear & np.isfinite(distance)]

    here = error((0, 0))
    assert np.median(here) < 2 and np.percentile(here, 90) < 10
    for offset in ((1, 0), (0, -1), (-0.7, 0.7)):
        assert np.median(error(offset)) > 5 * np.median(here)


def test_a_point_is_visible_where_its_own_paint_is_in_front(rendered):
    _, layers, _, truth, _ = rendered
    rows, first = np.arange(len(truth.points)), (~truth.occluded).argmax(1)
    layer = np.array([front(layers, truth.points[n, first[n]].astype(float), first[n]) for n in rows])
    for k, surface in enumerate(layers):
        own = layer == k
        paint = np.array([surface.look_up(truth.points[n, first[n]].astype(float), first[n])[0] for n in rows[own]])
        for t in range(T):
            points, hidden = truth.points[own, t].astype(float), truth.occluded[own, t]
            seen = front(layers, points, t, margin=0.01)  # -1: too near to an outline to say
            same_paint = np.linalg.norm(surface.look_up(points, t)[0] - paint, axis=-1) < 0.2
            outside = ~inside(points, SIZE)
            assert hidden[outside].all()
            assert ((seen == k) & same_paint)[~hidden & (seen >= 0)].all()
            assert ((seen > k) | ((seen == k) & ~same_paint))[hidden & ~outside & (seen >= 0)].all()


def ids(layers, size, t):
    """Layer in front at every pixel."""
    return front(layers, np.stack(np.meshgrid(np.arange(size[1]), np.arange(size[0])), -1).astype(float), t)


@pytest.mark.parametrize("seed", range(4))
def test_the_trunk_hides_the_object_and_everything_else_once(seed):
    layers = build_layers("demo", (96, 130), 24, seed)
    front_ids = np.stack([ids(layers, (96, 130), t) for t in range(24)])
    area = (front_ids == 3).sum((1, 2))
    assert 1 <= (area == 0).sum() <= 3 and np.diff(np.flatnonzero(area == 0)).max(initial=1) == 1
    assert min(area[0], area[-1]) > 30
    assert (front_ids == 4).any(0).mean() > 0.9 and not (front_ids[-6:] == 4).any()


@pytest.mark.parametrize("scene,seed", [("occlusion", 0), ("occlusion", 3), ("fast", 1)])
def test_encounters_hide_their_object_around_the_middle(scene, seed):
    layers = build_layers(scene, (96, 130), 9, seed)
    area = [(ids(layers, (96, 130), t) == 3).sum() for t in range(9)]
    assert area[4] == 0 and min(area[0], area[-1]) > 80


def test_points_leave_the_frame_and_some_return():
    truth = render_scene("fast", SIZE, T, 0, 200)[1]
    within = inside(truth.points, SIZE).astype(int)
    assert (within.min(axis=1) == 0).any()
    assert ((np.diff(within, axis=1) == -1).any(axis=1) & (np.diff(within, axis=1) == 1).any(axis=1)).any()


def test_demo_motion_is_moderate_and_layers_are_represented():
    layers = build_layers("demo", (192, 192), 24, 0)
    truth = sample_tracks(layers, (192, 192), 24, 0, 256)
    step = np.linalg.norm(np.diff(truth.points, axis=1), axis=-1)
    both = ~truth.occluded[:, 1:] & ~truth.occluded[:, :-1]
    first = (~truth.occluded).argmax(1)
    layer = np.array([front(layers, truth.points[n, t].astype(float), t) for n, t in enumerate(first)])
    trunk = layer == 4
    assert np.median(step[both]) < 3 and step[~trunk][both[~trunk]].max() < 4 and step[trunk][both[trunk]].max() < 20
    assert np.bincount(layer, minlength=5).min() > 25
    comes_back = (np.diff(truth.occluded.astype(int), axis=1) != 0).sum(axis=1) > 1
    assert comes_back[~trunk].mean() > 0.9


@pytest.mark.parametrize("size", [(64, 64), (64, 112)])
def test_the_camera_travels(size):
    """Four frame widths, as seen in the frame, with a zoom of 4 and half a turn; the object stays in the frame."""
    H, W = size
    ground, companion = build_layers("travel", size, 40, 0)
    linear, center = ground.affine[:, :, :2], np.array([W - 1, H - 1]) / 2
    zoom = np.sqrt(np.linalg.det(linear))
    assert np.isclose(zoom[-1] / zoom[0], 4)
    turn = np.unwrap(np.arctan2(linear[:, 1, 0], linear[:, 0, 0]))
    assert np.isclose(abs(turn[-1] - turn[0]), np.pi)
    steps = [ground.project(ground.look_up(center[None], t)[0], t + 1)[0][0] - center for t in range(39)]
    assert np.isclose(np.linalg.norm(steps, axis=1).sum(), 4 * W, rtol=0.02)
    own = np.array([companion.project(np.zeros((1, 2)), t)[0][0] for t in range(40)])
    assert inside(own, size).all() and np.linalg.norm(own - own[0], axis=1).max() > 0.2 * H
    seen = [ids([ground, companion], size, t) for t in range(40)]
    assert all(0.005 < x.mean() < 0.35 for x in seen)


def test_masks_are_the_layers_above_the_ground(rendered):
    _, _, frames, _, masks = rendered
    assert frames.shape == (T, *SIZE, 3) and frames.dtype == np.uint8
    assert masks.shape == (T, *SIZE) and masks.dtype == bool and 0.05 < masks.mean() < 0.7


def test_textures_have_no_flat_areas(rendered):
    scene, _, frames = rendered[:3]
    window = (17, 17) if scene == "travel" else (9, 9)  # at the end, twice the scale
    for frame in frames[::5]:
        gray = frame.mean(axis=-1).astype(np.float32)
        mean = cv2.blur(gray, window)
        spread = np.sqrt(np.maximum(cv2.blur(gray ** 2, window) - mean ** 2, 0))
        assert np.percentile(spread, 1) > 3


@pytest.mark.parametrize("paint", [lambda rng: dead_leaves((150, 220), rng, "forest", 20.0),
                                   lambda rng: fibers((150, 220), rng, "bark")])
def test_textures_do_not_repeat(paint):
    gray = paint(np.random.default_rng(0)).mean(axis=-1)
    gray = gray - cv2.GaussianBlur(gray, (0, 0), 8)
    padded = np.zeros((512, 512))
    padded[:150, :220] = gray
    weight = np.zeros((512, 512))
    weight[:150, :220] = 1
    correlation = np.fft.irfft2(np.abs(np.fft.rfft2(padded)) ** 2)
    overlap = np.fft.irfft2(np.abs(np.fft.rfft2(weight)) ** 2).clip(1)
    relative = np.where(overlap > 3000, correlation / overlap, 0) / (correlation[0, 0] / overlap[0, 0])
    distance = np.hypot(*np.meshgrid(np.fft.fftfreq(512, 1 / 512), np.fft.fftfreq(512, 1 / 512)))
    assert np.abs(relative[distance > 25]).max() < 0.3


def test_same_seed_same_sequence_and_other_seed_other():
    a, b, c = (render_scene("demo", (64, 64), 3, seed, 20) for seed in (1, 1, 2))
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1].points, b[1].points)
    assert not np.array_equal(a[0], c[0]) and not np.array_equal(a[1].points, c[1].points)


@pytest.mark.parametrize("size, frames", [((48, 200), 2), ((150, 60), 5)])
def test_any_size_and_length(size, frames):
    images, truth, masks = render_scene("occlusion", size, frames, 0, 40)
    assert images.shape == (frames, *size, 3) and truth.points.shape == (40, frames, 2) and masks.shape[0] == frames
    assert (~truth.occluded).any(axis=1).all()


@pytest.mark.parametrize("arguments", [("nowhere", (64, 64), 4, 0, 5), ("demo", (64, 64), 1, 0, 5),
                                       ("demo", (20, 64), 4, 0, 5), ("demo", (64, 64), 4, 0, 0)])
def test_bad_arguments(arguments):
    with pytest.raises(UserError):
        render_scene(*arguments)


def test_sheet_by_hand():
    """A picture turned by 90 degrees, doubled and shifted: p = 2 (-y, x) + (30, 20)."""
    affine = np.array([[[1.0, 0, 0], [0, 1, 0]], [[0, -2, 30], [2, 0, 20]]])
    texture = np.arange(40 * 40 * 3, dtype=np.float32).reshape(40, 40, 3)
    sheet = Sheet(affine, texture, np.array([-5.0, -5.0]), 1.0)
    m = np.array([[3.0, 4.0]])
    assert np.allclose(sheet.project(m, 0)[0], [[3, 4]]) and np.allclose(sheet.project(m, 1)[0], [[22, 26]])
    assert np.allclose(sheet.look_up(np.array([[22.0, 26.0]]), 1)[0], m)
    assert np.allclose(sheet.color(m[None]), texture[9, 8])


def test_a_shift_by_whole_pixels_shifts_the_picture():
    shift = np.array([7.0, -4.0])
    affine = np.stack([np.array([[1.0, 0, 0], [0, 1, 0]])] * 2)
    affine[1, :, 2] = shift
    texture = dead_leaves((200, 200), np.random.default_rng(0), "coral", 12.0)
    layers = [Sheet(affine, texture, np.array([-40.0, -40.0]), 1.4)]
    a, b = (render(layers, (60, 70), t)[0] for t in (0, 1))
    assert np.abs(b[:-4, 7:].astype(int) - a[4:, :-7]).max() <= 1


def test_shears_are_undone_exactly():
    rng = np.random.default_rng(0)
    shears = tuple(Shear(axis, 6.0, 40.0, rng.uniform(0, 6, 3)) for axis in (0, 1, 0))
    sheet = Sheet(np.tile(np.eye(2, 3), (3, 1, 1)), np.zeros((2, 2, 3), np.float32), np.zeros(2), 1.0, None, shears)
    m = rng.uniform(-50, 50, (100, 2))
    moved = sheet.project(m, 1)[0]
    assert np.abs(moved - m).max() > 3
    assert np.abs(sheet.look_up(moved, 1)[0] - m).max() < 1e-9


def test_sphere_by_hand():
    """A sphere of radius 10 that turns by 60 degrees about the y axis: its nearest point moves by 10 sin 60, a point
    40 degrees from the silhouette turns away."""
    rotation = rodrigues(np.array([0.0, 1.0, 0.0]), np.radians([0, -60]))
    ball = Ellipsoid(np.tile(np.eye(2, 3), (2, 1, 1)), rotation, np.full(3, 10.0), np.zeros((4, 4, 4, 3), np.float32))
    m, edge = ball.look_up(np.array([[0.0, 0.0], [10 * np.sin(np.radians(50)), 0.0], [12.0, 0.0]]), 0)
    assert np.allclose(m[0], [0, 0, -10]) and edge[2] < 0 and np.isclose(edge[2], -2)
    points, seen = ball.project(m[:2], 1)
    assert np.allclose(points[0], [10 * np.sin(np.radians(60)), 0]) and seen[0]
    assert np.allclose(points[1], [10 * np.sin(np.radians(110)), 0]) and not seen[1]


def test_ellipsoid_inverse_and_outline():
    rng = np.random.default_rng(0)
    rotation = rodrigues(rng.normal(size=3), np.array([0.7, 1.9]))
    body = Ellipsoid(np.tile(np.eye(2, 3), (2, 1, 1)), rotation, np.array([20.0, 9.0, 14.0]),
                     np.zeros((4, 4, 4, 3), np.float32))
    p = rng.uniform(-20, 20, (500, 2))
    m, edge = body.look_up(p, 1)
    on = edge > 0
    assert 50 < on.sum() < 450
    assert np.allclose(((m[on] / body.axes) ** 2).sum(-1), 1)
    back, seen = body.project(m[on], 1)
    assert seen.all() and np.abs(back - p[on]).max() < 1e-9
    surface = rng.normal(size=(4000, 3))  # no surface point is seen outside the outline
    surface *= body.axes / np.linalg.norm(surface, axis=1, keepdims=True)
    assert body.look_up(body.project(surface, 1)[0], 1)[1].min() > -1e-6


def test_volume_is_interpolated_linearly():
    grid = np.stack(np.meshgrid(*[np.linspace(-10, 10, 21)] * 3, indexing="ij"), -1).astype(np.float32)
    ball = Ellipsoid(np.zeros((1, 2, 3)), np.zeros((1, 3, 3)), np.full(3, 10.0), grid)
    m = np.random.default_rng(0).uniform(-10, 10, (50, 3))
    assert np.abs(ball.color(m) - m).max() < 0.02


def test_outline_of_a_circle():
    edge = Outline((5.0, 5.0)).edge(np.array([[0.0, 0.0], [3.0, 4.0], [0.0, -7.0]]))
    assert np.allclose(edge, [5, 0, -2])


def test_stratify_takes_equal_shares():
    groups = np.array([0] * 50 + [1] * 3 + [2] * 40 + [-1] * 9)
    assert np.bincount(groups[stratify(groups, 23)]).tolist() == [10, 3, 10]
    assert len(stratify(groups, 1000)) == 93


def test_solid_has_all_of_its_palette():
    volume = solid(24, np.random.default_rng(0), "lagoon")
    assert volume.shape == (24, 24, 24, 3) and volume.std() > 20


@pytest.fixture
def arguments(tmp_path):
    words = ["--data_dir", str(tmp_path / "clip"), "--size", "64", "80", "--num_points", "30"]
    return lambda *extra: synthetic_parser().parse_args([*words, *extra])


def test_command_writes_a_sequence_folder(arguments, tmp_path):
    renderer.main(arguments("--num_frames", "5"))
    root = tmp_path / "clip"
    for folder in ("color", "mask"):
        assert sorted(path.name for path in (root / folder).iterdir()) == [f"{i:05d}.png" for i in range(5)]
    assert np.array(Image.open(root / "color" / "00000.png")).shape == (64, 80, 3)
    truth = load_annotations(root / "annotations.npz", num_frames=5)
    assert truth.points.shape == (30, 5, 2) and truth.frame_size == (64, 80)
    frame = (root / "color" / "00002.png").read_bytes()
    renderer.main(arguments("--num_frames", "5"))
    assert (root / "color" / "00002.png").read_bytes() == frame  # so that a store stays valid
    renderer.main(arguments("--num_frames", "3"))
    assert len(list((root / "color").iterdir())) == len(list((root / "mask").iterdir())) == 3


def test_command_does_not_overwrite_other_sequences(arguments, tmp_path):
    (tmp_path / "clip" / "color").mkdir(parents=True)
    with pytest.raises(UserError, match="not synthetic"):
        renderer.main(arguments())
