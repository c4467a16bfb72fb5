"""Selection of pairs, estimated cost, memory, and density of the store."""

import shutil
import threading
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import UserError
from loaders.correspondence_format import PairIndex, checkerboard_parity
from loaders.scenes import one_scene
from loaders.sequence import open_sequence
from preprocessing.correspondence_writer import encode
from preprocessing.frame_cache import FrameCache
from preprocessing.pair_selection import intervals, ordered_pairs, pairs_at
from preprocessing.pipeline import Method, build_store, summary

ALL_PAIRS = Method(pairs="all", chain="")


@pytest.fixture
def fresh(small_sequence, tmp_path):
    """The frames of the small sequence without correspondences."""
    shutil.copytree(small_sequence / "color", tmp_path / "seq" / "color")
    return open_sequence(tmp_path / "seq")


def test_intervals():
    assert intervals("all", 5) == dict.fromkeys([1, 2, 3, 4], 1)
    assert list(intervals("window:3", 250)) == [1, 2, 3] and list(intervals("window:9", 4)) == [1, 2, 3]
    assert intervals("log", 60) == dict.fromkeys([1, 2, 4, 8, 16, 32], 1)
    assert list(intervals("log", 2)) == [1]
    for wrong in ("some", "window", "window:0", "window:x"):
        with pytest.raises(UserError, match="all, log, or window:K"):
            intervals(wrong, 10)


def test_log_has_every_pair_up_to_64_frames_and_grows_with_the_number_of_frames():
    count = {T: len(ordered_pairs(intervals("log", T), one_scene(T))) for T in (96, 320, 1_000, 4_000)}
    assert count[96] == 2 * sum(96 - d for d in (1, 2, 4, 8, 16, 32, 64))
    assert count[320] < 14 * 320 and count[1_000] < 15 * 1_000 and count[4_000] < 15 * 4_000


@pytest.mark.parametrize("T", [97, 320, 1_501])
def test_the_next_shorter_pair_from_either_frame_of_a_pair_is_chosen_too(T):
    """A warm start of RAFT begins with its flow."""
    chosen = intervals("log", T)
    pairs = set(ordered_pairs(chosen, one_scene(T)))
    for longer, shorter in pairwise(reversed(chosen)):
        for i, j in pairs_at(longer, chosen[longer], one_scene(T)):
            assert {(i, i + shorter), (j, j - shorter)} <= pairs


def test_a_store_with_all_long_pairs_is_finished_as_it_is(fresh, monkeypatch):
    """As stores were before the long intervals of "log" had steps."""
    whole = build_store(fresh, Method())
    before = {path.name: path.read_bytes() for path in whole.root.iterdir()}
    monkeypatch.setattr("preprocessing.pair_selection.EVERY_FRAME", 2)
    monkeypatch.setattr("preprocessing.pair_selection.STARTS", 1)
    assert len(ordered_pairs(intervals("log", 8), one_scene(8))) < len(whole.pairs)
    again = build_store(fresh, Method())
    assert np.array_equal(again.pairs, whole.pairs)
    assert before == {path.name: path.read_bytes() for path in whole.root.iterdir()}


def test_a_store_with_pairs_3_and_6_frames_apart_is_finished_as_it_is(fresh, monkeypatch):
    """As stores of "log" had them before."""
    with monkeypatch.context() as patch:
        patch.setattr("preprocessing.pipeline.intervals", lambda *arguments: dict.fromkeys((1, 2, 3, 4, 6), 1))
        whole = build_store(fresh, Method())
    before = {path.name: path.read_bytes() for path in whole.root.iterdir()}
    assert len(build_store(fresh, Method()).pairs) == len(whole.pairs) == 48
    assert before == {path.name: path.read_bytes() for path in whole.root.iterdir()}


def test_trusted_chains_do_not_depend_on_which_other_pairs_are_chosen(fresh, monkeypatch):
    whole = build_store(open_sequence(shutil.copytree(fresh.root, fresh.root.parent / "whole")), Method())
    monkeypatch.setattr("preprocessing.pair_selection.EVERY_FRAME", 2)
    monkeypatch.setattr("preprocessing.pair_selection.STARTS", 1)
    store = build_store(fresh, Method())
    found = set(map(tuple, store.pairs.tolist()))
    assert (0, 4) in found and (1, 5) not in found and (1, 2) in found
    assert found == set(ordered_pairs(intervals("log", 8), one_scene(8)))
    for i, j in found:
        one, other = store.dense(i, j), whole.dense(i, j)
        assert all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


def test_a_window_is_chained_within_itself(fresh):
    store = build_store(fresh, Method(pairs="window:2", chain="unfiltered"))
    assert {abs(i - j) for i, j in store.pairs.tolist()} == {1, 2} and len(store.pairs) == 2 * (7 + 6)


