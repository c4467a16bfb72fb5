"""Store, filters, chains and the preprocessing command."""

import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.geometry import bilinear, inside, length, pixel_grid, similarity, similarity_on_cpu
from loaders.correspondence_format import MAX_FLOW, DensePair, PairIndex
from loaders.correspondences import open_correspondences
from loaders.sequence import open_sequence
from preprocessing.chaining import LINK_ERROR_TH, TrustedChains, chain_row, every_frame, part_budgets
from preprocessing.correspondence_writer import StoreWriter, encode
from preprocessing.filtering import cycle_flags, filter_flow
from preprocessing.flow import FLOW_MODELS, ModelOptions, flow_between
from preprocessing.options import RULES, main_parser
from preprocessing.pipeline import Method, build_store
from preprocessing.synthetic.render import write_scene
from tests.launch import Launched, launch
from third_party.sift import DenseSift

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments):
    """Run `python -m preprocessing`."""
    return launch("preprocessing", *arguments)


def dis_flow(a, b, adjacent):
    """DIS flow from image a to b, `(H, W, 2)`."""
    model = FLOW_MODELS["dis"](ModelOptions(), a.shape[:2], 1 << 30)
    return flow_between(model, a, b, adjacent, a.shape[:2])[0]


def textured(seed, size=(96, 128)):
    """A smooth random picture."""
    noise = np.random.default_rng(seed).uniform(0, 255, (*size, 3)).astype(np.float32)
    image = sum(cv2.GaussianBlur(noise, (0, 0), s) * s for s in (1.0, 2.5, 6.0))
    return cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


# Store

@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), reach=st.sampled_from([1.0, 50.0, 2000.0]), adjacent=st.booleans())
def test_round_off_is_at_most_a_32nd_of_a_pixel(seed, reach, adjacent):
    rng = np.random.default_rng(seed)
    flow = rng.uniform(-reach, reach, (9, 13, 2)).astype(np.float32)
    cycle = rng.random((9, 13)) < 0.5
    occlusion = rng.random((9, 13)) < 0.2  # tentative where also cycle
    block = encode(flow, cycle, occlusion, every_pixel=adjacent)
    pair = PairIndex(np.frombuffer(block.data, np.uint8), 0, block.stored, (9, 13)).decode()
    expected = np.arange(117) if adjacent else np.flatnonzero(cycle | occlusion)
    assert np.array_equal(pair.pixels, expected)
    assert block.valid == (cycle != occlusion).sum()
    assert np.abs(pair.flow(slice(None)) - flow.reshape(-1, 2)[expected]).max(initial=0) <= 1 / 32 + 1e-6
    assert np.array_equal(pair.cycle, cycle.ravel()[expected])
    assert np.array_equal(pair.occlusion, occlusion.ravel()[expected])
    index, pixels = PairIndex(np.frombuffer(block.data, np.uint8), 0, block.stored, (9, 13)), rng.permutation(117)
    rows, stored = index.find(pixels)
    assert np.array_equal(np.sort(pixels[stored]), expected)
    assert np.array_equal(pair.pixels[rows[stored]], pixels[stored]) and index.valid == block.valid
    assert np.array_equal(index.flow(rows[stored]), pair.flow(rows[stored]))
    assert np.array_equal(index.cycle_at(pixels[stored]), (pair.cycle & ~pair.occlusion)[rows[stored]])
    assert np.array_equal(index.tentative_at(pixels[stored]), (pair.cycle & pair.occlusion)[rows[stored]])
    assert np.array_equal(pair.tentative_at(pixels[stored]), (pair.cycle & pair.occlusion)[rows[stored]])
    assert np.array_equal(index.valid_pixels(), (cycle != occlusion).ravel())
    reliable = pair.without_tentative()
    kept = ~(pair.cycle & pair.occlusion)
    assert np.array_equal(reliable.pixels, pair.pixels[kept])
    assert np.array_equal(reliable.flow_q, pair.flow_q[kept])
    again, stored_too = pair.find(pixels)
    assert np.array_equal(stored, stored_too) and np.array_equal(rows[stored], again[stored])
    assert np.array_equal(pair.cycle_at(pixels[stored]), (pair.cycle & ~pair.occlusion)[rows[stored]])


