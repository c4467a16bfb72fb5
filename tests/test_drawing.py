"""Drawings: positions, colors, and marks of visible and occluded points."""

import numpy as np
import pytest

from drawing.cloud import cloud_pictures
from drawing.colors import depth_colors, flow_colors, position_colors, score_colors
from drawing.legend import HEIGHT, color_bar, flow_wheel, point_legend, with_strip
from drawing.maps import beside, color_pictures, error_pictures, flow_pictures
from drawing.segment import foreground_tracks
from drawing.tracks import draw_points, match_picture, picture_zoom, point_grid, track_pictures
from drawing.trails import background_step, stabilized_trails, trail_pictures

RED = np.array([[255, 0, 0]], np.uint8)


def test_visible_is_a_disc_and_occluded_a_ring():
    pictures = {}
    for visible in (True, False):
        pictures[visible] = np.full((400, 400, 3), 128, np.uint8)
        draw_points(pictures[visible], np.array([[50.0, 30.0]]), np.array([visible]), RED, zoom=4)
    center = round((30 + 0.5) * 4 - 0.5), round((50 + 0.5) * 4 - 0.5)
    assert pictures[True][center].tolist() == [255, 0, 0] and pictures[False][center].tolist() == [128] * 3
    for picture in pictures.values():
        y, x = np.nonzero((picture != 128).any(-1))
        assert abs(y.mean() - 121.5) < 0.6 and abs(x.mean() - 201.5) < 0.6 and len(y) > 20


def test_points_outside_the_frame_are_not_drawn():
    picture = np.zeros((100, 100, 3), np.uint8)
    draw_points(picture, np.array([[-1.0, 5], [200, 5], [5, 99.6]]), np.ones(3, bool), np.repeat(RED, 3, 0), zoom=1)
    assert not picture.any()


def test_points_of_a_one_pixel_grid_are_squares_that_leave_no_gap():
    frames = np.zeros((1, 100, 160, 3), np.uint8)  # enlarged five times
    points, visible = point_grid((100, 160), 1), np.ones(16_000, bool)
    visible[:160] = False  # the first row
    picture = next(track_pictures(frames, points[:, None], visible[:, None], np.repeat(RED, 16_000, 0), 0, 1))
    assert (picture[5:500] == [166, 0, 0]).all() and not picture[:5].any()  # 65% of red


def test_every_frame_is_a_picture_and_frames_stay_as_they_were():
    frames = np.zeros((3, 60, 80, 3), np.uint8)
    tracks = np.array([[[10, 10], [20, 20], [30, 30]]], np.float32)
    pictures = list(track_pictures(frames, tracks, np.ones((1, 3), bool), RED, 0))
    zoom = picture_zoom((60, 80))
    assert len(pictures) == 3 and pictures[0].shape == (60 * zoom + HEIGHT, 80 * zoom, 3) and not frames.any()
    for t, picture in enumerate(pictures):
        place = round((10 * (t + 1) + 0.5) * zoom - 0.5)
        assert picture[place, place].tolist() == [255, 0, 0]


def test_colors_distinguish_positions_directions_and_depths():
    corners = position_colors(np.array([[0, 0], [99, 0], [0, 99], [99, 99]], np.float32), (100, 100)).astype(int)
    assert min(abs(a - b).sum() for i, a in enumerate(corners) for b in corners[:i]) > 150
    flow = np.array([[[0, 0], [5, 0], [-5, 0], [0, 5]]], np.float32)
    still, right, left, down = flow_colors(flow)[0].astype(int)
    assert still.min() == 255 and min(abs(right - left).sum(), abs(right - down).sum()) > 150
    near, far = depth_colors(np.array([[0.0, 2.0]]), 0.0, 2.0)[0].astype(int)
    assert near[0] > near[2] and far[2] > far[0]


def test_the_grid_lies_in_the_frame():
    for size, interval in (((48, 64), 0), ((100, 37), 7), ((5, 5), 10)):
        points = point_grid(size, interval)
        assert (points >= 0).all() and (points <= np.array(size[::-1]) - 1).all()
    assert len(point_grid((100, 100), 10)) == 100


# Deuteranopia and protanopia as Machado, Oliveira and Fernandes (2009) simulate them, on linear RGB.
BLINDNESS = {"deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
             "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colors_stay_apart_without_red_or_green_cones(kind):
    corners = position_colors(np.array([[0, 0], [99, 0], [0, 99], [99, 99]], np.float32), (100, 100))
    share = np.linspace(0, 1, 4, dtype=np.float32)[None]
    maps = {"corners": corners, "depth": depth_colors(share, 0, 1)[0], "score": score_colors(share[0, [0, 3]])}
    for name, colors in maps.items():
        seen = ((colors / 255) ** 2.2 @ np.array(BLINDNESS[kind]).T).clip(0, 1) ** (1 / 2.2) * 255
        apart = min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i])
        assert apart > 60, name


