"""A full disk during preprocessing, and interrupted writes. `make faults` runs longer tests."""

import json
import resource
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import atomic_path, write_text
from loaders.correspondences import open_correspondences
from loaders.sequence import open_sequence
from preprocessing.correspondence_writer import StoreWriter
from preprocessing.frame_cache import FrameCache
from tests.launch import launch

ROOT = Path(__file__).resolve().parents[1]


def sequence(folder, count=3):
    (folder / "color").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for t in range(count):
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), np.uint8)).save(folder / "color" / f"{t:05d}.png")
    return open_sequence(folder)


def preprocess(folder, prepare=None):
    return launch("preprocessing", "--data_dir", folder, "--resume", "--num_workers", "1", prepare=prepare)


def test_a_full_disk_is_one_error_line_and_the_same_command_resumes(tmp_path):
    made = sequence(tmp_path / "seq")
    result = preprocess(made.root, partial(resource.setrlimit, resource.RLIMIT_FSIZE, (6_000, 6_000)))
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert last.startswith("error: ") and "ulimit -f" in last and "--resume continues" in last
    assert not list(made.root.rglob("*.row"))
    assert preprocess(made.root).returncode == 0
    assert len(open_correspondences(made).pairs) == 6


def test_truncated_parts_are_computed_again(tmp_path):
    made = sequence(tmp_path / "seq")
    writer, good = StoreWriter(made, {}), np.ones((48, 48), bool)
    writer.write(0, 1, np.zeros((48, 48, 2), np.float32), good, ~good)
    assert writer.has(0, 1)
    part = writer._part(0, 1)
    for length in (0, 5, 100, part.stat().st_size - 1):
        part.write_bytes(part.read_bytes()[:length].ljust(length, b"\0"))
        assert not StoreWriter(made, {}, resume=True).has(0, 1)

    cache = FrameCache(lambda t: (np.full(9, t),), 0, tmp_path / "cache")
    assert cache[3][0][0] == 3
    (tmp_path / "cache" / "00003.npz").write_bytes(b"PK\x03\x04")
    assert FrameCache(lambda t: (np.full(9, t),), 0, tmp_path / "cache")[3][0].tolist() == [3] * 9


def test_an_unfinished_store_of_another_version_is_begun_again(tmp_path, caplog):
    """What it would compute for the same settings may differ."""
    made = sequence(tmp_path / "seq")
    writer, good = StoreWriter(made, {}), np.ones((48, 48), bool)
    writer.write(0, 1, np.zeros((48, 48, 2), np.float32), good, ~good)
    journal = made.root / "correspondences" / "unfinished.json"
    begun = json.loads(journal.read_text())
    journal.write_text(json.dumps({key: value for key, value in begun.items() if key != "revision"}))
    assert not StoreWriter(made, {}, resume=True).has(0, 1)
    assert "begun by another version" in caplog.text and json.loads(journal.read_text()) == begun


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    try:
        with atomic_path(tmp_path / "a.txt") as path:
            path.write_text("half")
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert (tmp_path / "a.txt").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