def test_flow_beyond_16_bits_loses_its_flags():
    flow = np.zeros((8, 8, 2), np.float32)
    flow[0, 0], flow[1, 1] = MAX_FLOW + 1, np.nan
    block = encode(flow, np.ones((8, 8), bool), np.zeros((8, 8), bool), every_pixel=True)
    pair = PairIndex(np.frombuffer(block.data, np.uint8), 0, block.stored, (8, 8)).decode()
    assert block.valid == 62 and not pair.cycle[0] and not pair.cycle[9] and len(pair.pixels) == 64


def test_count_maps_count_the_valid_targets(small_sequence):
    store = open_correspondences(open_sequence(small_sequence))
    for i in (0, 5):
        pairs = [store.dense(i, j) for j in range(8) if j != i]
        assert np.array_equal(store.count_map(i), sum((pair.cycle | pair.occlusion).astype(int) for pair in pairs))
        assert store.counts[i].tolist() == [0 if j == i else (store.dense(i, j).cycle | store.dense(i, j).occlusion
                                                              ).sum() for j in range(8)]


@pytest.mark.parametrize("chain,keep,name,stop", [
    ("", "all", "write", 23), ("trusted", "half", "write", 40), ("trusted", "half", "pack", 3),
    ("unfiltered", "half", "pack", 3)])
def test_an_interrupted_store_ends_up_the_same(chain, keep, name, stop, small_sequence, tmp_path):
    """Stopped among the 56 direct pairs, or among the rows after them."""
    method = Method(pairs="all", chain=chain, keep=keep)
    folder = tmp_path / "again"
    shutil.copytree(small_sequence / "color", folder / "color")
    sequence = open_sequence(folder)
    build_store(sequence, method)
    whole = {path.name: path.read_bytes() for path in (folder / "correspondences").iterdir()}

    class StopError(Exception):
        pass

    calls, function = [], getattr(StoreWriter, name)

    def failing(self, *arguments, **options):
        calls.append(1)
        if len(calls) > stop:
            raise StopError
        function(self, *arguments, **options)

    shutil.rmtree(folder / "correspondences")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopError):
        patch.setattr(StoreWriter, name, failing)
        build_store(sequence, method)
    with pytest.raises(UserError, match="unfinished"):
        open_correspondences(sequence)
    build_store(sequence, method, resume=True)
    assert {path.name: path.read_bytes() for path in (folder / "correspondences").iterdir()} == whole


def test_a_store_does_not_depend_on_the_number_of_threads(small_sequence, tmp_path):
    files = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        shutil.copytree(small_sequence / "color", folder / "color")
        store = build_store(open_sequence(folder), Method(keep="half"), num_workers=workers)
        files.append({path.name: path.read_bytes() for path in store.root.iterdir()})
    assert files[0] == files[1]


def test_the_density_of_a_store_is_kept_unless_another_is_named(small_sequence, tmp_path):
    """Older versions stored everything at this size, and `auto` accepts it."""
    shutil.copytree(small_sequence / "color", tmp_path / "seq" / "color")
    sequence = open_sequence(tmp_path / "seq")
    half = build_store(sequence, Method(keep="half"))
    assert build_store(sequence, Method()).meta == half.meta
    with pytest.raises(UserError, match="was made with keep half, now it is all"):
        build_store(sequence, Method(keep="all"))
    with pytest.raises(UserError, match="was made with pairs log, now it is all"):
        build_store(sequence, Method(pairs="all"))


# Flow, filters, chains

def test_dis_finds_a_known_shift():
    image = textured(0)
    moved = cv2.warpAffine(image, np.array([[1, 0, 3.5], [0, 1, -2]], np.float32), (128, 96),
                           borderMode=cv2.BORDER_REFLECT)
    for close in (True, False):
        flow = dis_flow(image, moved, close)
        assert flow.shape == (96, 128, 2) and flow.dtype == np.float32
        assert np.abs(np.median(flow[16:-16, 16:-16], axis=(0, 1)) - (3.5, -2)).max() < 0.3


