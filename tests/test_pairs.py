"""Selection of pairs, estimated cost, memory, and density of the store."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import UserError
from loaders.sequence import open_sequence
from preprocessing.frame_cache import FrameCache
from preprocessing.pair_selection import intervals
from preprocessing.pipeline import Method, build_store, summary

ALL_PAIRS = Method(pairs="all", chain="")


@pytest.fixture
def fresh(small_sequence, tmp_path):
    """The frames of the small sequence without correspondences."""
    shutil.copytree(small_sequence / "color", tmp_path / "seq" / "color")
    return open_sequence(tmp_path / "seq")


def test_intervals():
    assert intervals("all", 5) == [1, 2, 3, 4]
    assert intervals("window:3", 250) == [1, 2, 3] and intervals("window:9", 4) == [1, 2, 3]
    assert intervals("log", 60) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    assert intervals("log", 2) == [1]
    for wrong in ("some", "window", "window:0", "window:x"):
        with pytest.raises(UserError, match="all, log, or window:K"):
            intervals(wrong, 10)


def test_a_window_is_chained_within_itself(fresh):
    store = build_store(fresh, Method(pairs="window:2", chain="unfiltered"))
    assert {abs(i - j) for i, j in store.pairs.tolist()} == {1, 2} and len(store.pairs) == 2 * (7 + 6)


def test_half_is_a_checkerboard_of_the_distant_pairs(fresh, small_sequence):
    whole = build_store(open_sequence(small_sequence), ALL_PAIRS)
    half = build_store(fresh, replace(ALL_PAIRS, keep="half"))
    y, x = np.mgrid[:64, :64]
    for i, j in ((0, 1), (0, 5), (6, 3)):
        a, b = whole.dense(i, j), half.dense(i, j)
        kept = np.ones((64, 64), bool) if abs(i - j) == 1 else (x + y + i + j) % 2 == 0
        assert np.array_equal(a.cycle & kept, b.cycle) and np.array_equal(a.occlusion & kept, b.occlusion)
        assert np.array_equal(a.flow[kept], b.flow[kept]) and half.counts[i, j] == (b.cycle | b.occlusion).sum()
    assert np.array_equal(half.count_map(2), sum(
        (half.dense(2, j).cycle | half.dense(2, j).occlusion).astype(int) for j in range(8) if j != 2))
    assert half.counts[0, 5] == pytest.approx(whole.counts[0, 5] / 2, rel=0.1)
    for line in (summary(whole, whole.root), summary(half, half.root)):  # shares are those before thinning
        share = float(line.split("3-5: ")[1].split("%")[0]) / 100
        counts = [whole.counts[i, j] for i in range(8) for j in range(8) if 3 <= abs(i - j) <= 5]
        assert share == pytest.approx(np.mean(counts) / 64**2, abs=0.02)


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
