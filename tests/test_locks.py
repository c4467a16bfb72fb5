"""Two processes on one folder: the second is refused, and no store with missing pairs counts as finished."""

import shutil
import signal

import pytest

from common.errors import UserError
from common.locks import lock_folder
from loaders.correspondences import open_correspondences, row_path
from loaders.sequence import open_sequence
from preprocessing.cli import main
from preprocessing.correspondence_writer import StoreWriter
from preprocessing.pipeline import Method, build_store
from tests.launch import Launched, launch, wait_until


def test_a_lock_is_held_until_the_end_and_leaves_no_file(tmp_path):
    with lock_folder(tmp_path):
        with pytest.raises(UserError, match=r"another process works in .* \(process \d+ on .+\): wait for its end"):
            with lock_folder(tmp_path):
                pass
        assert (tmp_path / ".lock").is_file()
    with lock_folder(tmp_path):
        pass
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_locked_is_not_locked(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "missing", tmp_path / "file" / "below"):
        with lock_folder(folder), lock_folder(folder):
            pass
    assert not (tmp_path / "missing").exists()
    with lock_folder(tmp_path / "new", make=True):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()


@pytest.fixture
def fresh(small_sequence, tmp_path):
    """The frames of the small sequence without correspondences."""
    shutil.copytree(small_sequence / "color", tmp_path / "seq" / "color")
    return tmp_path / "seq"


def test_a_second_preprocessing_is_refused_and_a_killed_one_blocks_nothing(fresh):
    with lock_folder(fresh):
        said = launch("preprocessing", "--data_dir", fresh)
        assert said.returncode == 2 and len(said.stderr.strip().splitlines()) == 1
        assert f"error: another process works in {fresh}" in said.stderr
    first = Launched("preprocessing", "--data_dir", fresh, "--num_workers", "1")
    wait_until((fresh / ".lock").is_file, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    (fresh / ".lock").write_text("1 nowhere")  # as it may stay
    main(["--data_dir", str(fresh)])
    assert len(open_correspondences(open_sequence(fresh)).pairs) == 34 and not (fresh / ".lock").exists()


def test_a_second_training_is_refused(small_sequence, tmp_path):
    with lock_folder(tmp_path / "demo_small", make=True):
        said = launch("train.py", "--config", "configs/demo.txt", "--data_dir", small_sequence, "--save_dir", tmp_path,
                      "--num_iters", "2", "--no_tensorboard")
        assert said.returncode == 2 and said.stderr.strip().splitlines()[-1].startswith(
            f"error: another process works in {tmp_path / 'demo_small'} (process ")
        assert [path.name for path in (tmp_path / "demo_small").iterdir()] == [".lock"]


def test_a_store_that_lacks_pairs_is_not_finished(fresh, monkeypatch):
    """Neither when it is written, nor when it is opened later."""
    write = StoreWriter.write

    def forgetful(self, i, j, *arguments, **options):
        if (i, j) != (2, 6):
            write(self, i, j, *arguments, **options)

    sequence = open_sequence(fresh)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"lacks 1 of 34 pairs, first \(2, 6\)"):
        patch.setattr(StoreWriter, "write", forgetful)
        build_store(sequence, Method())
    assert not (fresh / "correspondences" / "meta.json").exists()
    shutil.rmtree(fresh / "correspondences")
    store = build_store(sequence, Method())
    shutil.copytree(fresh / "color", fresh / "fewer" / "color")
    fewer = build_store(open_sequence(fresh / "fewer"), Method(pairs="window:2"))
    shutil.copyfile(row_path(fewer.root, 0), row_path(store.root, 0))
    with pytest.raises(UserError, match=r"lacks 1 of 34 pairs, first \(0, 4\): delete that folder"):
        build_store(sequence, Method())