def test_flow_depends_on_the_pictures_alone():
    """Not on IPP, which rounds by the processor, nor on where in memory the pictures lie."""
    pictures = textured(0), textured(2)
    reference = [dis_flow(*pictures, adjacent) for adjacent in (True, False)]
    for ipp, offset in ((False, 0), (True, 16), (True, 36)):
        memory = [np.empty(picture.nbytes + 128, np.uint8) for picture in pictures]
        places = [-room.ctypes.data % 64 + offset for room in memory]
        moved = [room[start: start + picture.nbytes].reshape(picture.shape)
                 for room, start, picture in zip(memory, places, pictures, strict=True)]
        for there, picture in zip(moved, pictures, strict=True):
            there[...] = picture
        before = cv2.ipp.useIPP()
        cv2.ipp.setUseIPP(ipp)
        try:
            found = [dis_flow(*moved, adjacent) for adjacent in (True, False)]
            assert cv2.ipp.useIPP() == ipp  # the caller's setting
        finally:
            cv2.ipp.setUseIPP(before)
        assert all(np.array_equal(a, b) for a, b in zip(found, reference, strict=True))


def test_sift_recognizes_the_same_point():
    image = textured(1)
    moved = np.roll(image, (8, 12), axis=(0, 1))
    a, b = (torch.from_numpy(DenseSift()(im)).float() for im in (image, moved))
    p = pixel_grid((96, 128))[24:72, 24:96].reshape(-1, 2)
    same = similarity(a, b, p, p + torch.tensor([12.0, 8.0]), (96, 128))
    other = similarity(a, b, p, p + torch.tensor([12.0, 28.0]), (96, 128))
    assert same.median() > 0.97 and other.median() < DenseSift.threshold


def test_cycle_flags_of_an_object_that_passes_over_a_background():
    """A square moves 10 px to the right over ground that stays: what it covers is occluded, not cycle-consistent."""
    ab, ba = torch.zeros(40, 60, 2), torch.zeros(40, 60, 2)
    ab[10:20, 10:20, 0], ba[10:20, 20:30, 0] = 10, -10
    cycle, occlusion = cycle_flags(ab, ba, cycle_th=3.0)
    covered = torch.zeros(40, 60, dtype=torch.bool)
    covered[10:20, 20:30] = True
    assert not cycle[covered].any() and not occlusion[~covered].any()
    assert cycle[~covered].float().mean() == 1


@pytest.mark.parametrize("interval,features,expected", [
    (4, 1, (True, False)),   # features alike
    (4, -1, (True, True)),   # not alike: tentative
    (2, -1, (True, False)),  # features are compared from an interval of 3 on
])
def test_flow_is_tentative_where_features_differ(interval, features, expected):
    still = np.zeros((32, 40, 2), np.float32)
    both = [np.full((4, 4, 8), value, np.float16) for value in (1, features)]
    flags = filter_flow(still, still, *both, interval, 3.0, 0.5)
    for flag, value in zip(flags, expected, strict=True):
        assert (flag == value).all()


def chains_of(rule, direct):
    """The chains of a rule for `chain_row`, for frames of 64x64."""
    return TrustedChains(direct, (64, 64), every_frame) if rule == "trusted" else None


@pytest.mark.parametrize("rule", RULES)
def test_chains_reach_where_direct_flow_does_not(rule):
    """With direct flow of adjacent frames only, chains give the sum of the steps."""
    ones = np.ones((64, 64), bool)

    def direct(i, j):
        near = abs(i - j) == 1
        flow = np.full((64, 64, 2), (2.0, 1.0), np.float32) * (j - i)
        return DensePair(flow if near else 0 * flow, ones & near, ones & near, ones & False)

    frames = np.full((5, 64, 64, 3), 90, np.uint8)
    features = np.ones((4, 4, 8), np.float16)
    found = {j: (flow, cycle) for j, flow, cycle, _ in chain_row(
        0, [1, 2, 3, 4], frames.__getitem__, lambda t: features, direct, 0.5, chains_of(rule, direct))}
    assert sorted(found) == [1, 2, 3, 4]
    flow, cycle = found[4]
    assert np.allclose(flow[:40, :40], (8, 4)) and cycle[:40, :40].all() and not cycle[:, 60:].any()


