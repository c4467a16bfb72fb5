"""Fixtures. `shared` finds files of ../shared, which are not in the repository; tests that need them skip without."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from loaders.correspondences import open_correspondences
from loaders.sequence import open_sequence
from preprocessing.cli import main as preprocess
from preprocessing.pipeline import Method, build_store
from preprocessing.synthetic.render import write_scene

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
torch.set_num_threads(1)  # threads that wait for each other make small work slow on a busy machine
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"  # for processes that tests start


@pytest.fixture(autouse=True)
def denormal_numbers():
    """Turn flushing of denormal numbers off after each test, since the drivers turn it on for the whole process."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def shared():
    """A function `shared(name)` that returns the path ../shared/NAME, and skips the test if it does not exist."""
    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"fixture ../shared/{name} is not here")
        return path
    return find


def write_small_sequence(folder: Path) -> Path:
    """Render 8 frames of 64x64 with annotations and compute their correspondences; returns `folder`."""
    write_scene(folder, "easy", (64, 64), 8, seed=0, num_points=64)
    build_store(open_sequence(folder), Method(pairs="all", chain=""))
    return folder


@pytest.fixture(scope="session")
def small_sequence(tmp_path_factory):
    """The folder of a rendered sequence; see `write_small_sequence`."""
    return write_small_sequence(tmp_path_factory.mktemp("small") / "small")


@pytest.fixture(scope="session")
def sequence_with_depth(small_sequence, tmp_path_factory):
    """The small sequence with an invented depth prior, a near disc in front of a tilted plane.

    Returns the sequence folder and the prior `(64, 64)` float64 of each frame."""
    folder = tmp_path_factory.mktemp("depth") / "seq"
    shutil.copytree(small_sequence, folder)
    y, x = np.mgrid[:64, :64]
    prior = np.where((x - 32) ** 2 + (y - 28) ** 2 < 300, 1.0, 3.0 + x / 64)
    np.savez(folder.parent / "depth.npz", depth=np.repeat(prior[None], 8, 0))
    preprocess(["--data_dir", str(folder), "--pairs", "all", "--no-chain", "--depth", "npz",
                "--depth_dir", str(folder.parent / "depth.npz")])
    return folder, prior


@pytest.fixture
def published_sequence(small_sequence, tmp_path):
    """The small sequence in OmniMotion's layout of folders."""
    sequence = open_sequence(small_sequence)
    store, root = open_correspondences(sequence), tmp_path / "published"
    shutil.copytree(small_sequence / "color", root / "color")
    for name in ("raft_exhaustive", "raft_masks", "count_maps"):
        (root / name).mkdir()
    stats = {}
    for i, j in store.pairs:
        pair, a, b = store.dense(i, j), sequence.names[i], sequence.names[j]
        np.save(root / "raft_exhaustive" / f"{a}_{b}.npy", pair.flow)
        mask = np.stack([pair.cycle, pair.occlusion, np.zeros_like(pair.cycle)], -1).astype(np.uint8) * 255
        cv2.imwrite(str(root / "raft_masks" / f"{a}_{b}.png"), mask[..., ::-1])
        stats.setdefault(a, {})[b] = int(store.counts[i, j])
        cv2.imwrite(str(root / "count_maps" / Path(a).with_suffix(".png")), store.count_map(i))
    (root / "flow_stats.json").write_text(json.dumps(stats))
    return root
