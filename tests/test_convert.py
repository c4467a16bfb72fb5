"""Conversion between the store and OmniMotion's layout."""

import json
import shutil

import cv2
import numpy as np
import pytest

from common.errors import UserError
from loaders.correspondences import CorrespondenceStore, open_correspondences
from loaders.omnimotion_layout import OmniMotionFolder
from loaders.sequence import open_sequence
from preprocessing.cli import main


@pytest.fixture
def folder(small_sequence, tmp_path):
    shutil.copytree(small_sequence, tmp_path / "seq")
    return tmp_path / "seq"


def same(a, b, pairs):
    for i, j in pairs:
        x, y = a.stored(i, j), b.stored(i, j)
        assert all(np.array_equal(getattr(x, k), getattr(y, k)) for k in ("pixels", "flow_q", "cycle", "occlusion"))


def test_a_store_converted_to_omnimotions_layout_and_back_is_the_same_without_tentative_flow(folder):
    store = open_correspondences(open_sequence(folder))
    main(["convert", "--data_dir", str(folder), "--to", "omnimotion"])

    flow = np.load(folder / "raft_exhaustive" / "00000.png_00003.png.npy")  # what OmniMotion's own loader reads
    mask = cv2.imread(str(folder / "raft_masks" / "00000.png_00003.png.png"))[..., ::-1] > 0
    count = cv2.imread(str(folder / "count_maps" / "00000.png"), cv2.IMREAD_UNCHANGED)
    stats = json.loads((folder / "flow_stats.json").read_text())
    pair = store.dense(0, 3)
    assert flow.shape == (64, 64, 2) and flow.dtype == np.float32 and np.array_equal(flow, pair.flow)
    assert np.array_equal(mask[..., 0], pair.cycle) and np.array_equal(mask[..., 1], pair.occlusion)
    assert count.dtype == np.uint16 and np.array_equal(count, store.count_map(0))
    assert stats["00000.png"]["00003.png"] == store.counts[0, 3] and len(stats) == 8

    shutil.move(folder / "correspondences", folder / "before")
    published = open_correspondences(open_sequence(folder))
    assert isinstance(published, OmniMotionFolder)
    before = CorrespondenceStore(folder / "before", store.meta, 8)
    same(before, published, store.pairs.tolist())
    main(["convert", "--data_dir", str(folder), "--to", "store"])
    after = open_correspondences(open_sequence(folder))
    same(before, after, store.pairs.tolist())
    assert np.array_equal(before.counts, after.counts)
    assert all(np.array_equal(before.count_map(i), after.count_map(i)) for i in range(8))


def test_an_interrupted_conversion_goes_on(folder):
    main(["convert", "--data_dir", str(folder), "--to", "omnimotion"])
    files = {path: path.read_bytes() for path in folder.glob("[rcf]*/*") if path.is_file()}
    (folder / "flow_stats.json").unlink()  # the last file
    for path in list(folder.glob("raft_masks/*"))[::3]:
        path.unlink()
    main(["convert", "--data_dir", str(folder), "--to", "omnimotion"])
    assert {path: path.read_bytes() for path in files} == files and (folder / "flow_stats.json").is_file()


def test_layout_omnimotion_leaves_no_store(folder, tmp_path):
    shutil.copytree(folder / "color", tmp_path / "new" / "color")
    for _ in range(2):  # the second time it is left as it is
        main(["--data_dir", str(tmp_path / "new"), "--layout", "omnimotion", "--pairs", "window:2"])
        assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
            "color", "count_maps", "flow_stats.json", "raft_exhaustive", "raft_masks"]
    assert len(open_correspondences(open_sequence(tmp_path / "new")).pairs) == 26


@pytest.mark.parametrize("there,to,words", [
    ([], "omnimotion", "no store"), ([], "store", "does not have OmniMotion's layout"),
    (["correspondences"], "store", "exists already")])
def test_nothing_to_convert_is_one_line(there, to, words, folder, tmp_path):
    for name in ["color", *there]:
        shutil.copytree(folder / name, tmp_path / "new" / name)
    with pytest.raises(UserError, match=words):
        main(["convert", "--data_dir", str(tmp_path / "new"), "--to", to])