def test_flow_has_middleburys_colors():
    flow = np.array([[[1, 0], [0, 1], [-1, 0], [0, 0]]], np.float32)
    right, down, left, still = flow_colors(flow, 1.0)[0].astype(int)
    assert right.tolist() == [255, 0, 0] and still.tolist() == [255, 255, 255]
    assert down[0] > 200 and down[1] > 200 and down[2] < 60  # yellow
    assert left[2] > 200 and left[0] < 60                    # cyan to blue
    wheel = flow_wheel(65)
    assert wheel[32, 62, 0] > 240 and wheel[32, 62, 1] < 30 and wheel[0, 0, 3] == 0


def scene(T=20):
    """Tracks of a wall and floor under a moving camera, and of a block that moves on its own, `(N, T, 2)`."""
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform([0, 0, 0], [200, 150, 60], (150, 3)), rng.uniform([80, 60, 0], [120, 100, 20],
                                                                                          (40, 3))])
    moving, t = np.arange(190) >= 150, np.arange(T)
    x = points[:, :1] + points[:, 2:] * 0.01 * t - 2 * t + moving[:, None] * 12 * np.sin(t / 3)
    y = points[:, 1:2] + 0.5 * t + moving[:, None] * 8 * np.cos(t / 2)
    return np.stack([x, y], -1) + rng.normal(0, 0.1, (190, T, 2)), moving


def test_points_that_move_against_the_background_are_foreground():
    tracks, moving = scene()
    found = foreground_tracks(tracks, np.ones(tracks.shape[:2], bool), (150, 200))
    # the labels are smoothed over neighbors in the image, and wall points lie between those of the block
    assert (found & moving).sum() / (found | moving).sum() > 0.7
    still = foreground_tracks(tracks[~moving], np.ones((150, 20), bool), (150, 200))
    assert not still.any() and not foreground_tracks(tracks[:3], np.ones((3, 20), bool), (150, 200)).any()


def test_a_point_of_the_background_has_no_trail():
    tracks, moving = scene()
    steps = np.array([background_step(tracks[~moving, t], tracks[~moving, t + 1]) for t in range(19)])
    trails = stabilized_trails(tracks, steps, 19, 10)
    assert trails.shape == (190, 11, 2) and np.allclose(trails[:, -1], tracks[:, 19])
    lengths = np.linalg.norm(np.diff(trails, axis=1), axis=-1).sum(1)
    assert np.median(lengths[moving]) > 5 * np.median(lengths[~moving])
    frames = np.zeros((20, 150, 200, 3), np.uint8)
    pictures = list(trail_pictures(frames, tracks, np.ones((190, 20), bool), np.repeat(RED, 190, 0), steps, 0))
    assert len(pictures) == 20 and pictures[19].any()


def test_a_shift_is_enough_where_points_are_few():
    points = np.array([[1.0, 2], [3, 4]])
    assert np.allclose(background_step(points, points + np.array([2, -1])), [[1, 0, 2], [0, 1, -1], [0, 0, 1]])
    assert np.allclose(background_step(points[:0], points[:0]), np.eye(3))


@pytest.mark.parametrize("size", [(480, 854), (640, 360), (7, 9), (2160, 3840), (64, 2000)])
def test_pictures_have_sensible_sizes_and_legends_fit(size):
    zoom = picture_zoom(size)
    assert max(size) * zoom <= 1921 and (min(size) * zoom >= 480 or max(size) * (zoom + 1) > 1920)
    picture = np.zeros((round(size[0] * zoom), round(size[1] * zoom), 3), np.uint8)
    bar = color_bar(lambda share: depth_colors(share, 0, 1), "0.00", "2.00", "near")
    for legend in (None, point_legend(), point_legend(scored=True), point_legend(True, True), bar):
        out = with_strip(picture, "frame 12 / 81   query frame", legend)
        assert out.shape[1] == picture.shape[1] and out.shape[0] - picture.shape[0] in (HEIGHT, 2 * HEIGHT)
        assert out[picture.shape[0]:].max() > 150  # something is written
    assert beside([picture, picture]).shape[1] <= 1921


def test_maps_have_a_picture_a_frame():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (2, 30, 40, 3), np.uint8)
    assert len(list(color_pictures(frames, rng.random((2, 15, 20, 3)).astype(np.float16)))) == 2
    assert len(list(error_pictures(frames, np.zeros((2, 4, 5), np.float32)))) == 2
    assert len(list(flow_pictures(np.zeros((1, 15, 20, 2), np.float32), (30, 40)))) == 1
    picture = match_picture(tuple(frames), np.array([[5.0, 5]]), np.array([[30.0, 20]]), np.array([True]), RED, "a", 1)
    assert picture.shape == (480 + HEIGHT, 2 * 640, 3)


def test_nearer_points_of_a_cloud_are_in_front():
    points = np.array([[0, 0, 0], [0, 0, 1], [1, 1, 0.5], [-1, -1, 0.5]], float)
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 255]], np.uint8)
    first = next(cloud_pictures(points, colors, (101, 101), 4, 9))
    assert (first == [255, 0, 0]).all(-1).any()