class Clip:
    """Points move by (2, 1) a frame. Direct flow over two frames and more is off by `off` in x, consistent where
    `cycle`, and hidden where `occlusion`, tentative where both; the link from frame 2 to 3 does not lead back, by
    `gap`. In frame 4 features are different if `changed`, and colors too if it is "all"."""

    def __init__(self, off=0.0, gap=0.0, cycle=True, occlusion=False, changed=""):
        self.off, self.gap = off, gap
        self.flags = np.full((64, 64), cycle), np.full((64, 64), occlusion)
        self.images = np.full((6, 64, 64, 3), 90, np.uint8)
        self.features = np.ones((6, 4, 4, 8), np.float16)
        if changed:
            self.features[4] = -1
        if changed == "all":
            self.images[4] = 250

    def direct(self, i, j):
        flow = np.full((64, 64, 2), (2.0, 1.0), np.float32) * (j - i)
        if abs(i - j) > 1:
            flow[..., 0] += self.off
            return DensePair(flow, np.ones((64, 64), bool), *self.flags)
        if (i, j) == (2, 3):
            flow[..., 0] += self.gap
        return DensePair(flow, np.ones((64, 64), bool), np.full((64, 64), True), np.arange(64) < np.full((64, 1), 5))

    def found(self, rule, j=4, place=(30, 30)):
        """(flow, cycle, occlusion) of a pixel of frame 0 in frame j."""
        chains = chains_of(rule, self.direct)
        for target, *images in chain_row(
                0, [1, j], self.images.__getitem__, self.features.__getitem__, self.direct, 0.5, chains):
            if target == j:
                flow, cycle, occlusion = (image[place] for image in images)
                return tuple(float(x) for x in flow), bool(cycle), bool(occlusion)


CHAIN = (8.0, 4.0)


@pytest.mark.parametrize("clip,trusted,unfiltered", [
    (Clip(off=2.9), ((10.9, 4), True, False), ((10.9, 4), True, False)),     # both agree: direct flow does not drift
    (Clip(off=3.1), (CHAIN, True, False), ((11.1, 4), True, False)),         # they do not
    (Clip(off=20, changed="all"), (CHAIN, True, True), ((28, 4), True, False)),
    (Clip(off=20, changed="features"), (CHAIN, True, True), ((28, 4), True, False)),  # the chain is tentative
    (Clip(off=20, gap=5, cycle=True, occlusion=True), ((28, 4), True, True), ((13, 4), True, False)),
    (Clip(off=20, cycle=True, occlusion=True), (CHAIN, True, False), (CHAIN, True, False)),
    (Clip(off=20, cycle=False, occlusion=True, changed="features"), ((28, 4), False, True), ((28, 4), False, True)),
    (Clip(off=20, gap=0.4), ((8.4, 4), True, False), ((28, 4), True, False)),
    (Clip(off=20, gap=0.6), ((28, 4), True, False), ((28, 4), True, False)),  # the chain has broken
    (Clip(off=20, cycle=False), (CHAIN, True, False), (CHAIN, True, False)),  # there is no direct flow
    (Clip(off=20, cycle=False, changed="all"), (CHAIN, True, True), (CHAIN, False, False)),
    (Clip(off=20, cycle=False, occlusion=True), (CHAIN, True, False), ((28, 4), False, True)),
    (Clip(off=20, gap=5, cycle=False, occlusion=True), ((28, 4), False, True), ((28, 4), False, True)),
])
def test_which_of_chain_and_direct_flow_is_stored(clip, trusted, unfiltered):
    for rule, (flow, *flags) in (("trusted", trusted), ("unfiltered", unfiltered)):
        found, *found_flags = clip.found(rule)
        assert found_flags == flags, rule
        assert np.allclose(found, flow, atol=1 / 64) or not any(flags), rule


@pytest.mark.parametrize("rule", RULES)
def test_adjacent_frames_are_left_as_they_are(rule):
    near = Clip().found(rule, 1, (30, 2))
    assert near == ((2, 1), True, True)


def test_a_trusted_chain_ends_at_the_border():
    assert Clip(cycle=False).found("trusted", 4, (30, 55))[1] and not Clip(cycle=False).found("trusted", 4, (30, 56))[1]


