"""The order of frames, masks, depth maps and clips whose names have numbers without leading zeros."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from common.errors import UserError
from common.files import in_natural_order, natural_key
from loaders.checkpoint import Checkpoint, check_frames
from loaders.correspondences import open_correspondences
from loaders.images import first_missing
from loaders.sequence import open_sequence
from loaders.tapvid import open_benchmark
from loaders.track_files import Annotations, save_annotations
from loaders.video import read_video
from preprocessing.cli import main
from preprocessing.correspondence_writer import StoreWriter
from preprocessing.depth_priors import write_depth
from preprocessing.extract_frames import extract_frames, use_color
from preprocessing.flow import ModelOptions

COUNT = 12
SIZE = (24, 32)


def numbered(folder: Path, names: str = "img_{}.png", first: int = 0) -> Path:
    """A folder of images whose gray level is 10 times their number."""
    folder.mkdir(parents=True)
    for t in range(COUNT):
        cv2.imwrite(str(folder / names.format(first + t)), np.full((*SIZE, 3), 10 * t, np.uint8))
    return folder


def levels(frames) -> list[int]:
    return [int(frame.mean()) // 10 for frame in frames]


@pytest.mark.parametrize("names", [
    ["1", "2", "10"], ["img_2.png", "img_10.png", "img_0100.png"], ["a1b2", "a1b10", "a2b1"], ["0001", "0002", "0010"],
    ["shot2_v1", "shot2_v12", "shot10_v3"], ["img_01", "img_1"], ["9", "a", "b1"], ["é2", "é11"]])
def test_digits_are_compared_as_numbers(names):
    assert sorted(reversed(names), key=natural_key) == names
    assert in_natural_order(Path("x", name) for name in reversed(names)) == [Path("x", name) for name in names]


@pytest.mark.parametrize("names,first", [("img_{}.png", 0), ("{}.png", 95), ("take 2 frame{}.png", 3)])
def test_frames_are_read_in_the_order_of_their_numbers(names, first, tmp_path):
    folder = numbered(tmp_path / "clip", names, first)
    assert levels(read_video(folder)) == list(range(COUNT))
    assert levels(read_video(folder, 1, 8, 3)) == [1, 4, 7]
    numbered(tmp_path / "seq" / "color", names, first)
    assert levels(open_sequence(tmp_path / "seq").frames()) == list(range(COUNT))
    assert levels(open_sequence(tmp_path / "seq", 5).frames()) == list(range(5))


@pytest.mark.parametrize("names,missing", [
    (["f1", "f2", "f4", "f5", "f6", "f9"], 3), (["00.left", "05.left", "15.left", "20.left"], 10),
    (["1", "3", "5"], None), (["98", "99", "100"], None), (["a", "b", "d"], None), (["a1", "a2", "b1", "b2"], None),
    (["t17", "t94", "t301"], None), (["1", "5"], None)])
def test_the_first_missing_number(names, missing):
    assert first_missing([Path(f"{name}.png") for name in names]) == missing


def test_missing_images_are_a_warning(tmp_path, caplog):
    clip = numbered(tmp_path / "clip")
    (clip / "img_7.png").unlink()
    sequence = extract_frames(str(clip), tmp_path / "seq", stop=6)
    assert len(sequence) == 6 and not caplog.records
    extract_frames(str(clip), tmp_path / "all")
    use_color(numbered(tmp_path / "own" / "color").parent, 1000, None)
    (tmp_path / "own" / "color" / "img_3.png").unlink()
    use_color(tmp_path / "own", 1000, None)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert f"{clip} lacks images: 7 is the first" in caplog.text and "color lacks images: 3 is" in caplog.text


def test_masks_are_in_the_order_of_their_numbers(tmp_path):
    numbered(tmp_path / "color")
    (tmp_path / "mask").mkdir()
    for t in range(COUNT):
        mask = np.zeros(SIZE, np.uint8)
        mask[: t + 1] = 255
        cv2.imwrite(str(tmp_path / "mask" / f"m{t}.png"), mask)
    assert open_sequence(tmp_path).masks()[:, :, 0].sum(axis=1).tolist() == list(range(1, COUNT + 1))


def test_depth_maps_are_in_the_order_of_their_numbers(tmp_path):
    numbered(tmp_path / "color")
    (tmp_path / "maps").mkdir()
    for t in range(COUNT):
        np.save(tmp_path / "maps" / f"d{t}.npy", np.full(SIZE, t, np.float32))
    write_depth(open_sequence(tmp_path), "npz", ModelOptions(), tmp_path / "maps")
    priors = [np.load(tmp_path / "depth" / f"img_{t}.npy").mean() for t in range(COUNT)]
    assert priors == sorted(priors) and priors[0] < priors[-1]


def test_clips_of_a_benchmark_and_their_frames_are_in_the_order_of_their_numbers(tmp_path):
    points = np.zeros((1, COUNT, 2), np.float32)
    for k in range(1, 12):
        numbered(tmp_path / f"clip{k}" / "color")
        save_annotations(tmp_path / f"clip{k}" / "annotations.npz", Annotations(
            points, np.zeros((1, COUNT), bool), SIZE, None, None))
    clips = list(open_benchmark(tmp_path))
    assert [name for name, _ in clips] == [f"clip{k}" for k in range(1, 12)]
    assert levels(clips[0][1]().frames) == list(range(COUNT))


def in_text_order(meta: Path) -> None:
    """Rewrite a store's meta.json as it was when names were sorted as text."""
    entries = json.loads(meta.read_text())
    pairs = sorted(zip(entries["names"], entries["hashes"], strict=True))
    entries["names"], entries["hashes"] = ([pair[k] for pair in pairs] for k in (0, 1))
    meta.write_text(json.dumps(entries))


def test_what_was_made_in_the_order_of_text_is_refused(tmp_path):
    numbered(tmp_path / "color")
    sequence = open_sequence(tmp_path)
    good = np.ones(SIZE, bool)
    writer = StoreWriter(sequence, {"flow": "by hand"})
    for i, j in ((i, j) for i in range(COUNT) for j in range(COUNT) if i != j):
        writer.write(i, j, np.zeros((*SIZE, 2), np.float32), good, ~good)
    writer.finish()
    open_correspondences(sequence)
    in_text_order(tmp_path / "correspondences" / "meta.json")
    with pytest.raises(UserError, match=r"in another order .* 1, 2, 10"):
        open_correspondences(sequence)
    with pytest.raises(UserError, match="in another order"):
        main(["--data_dir", str(tmp_path)])
    hashes = list(sequence.hashes)
    old = Checkpoint(config={}, model={}, frames={"size": SIZE, "hashes": [hashes[1], hashes[0], *hashes[2:]]})
    with pytest.raises(UserError, match="in another order"):
        check_frames(old, SIZE, hashes, tmp_path / "model.pth")
    new = Checkpoint(config={}, model={}, frames={"size": SIZE, "hashes": hashes})
    check_frames(new, SIZE, hashes, tmp_path / "model.pth")