def test_half_is_a_checkerboard_of_the_distant_pairs(fresh, small_sequence):
    whole = build_store(open_sequence(small_sequence), ALL_PAIRS)
    half = build_store(fresh, replace(ALL_PAIRS, keep="half"))
    y, x = np.mgrid[:64, :64]
    for i, j in ((0, 1), (0, 5), (6, 3)):
        a, b = whole.dense(i, j), half.dense(i, j)
        kept = np.ones((64, 64), bool) if abs(i - j) == 1 else (x + y + checkerboard_parity(i, j)) % 2 == 0
        assert np.array_equal(a.cycle & kept, b.cycle) and np.array_equal(a.occlusion & kept, b.occlusion)
        assert np.array_equal(a.flow[kept], b.flow[kept]) and half.counts[i, j] == (b.cycle | b.occlusion).sum()
    assert np.array_equal(half.count_map(2), sum(
        (half.dense(2, j).cycle | half.dense(2, j).occlusion).astype(int) for j in range(8) if j != 2))
    assert half.counts[0, 5] == pytest.approx(whole.counts[0, 5] / 2, rel=0.1)
    for line in (summary(whole, whole.root), summary(half, half.root)):  # shares are those before thinning
        share = float(line.split("3-5: ")[1].split("%")[0]) / 100
        counts = [whole.counts[i, j] for i in range(8) for j in range(8) if 3 <= abs(i - j) <= 5]
        assert share == pytest.approx(np.mean(counts) / 64**2, abs=0.02)


def test_every_pixel_has_distant_correspondences_in_half_of_a_store():
    """Both colors of the checkerboard occur in each frame, also if all intervals are powers of 2."""
    for num_frames in (9, 84):
        chosen = intervals("log", num_frames)
        for i in range(num_frames):
            distant = [j for a, j in ordered_pairs(chosen, one_scene(num_frames)) if a == i and abs(i - j) > 1]
            assert {checkerboard_parity(i, j) for j in distant} == {0, 1}, i


@pytest.mark.parametrize("size", [(16, 16), (17, 19), (33, 20)])
def test_the_color_of_a_checkerboard_is_found_in_a_stored_pair(size):
    y, x = np.indices(size)
    flow, nothing = np.zeros((*size, 2), np.float32), np.zeros(size, bool)
    for parity in (0, 1):
        some = ((x + y + parity) % 2 == 0) & (np.random.default_rng(parity).random(size) < 0.3)
        for flags, expected in ((some, parity), (some | (x == 0), None), (~nothing, None)):
            block = encode(flow, flags, nothing, every_pixel=False)
            index = PairIndex(np.frombuffer(block.data, np.uint8), 0, block.stored, size)
            assert index.parity(size) == index.decode().parity(size) == expected


def test_the_cost_is_logged_and_a_small_disk_is_refused(fresh, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 19))
    with pytest.raises(UserError, match=r"GiB are needed.*--pairs log"):
        build_store(fresh, ALL_PAIRS)
    assert "56 ordered pairs of frames; flow takes about" in caplog.text
    monkeypatch.undo()
    store = build_store(fresh, ALL_PAIRS, resume=True)
    told = int(caplog.text.split("the store about ")[-1].split(" MiB")[0])
    assert told == pytest.approx(sum(p.stat().st_size for p in store.root.iterdir()) / 2**20, abs=1)


def test_memory_that_does_not_suffice_is_refused(fresh):
    with pytest.raises(UserError, match=r"--memory_gib 0\.5 is too little"):
        build_store(fresh, Method(), max_memory=1 << 29)


def test_a_cache_keeps_the_most_recently_used_and_computes_once(tmp_path):
    computed = []

    def compute(t):
        computed.append(t)
        return np.full(100, t, np.uint8), np.array([t])

    cache = FrameCache(compute, budget=250)
    for t in (0, 1, 0, 2, 0, 1):  # 108 bytes each: two fit, 1 is forgotten for 2
        assert cache[t][0][0] == t
    assert computed == [0, 1, 2, 1]
    computed.clear()
    spilled = FrameCache(compute, budget=0, folder=tmp_path)
    for t in (0, 1, 0, 1):
        assert spilled[t][1] == t
    assert computed == [0, 1]


def asked_by_two_threads(cache: FrameCache, begun: threading.Event, go_on: threading.Event) -> list:
    """What two threads get from cache[5], arrays or errors, in any order. The second one asks when the first one has
    `begun` to compute, which goes on after that."""
    got = []

    def ask():
        try:
            got.append(cache[5][0].tolist())
        except UserError as error:
            got.append(str(error))

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(2)]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    time.sleep(0.1)  # until the second one waits; if that takes longer, the test finds nothing
    go_on.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    return got


@pytest.mark.parametrize("fails", [False, True])
def test_threads_that_ask_a_cache_for_the_same_arrays_compute_them_once(fails):
    """If that fails, the second one computes them."""
    begun, go_on = threading.Event(), threading.Event()
    computed = []

    def compute(t):
        computed.append(t)
        if len(computed) > 1:
            return (np.full(3, t),)
        begun.set()
        assert go_on.wait(10)
        if fails:
            raise UserError("no memory")
        return (np.full(3, t),)

    got = asked_by_two_threads(FrameCache(compute, budget=1_000), begun, go_on)
    if fails:
        assert sorted(got, key=str) == [[5] * 3, "no memory"] and computed == [5, 5]
    else:
        assert got == [[5] * 3] * 2 and computed == [5]