def sequential(links, grid, alive):
    """The plain version of trusted chains: link after link, `links` from each frame to the next and back."""
    flow = torch.zeros_like(grid)
    for forward, backward in links:
        link = bilinear(forward, grid + flow)
        flow = flow + link
        end = grid + flow
        within = ((end >= 0) & (end <= grid[-1, -1])).all(dim=-1)
        alive = alive & (length(link + bilinear(backward, end)) <= LINK_ERROR_TH) & within
    return flow, alive


@pytest.mark.parametrize("j", [2, 5, 7, 12])
def test_joined_chains_are_those_of_link_after_link(j):
    """On smooth flow of up to 3 px a frame, parts of which do not lead back."""
    rng = np.random.default_rng(0)
    grid = pixel_grid((80, 100))

    def smooth(scale):
        noise = rng.normal(size=(80, 100, 2)).astype(np.float32)
        field = cv2.GaussianBlur(noise, (0, 0), 15)
        return torch.from_numpy(field * np.float32(scale / np.abs(field).max()))

    forward = [smooth(3) for _ in range(12)]
    backward = []
    for flow in forward:
        there = -flow
        for _ in range(20):  # the inverse of the flow
            there = -bilinear(flow, (grid + there).clamp(min=0).minimum(grid[-1, -1]))
        backward.append(there + torch.where(smooth(1)[..., :1] > 0.7, 2.0, 0.0))

    def direct(a, b):
        flow = forward[a] if b > a else backward[b]
        ones = np.ones((80, 100), bool)
        return DensePair(flow.numpy(), ones, ones, ~ones)

    flow, alive = TrustedChains(direct, (80, 100), every_frame)(0, j)
    forgetful = TrustedChains(direct, (80, 100), every_frame, budget=0)  # computes parts again
    forgetful(3, 0)
    assert all(torch.equal(a, b) for a, b in zip(forgetful(0, j), (flow, alive), strict=True))
    plain, plain_alive = sequential(list(zip(forward, backward, strict=True))[:j], grid,
                                    torch.ones(80, 100, dtype=torch.bool))
    both = alive & plain_alive
    assert both.float().mean() > 0.3
    assert (alive != plain_alive).float().mean() < 0.03  # at the outlines of what does not lead back
    error = length(flow - plain)[both]
    assert error.max() < LINK_ERROR_TH
    assert error.quantile(0.99) < 0.05


@pytest.mark.parametrize("num_frames", [10, 300, None])
def test_parts_of_chains_share_the_memory(num_frames):
    """All are kept if there is room; otherwise the longest parts get most."""
    size, parts = (40, 50), 2 * (num_frames or 0) * 40 * 50
    needed = {1: 9 * parts, 2: 9 * parts, 4: 5 * parts, 8: 5 * parts}
    for budget in (0, 1_000_000, 1 << 40):
        found = part_budgets(budget, size, num_frames)
        assert found.keys() == needed.keys() and sum(found.values()) <= budget
        if num_frames is None:
            assert list(found.values()) == sorted(found.values(), reverse=True)
        else:
            assert all(found[links] <= needed[links] for links in found)
            assert budget < 1 << 40 or found == needed



@pytest.mark.parametrize("channels", [72, 300])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_similarity_on_the_cpu_is_that_of_pytorch(channels, dtype):
    """Points between features, on them, and outside the frame."""
    rng = np.random.default_rng(0)
    a, b = (cv2.GaussianBlur(rng.random((17, 21, 3)).astype(np.float32), (0, 0), 1) @ rng.random((3, channels)) + 0.1
            for _ in range(2))
    a, b = a.astype(dtype), b.astype(dtype)
    p, q = (rng.uniform((-9, -9), (90, 74), (9_000, 2)).astype(np.float32) for _ in range(2))
    p[:100] = p[:100].round()
    plain = similarity(*(torch.from_numpy(x) for x in (a.astype(np.float32), b.astype(np.float32), p, q)), (65, 81))
    difference = np.abs(similarity_on_cpu(a, b, p, q, (65, 81)) - plain.numpy())
    within = inside(p, (65, 81)) & inside(q, (65, 81))
    assert difference[within].max() < 0.005
    assert np.mean(difference > 0.005) < 0.01  # where a point is just about one cell outside
    assert similarity_on_cpu(a, b, p[:0], q[:0], (65, 81)).shape == (0,)


