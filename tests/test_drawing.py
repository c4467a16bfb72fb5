"""What drawings say: where, which colour, and visible or occluded."""

import numpy as np

from drawing.colours import depth_colours, flow_colours, position_colours
from drawing.legend import HEIGHT
from drawing.tracks import draw_points, picture_zoom, point_grid, track_pictures

RED = np.array([[255, 0, 0]], np.uint8)


def test_visible_is_a_disc_and_occluded_a_ring():
    pictures = {}
    for visible in (True, False):
        pictures[visible] = np.full((400, 400, 3), 128, np.uint8)
        draw_points(pictures[visible], np.array([[50.0, 30.0]]), np.array([visible]), RED, zoom=4)
    centre = round((30 + 0.5) * 4 - 0.5), round((50 + 0.5) * 4 - 0.5)
    assert pictures[True][centre].tolist() == [255, 0, 0] and pictures[False][centre].tolist() == [128] * 3
    for picture in pictures.values():
        y, x = np.nonzero((picture != 128).any(-1))
        assert abs(y.mean() - 121.5) < 0.6 and abs(x.mean() - 201.5) < 0.6 and len(y) > 20


def test_points_outside_the_frame_are_not_drawn():
    picture = np.zeros((100, 100, 3), np.uint8)
    draw_points(picture, np.array([[-1.0, 5], [200, 5], [5, 99.6]]), np.ones(3, bool), np.repeat(RED, 3, 0), zoom=1)
    assert not picture.any()


def test_every_frame_is_a_picture_and_frames_stay_as_they_were():
    frames = np.zeros((3, 60, 80, 3), np.uint8)
    tracks = np.array([[[10, 10], [20, 20], [30, 30]]], np.float32)
    pictures = list(track_pictures(frames, tracks, np.ones((1, 3), bool), RED, 0))
    zoom = picture_zoom((60, 80))
    assert len(pictures) == 3 and pictures[0].shape == (60 * zoom + HEIGHT, 80 * zoom, 3) and not frames.any()
    for t, picture in enumerate(pictures):
        place = round((10 * (t + 1) + 0.5) * zoom - 0.5)
        assert picture[place, place].tolist() == [255, 0, 0]


def test_colours_tell_places_directions_and_depths_apart():
    corners = position_colours(np.array([[0, 0], [99, 0], [0, 99], [99, 99]], np.float32), (100, 100)).astype(int)
    assert min(abs(a - b).sum() for i, a in enumerate(corners) for b in corners[:i]) > 150
    flow = np.array([[[0, 0], [5, 0], [-5, 0], [0, 5]]], np.float32)
    still, right, left, down = flow_colours(flow)[0].astype(int)
    assert still.min() == 255 and min(abs(right - left).sum(), abs(right - down).sum()) > 150
    near, far = depth_colours(np.array([[0.0, 2.0]]), 0.0, 2.0)[0].astype(int)
    assert near[0] > near[2] and far[2] > far[0]


def test_the_grid_lies_in_the_frame():
    for size, interval in (((48, 64), 0), ((100, 37), 7), ((5, 5), 10)):
        points = point_grid(size, interval)
        assert (points >= 0).all() and (points <= np.array(size[::-1]) - 1).all()
    assert len(point_grid((100, 100), 10)) == 100
