"""Multi-interval flow on known motion, and against a version that treats one point at a time."""

import numpy as np
import pytest

from common.geometry import inside
from evaluation.baselines import multi_interval_flow_tracks
from inference.multi_interval_flow import INTERVALS, MAX_ERROR, Candidates, follow_intervals
from loaders.sequence import open_sequence
from loaders.track_files import load_annotations, sample_queries
from preprocessing.cli import flow_model

SIZE = (256, 256)
VELOCITY = np.array([2.0, 1.0])  # pixels a frame
QUERIES = np.array([[0, 30, 40], [9, 50.5, 60.25], [17, 80, 90]], np.float32)
T = 18


def moving(spoiled=(), missing=()):
    """All points move by VELOCITY. The flows `spoiled` lead 20 px aside and back to another point; `missing` are not
    there. Both are functions of (a, b), or collections of such pairs."""
    def has(pairs, a, b):
        return pairs(a, b) if callable(pairs) else (a, b) in pairs

    def step(a, b, points):
        if has(missing, a, b):
            return None
        off = 20.0 if has(spoiled, a, b) else 0.0
        return points + VELOCITY * (b - a) + off, np.full(len(points), off ** 2)

    return step


def truth(queries=QUERIES):
    """Positions `(M, T, 2)`."""
    return queries[:, None, :0:-1] + VELOCITY * (np.arange(T)[:, None] - queries[:, :1, None])


def test_points_move_with_the_flow_in_both_directions():
    found = follow_intervals(QUERIES, T, SIZE, moving())
    assert np.allclose(found.tracks, truth(), atol=1e-4) and found.visible.all() and (found.squared_error == 0).all()


def test_long_intervals_pass_over_frames_in_which_no_flow_is_consistent():
    """Flows that start or end in frames 5 to 7 are wrong: points are hidden there and found again in frame 8."""
    found = follow_intervals(QUERIES[:1], T, SIZE, moving(lambda a, b: a in (5, 6, 7) or b in (5, 6, 7)))
    shown = ~np.isin(np.arange(T), (5, 6, 7))
    assert (found.visible[0] == shown).all()
    assert np.allclose(found.tracks[0, shown], truth()[0, shown], atol=1e-4)


def test_flow_from_the_query_frame_counts_at_every_interval():
    """All other flows into frame 11 are wrong, and 11 is no interval."""
    step = moving(lambda a, b: b == 11 and a != 0)
    assert 11 not in INTERVALS
    assert follow_intervals(QUERIES[:1], T, SIZE, step).visible[0, 11]
    assert not follow_intervals(np.array([[1, 30, 40]], np.float32), T, SIZE, step).visible[0, 11]


def test_points_are_hidden_outside_the_frame():
    queries = np.array([[0, 40, 240]], np.float32)
    found = follow_intervals(queries, T, SIZE, moving())
    assert (found.visible == inside(truth(queries), SIZE)).all() and not found.visible.all()
    assert np.allclose(found.tracks, truth(queries), atol=1e-4)


def test_frames_that_no_flow_reaches_have_no_position():
    found = follow_intervals(QUERIES[:1], T, SIZE, moving(missing=lambda a, b: (a < 9) != (b < 9)))
    assert np.isnan(found.tracks[0, 9:]).all() and np.isinf(found.squared_error[0, 9:]).all()
    assert not found.visible[0, 9:].any() and found.visible[0, :9].all()


def one_point(query, num_frames, size, step, intervals, proposed=None):
    """Plain twin for one point: (position, S, visible) of every frame. `proposed`: positions, S, visible
    and certain of a proposal in all frames."""
    start = round(float(query[0]))
    states = {start: (query[:0:-1].astype(np.float64), 0.0, True)}
    for direction in (1, -1):
        b = start + direction
        while 0 <= b < num_frames:
            candidates = []
            for a, (position, squared, visible) in list(states.items()):
                before = (b - a) * direction > 0 and (a - start) * direction >= 0
                if before and (abs(b - a) in intervals or a == start):
                    end, e2 = step(a, b, position[None])
                    total = squared + e2[0]
                    seen = visible and total <= (MAX_ERROR * max(size)) ** 2 and inside(end[0], size)
                    candidates.append((not seen, total, end[0]))
            if proposed is not None:
                position, total, seen, certain = (values[b] for values in proposed)
                seen = seen and total <= (MAX_ERROR * max(size)) ** 2 and inside(position, size)
                candidates = [*([] if certain else candidates), (not seen, total, position)]
            hidden, total, end = min(candidates, key=lambda candidate: candidate[:2])
            states[b] = end, total, not hidden
            b += direction
    return [states[t] for t in range(num_frames)]


@pytest.mark.parametrize("with_proposal", [False, True])
@pytest.mark.parametrize("seed,size,frames", [(0, (256, 256), 12), (1, (90, 160), 20), (2, (64, 48), 7)])
def test_agrees_with_one_point_at_a_time_on_random_flow(seed, size, frames, with_proposal):
    rng = np.random.default_rng(seed)
    moves, errors = rng.normal(0, 6, (frames, frames, 2)), rng.exponential(0.5 * max(size) / 256, (frames, frames))

    def step(a, b, points):
        return points + moves[a, b], np.full(len(points), errors[a, b] ** 2)

    queries = np.stack([rng.integers(0, frames, 15), rng.uniform(0, size[0], 15), rng.uniform(0, size[1], 15)], -1)
    visible, certain = rng.random((2, 15, frames)) < 0.5
    proposals = (rng.uniform(0, min(size), (15, frames, 2)), rng.exponential(max(size) / 256, (15, frames)), visible,
                 certain & ~visible)

    class Random:
        def candidates(self, rows, b, direction, paths):
            return Candidates(*(values[rows, b] for values in proposals))

    found = follow_intervals(queries.astype(np.float32), frames, size, step, Random() if with_proposal else None)
    for m, query in enumerate(queries.astype(np.float32)):
        proposed = [values[m] for values in proposals] if with_proposal else None
        positions, squared, visible = zip(*one_point(query, frames, size, step, INTERVALS, proposed), strict=True)
        assert np.allclose(found.tracks[m], positions, atol=1e-2)
        assert np.allclose(found.squared_error[m], squared, rtol=1e-4)
        assert (found.visible[m] == visible).all()


def test_baseline_follows_a_rendered_scene(small_sequence):
    """Half of the points are within a pixel in all frames, without any stored correspondences."""
    sequence = open_sequence(small_sequence)
    annotations = load_annotations(small_sequence / "annotations.npz", len(sequence))
    queries, rows = sample_queries(annotations, "first")
    found = multi_interval_flow_tracks(queries, sequence, *flow_model("--flow dis", sequence))
    error = np.linalg.norm(found.tracks - annotations.points[rows], axis=-1)
    assert np.median(error[~annotations.occluded[rows]]) < 0.5
    assert (found.visible == ~annotations.occluded[rows]).mean() > 0.9