def test_the_command_names_rules(capsys):
    arguments = ["--data_dir", "seq", "--resume"]
    for words, rule in (([], "trusted"), (["--no-chain"], ""), (["--chain"], "trusted"),
                        (["--chain", "unfiltered"], "unfiltered"), (["--chain", "published"], "unfiltered")):
        assert main_parser().parse_args([*words, *arguments]).chain == rule
    with pytest.raises(SystemExit, match="2"):
        main_parser().parse_args([*arguments, "--chain", "longest"])
    assert "longest" in capsys.readouterr().err


def test_chain_settings_are_written_as_in_older_stores():
    """A store is recognized by the settings in its meta.json."""
    said = {chain: Method(chain=chain).settings({}, {})["chain"] for chain in ("", *RULES)}
    assert said == {"": False, "unfiltered": True, "trusted": "trusted"}


def test_trusted_chains_with_the_older_threshold_are_refused(tmp_path):
    """Older versions allowed a forward-backward error of 1 px per link."""
    write_scene(tmp_path / "seq", "easy", (48, 48), 3, seed=0, num_points=4)
    sequence, method = open_sequence(tmp_path / "seq"), Method(pairs="all", chain="trusted")
    meta = build_store(sequence, method).root / "meta.json"
    said = json.loads(meta.read_text())
    assert said["method"].pop("chain_fb") == 0.5 and said["method"].pop("feature_chain_th") == DenseSift.chain_threshold
    assert build_store(sequence, method).root == meta.parent
    meta.write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"chain_fb None, now it is 0\.5: delete that folder"):
        build_store(sequence, method)
    unfiltered = Method(chain="unfiltered").settings({}, {})
    assert unfiltered["chain"] is True and "chain_fb" not in unfiltered


@pytest.mark.parametrize("rule,reaches", [("trusted", True), ("unfiltered", False)])
def test_the_ends_of_trusted_chains_need_look_less_alike(rule, reaches, tmp_path, monkeypatch):
    """Features of a frame are similar to those of another by 0.8. Direct flow needs more, and is not there."""
    angle = np.arccos(0.8)

    def feature(self, image):
        look = angle * (image[0, 0, 0] % 4)
        return np.tile(np.array([np.cos(look), np.sin(look)], np.float16), (4, 4, 1))

    monkeypatch.setattr(DenseSift, "__call__", feature)
    folder = tmp_path / "seq" / "color"
    folder.mkdir(parents=True)
    picture = textured(3, (48, 48)) // 8 * 8
    for t in range(4):
        cv2.imwrite(str(folder / f"{t:05d}.png"), picture + t // 3)  # the last one looks different
    store = build_store(open_sequence(tmp_path / "seq"), Method(chain=rule, pairs="all"))
    assert store.dense(0, 3).cycle.mean() > 0.9 if reaches else store.counts[0, 3] == 0


def test_bilinear_is_exact_on_a_plane():
    y, x = np.mgrid[:7, :9].astype(np.float32)
    plane = torch.from_numpy(np.stack([x, 2 * y], -1))
    p = torch.rand(50, 2) * torch.tensor([8.0, 6.0])
    assert torch.allclose(bilinear(plane, p), p * torch.tensor([1.0, 2.0]), atol=1e-5)


# The command

def test_a_second_run_of_preprocessing_changes_nothing(small_sequence, tmp_path):
    folder = tmp_path / "seq"
    first = command("--video", small_sequence / "color", "--data_dir", folder, "--max_frames", 4, "--resize", 48, 64)
    assert first.returncode == 0, first.stderr
    sequence = open_sequence(folder)
    assert len(sequence) == 4 and sequence.size == (48, 64)
    assert len(open_correspondences(sequence).pairs) == 10
    again = launch("preprocessing", "--data_dir", folder)
    assert again.returncode == 0 and "left as it is" in again.stderr
    other = launch("preprocessing", "--data_dir", folder, "--cycle_th", 2)
    assert other.returncode == 2 and "cycle_th" in other.stderr


def test_flow_of_one_pair(small_sequence, tmp_path):
    images = [small_sequence / "color" / f"0000{i}.png" for i in (0, 1)]
    result = command("flow", *images, "--flow", "dis", "--out", tmp_path / "flow.npy")
    assert result.returncode == 0, result.stderr
    flow = np.load(tmp_path / "flow.npy")
    assert flow.shape == (64, 64, 2) and flow.dtype == np.float32


@pytest.fixture
def broken(tmp_path):
    """`broken(kind)`: a folder of images with something wrong."""
    def make(kind):
        folder = tmp_path / kind / "color"
        folder.mkdir(parents=True)
        sizes = {"empty": [], "one": [(32, 32)], "sizes": [(32, 32), (32, 40)]}.get(kind, [(32, 32)] * 3)
        for i, size in enumerate(sizes):
            cv2.imwrite(str(folder / f"{i:05d}.png"), textured(i, size))
        if kind == "corrupt":
            (folder / "00001.png").write_bytes((folder / "00001.png").read_bytes()[:200])
        return folder.parent
    return make


@pytest.mark.parametrize("kind,words", [
    ("missing", "no folder"), ("empty", "no images: "), ("one", "one frame only"),
    ("sizes", "different sizes"), ("corrupt", "00001.png cannot be read")])
def test_bad_frames_are_one_line_and_exit_code_2(kind, words, broken, tmp_path):
    folder = tmp_path / "nowhere" if kind == "missing" else broken(kind)
    result = launch("preprocessing", "--data_dir", folder)
    assert result.returncode == 2 and words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_store_for_other_frames_is_refused(tmp_path):
    folder = tmp_path / "seq"
    write_scene(folder, "easy", (48, 48), 3, 0, 8)
    build_store(open_sequence(folder), Method())
    cv2.imwrite(str(folder / "color" / "00001.png"), textured(0, (48, 48)))
    with pytest.raises(UserError, match="other frames: 1 changed"):
        open_correspondences(open_sequence(folder))


def test_frames_of_another_video_are_not_overwritten(small_sequence, tmp_path):
    folder = tmp_path / "seq"
    write_scene(folder, "easy", (48, 48), 3, 0, 8)
    result = command("--video", small_sequence / "color", "--data_dir", folder)
    assert result.returncode == 2 and "already has other frames" in result.stderr
    assert len(open_sequence(folder)) == 3


def test_killed_twice_and_resumed_is_the_same(small_sequence, tmp_path):
    """SIGKILL in the flow stage and among the chains, when a given number of files is written."""
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        shutil.copytree(small_sequence / "color", folder / "color")
    run = ["--pairs", "all", "--density", "half", "--resume", "--num_workers", "2", "--data_dir"]
    subprocess.run([sys.executable, "-m", "preprocessing", *run, folders[0]], cwd=ROOT, check=True,
                   capture_output=True, timeout=120)
    for pattern, count in (("parts/0*/*.pair", 17), ("*.row", 2)):
        process = Launched("preprocessing", *run, folders[1], prepare=partial(os.nice, 10))  # killed in time
        while len(list((folders[1] / "correspondences").glob(pattern))) < count and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert not (folders[1] / "correspondences" / "meta.json").exists()
    assert launch("preprocessing", *run, folders[1]).returncode == 0
    first, second = ({path.name: path.read_bytes() for path in (folder / "correspondences").iterdir()}
                     for folder in folders)
    assert first == second


def test_frames_that_changed_after_an_unfinished_run_are_refused(small_sequence, tmp_path):
    folder = tmp_path / "seq"
    shutil.copytree(small_sequence / "color", folder / "color")
    StoreWriter(open_sequence(folder), Method().settings({}, {"th": DenseSift.threshold}))
    cv2.imwrite(str(folder / "color" / "00003.png"), textured(0, (64, 64)))
    with pytest.raises(UserError, match="another frame contents"):
        build_store(open_sequence(folder), Method(), resume=True)
    cv2.imwrite(str(folder / "color" / "00008.png"), textured(1, (64, 64)))
    with pytest.raises(UserError, match="another frame names"):
        build_store(open_sequence(folder), Method(), resume=True)
