"""Killed runs, damaged checkpoints, full and read-only disks: no saved state is lost."""

import logging
import os
import random
import resource
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from loaders.checkpoint import Checkpoint, checkpoints, newest_checkpoint, read_checkpoint, write_checkpoint
from tests.launch import Launched, wait_until
from tests.test_training import options
from training.checkpointing import checkpoint_of
from training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--num_pairs 2 --num_pts 32 --num_samples_ray 8 --coupling_width 32 --affine_width 16 --affine_layers 3 "
         "--field_width 24 --start_interval 10 --i_img 0 --no_tensorboard --device cpu").split()


def start(folder, out, *more, command=None, small=True, prepare=None):
    """Start train.py, or `command`, with one thread."""
    more = ["--data_dir", str(folder), "--save_dir", str(out), *SMALL * small, *map(str, more)]
    if command is None:
        return Launched("train.py", *more, prepare=prepare)
    return subprocess.Popen([*command, *more], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def finished(process, timeout=120):
    """Exit code, and the lines on stderr without progress bars."""
    said = process.communicate(timeout=timeout)[1]
    return process.returncode, [line for line in said.replace("\r", "\n").splitlines() if "step/s" not in line]


def same(a, b):
    """Whether nested containers of tensors are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or (a != a and b != b)  # NaN


STATE = ("step", "model", "optimizers", "skipped_in_a_row", "error_map", "sampler", "generators", "rng")


def same_state(a, b):
    """Whether two checkpoints hold the same state of a run, bit for bit."""
    return all(same(getattr(a, name), getattr(b, name)) for name in STATE)


def test_a_killed_run_that_is_resumed_equals_an_uninterrupted_one(small_sequence, tmp_path):
    """SIGKILL at a random moment, with a checkpoint about every quarter of a second."""
    steps, chance = 40, random.Random()
    seed = chance.randrange(10**6)
    chance.seed(seed)
    whole = start(small_sequence, tmp_path / "whole", "--num_iters", steps, "--save_every_minutes", 0)
    assert finished(whole)[0] == 0
    process = start(small_sequence, tmp_path / "parts", "--num_iters", steps, "--save_every_minutes", 0.004)
    wait_until(lambda: checkpoints(tmp_path / "parts" / "default_small"), process)
    time.sleep(chance.random() * 0.5)
    process.kill()
    assert finished(process)[0] == -signal.SIGKILL
    code, said = finished(start(small_sequence, tmp_path / "parts", "--num_iters", steps))
    assert code == 0 and any("going on from" in line for line in said), said
    a, b = (read_checkpoint(tmp_path / run / "default_small" / f"model_{steps:06d}.pth") for run in ("whole", "parts"))
    assert same_state(a, b), f"seed {seed}"


# Checkpoint files

@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of steps 1 to 3."""
    for step in (1, 2, 3):
        checkpoint = Checkpoint({"a": 1}, {"w": torch.arange(5_000.0) * step}, step)
        write_checkpoint(tmp_path / f"model_{step:06d}.pth", checkpoint)
    return tmp_path


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "sum cut off":
        data = data[:-71]
    elif how == "a bit of a tensor":
        data[data.index(torch.arange(5_000.0).mul(3)[4_000:4_010].numpy().tobytes())] ^= 1
    elif how == "a bit of the sum":
        data[-5] ^= 1
    elif how == "the mark of the sum":
        data[-70] ^= 1
    elif how == "empty":
        data = b""
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "sum cut off", "a bit of a tensor", "a bit of the sum", "the mark of the sum",
                                 "empty"])
def test_a_damaged_checkpoint_is_named_and_passed_over(how, saved, caplog):
    damage(saved / "model_000003.pth", how)
    with caplog.at_level(logging.WARNING):
        path, state = newest_checkpoint(saved)
    assert path.name == "model_000002.pth" and torch.equal(state.model["w"], torch.arange(5_000.0) * 2)
    assert len(caplog.messages) == 1 and "model_000003.pth" in caplog.text and "damaged" in caplog.text


def test_torch_load_reads_the_checkpoints(saved):
    assert torch.load(saved / "model_000003.pth", weights_only=True)["step"] == 3


def test_if_all_checkpoints_are_damaged_the_run_is_refused(saved):
    for path in checkpoints(saved):
        damage(path, "a bit of the sum")
    with pytest.raises(UserError, match="all 3 checkpoints"):
        newest_checkpoint(saved)


def test_the_newest_checkpoint_is_the_one_with_the_most_steps_not_the_latest_time(saved):
    for days, step in enumerate((3, 2, 1)):
        os.utime(saved / f"model_{step:06d}.pth", (86_400 * days, 86_400 * days))
    assert newest_checkpoint(saved)[0].name == "model_000003.pth"


def test_the_last_ones_are_kept_and_a_new_run_does_not_go_on_from_an_old_one(small_sequence, tmp_path):
    trainer = Trainer(options(small_sequence, tmp_path, "--keep", "2"))
    for _ in range(4):
        trainer.train_step()
        trainer.save()
    assert [path.name for path in checkpoints(trainer.dir)] == ["model_000004.pth", "model_000003.pth"]
    again = Trainer(options(small_sequence, tmp_path, "--keep", "2", "--no_reload"))
    again.train_step()
    again.save()
    assert [path.name for path in checkpoints(trainer.dir)] == ["model_000001.pth"]
    assert {path.name for path in (trainer.dir / "earlier_1").iterdir()} == {"model_000004.pth", "model_000003.pth"}
    assert Trainer(options(small_sequence, tmp_path)).step == 1


def test_state_of_another_backend_is_refused_in_one_line(small_sequence, tmp_path):
    """tiny-cuda-nn keeps all weights of a layer in one vector, and so do the optimizer's moments."""
    trainer = Trainer(options(small_sequence, tmp_path))
    trainer.train_step()
    state = checkpoint_of(trainer)
    adam = state.optimizers["adam"]
    first = adam["param_groups"][0]["params"]
    for key in first[1:]:
        del adam["state"][key]
    adam["param_groups"][0]["params"] = first[:1]
    state.options["mlp_backend"] = "tcnn"
    write_checkpoint(trainer.dir / "model_000001.pth", state)
    with pytest.raises(UserError, match=r"made with --mlp_backend tcnn.*--mlp_backend auto cannot take over"):
        Trainer(options(small_sequence, tmp_path))


# Limits: real file systems and limits of the system

@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(size, read_only)` mounts a file system of its own; the test skips where that is not allowed."""
    mounted = []

    def mount(options):
        folder = tmp_path / f"disk_{len(mounted)}"
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(folder)
        return folder
    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def one_line_and_exit_2(code, said):
    lines = [line for line in said if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in "\n".join(said), said
    return lines[0]


def test_a_full_disk_stops_the_run_and_damages_no_file(small_sequence, small_disk):
    """The disk has room for the first checkpoints; the run resumes when space is freed."""
    disk = small_disk("size=48m")
    arguments = ["--num_iters", 40, "--i_weight", 1, "--keep", 0]
    line = one_line_and_exit_2(*finished(start(small_sequence, disk, *arguments)))
    folder = disk / "default_small"
    newest = checkpoints(folder)[0]
    assert "No space left" in line and f"model_{read_checkpoint(newest).step + 1:06d}.pth" in line
    assert not list(folder.glob(".tmp-*"))
    step = read_checkpoint(newest).step
    for path in checkpoints(folder)[1:]:
        path.unlink()
    code, said = finished(start(small_sequence, disk, "--num_iters", step + 1, "--keep", 1))
    assert code == 0 and any(f"at step {step}" in line for line in said), said


def test_a_limit_on_the_size_of_files_is_a_clear_line(small_sequence, tmp_path):
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    line = one_line_and_exit_2(*finished(start(small_sequence, tmp_path, "--num_iters", 2, prepare=limit)))
    assert "File too large" in line and not list((tmp_path / "default_small").glob("*.pth"))


def test_a_read_only_output_is_a_clear_line(small_sequence, small_disk):
    disk = small_disk("size=1m,ro")
    line = one_line_and_exit_2(*finished(start(small_sequence, disk, "--num_iters", 2)))
    assert "Read-only file system" in line and str(disk) in line


def test_a_sequence_folder_that_disappears_is_one_error_line(published_sequence, tmp_path):
    """OmniMotion's layout is read during training: the run stops, and its checkpoints can be read."""
    process = start(published_sequence, tmp_path, "--num_iters", 100_000, "--i_weight", 2)
    folder = tmp_path / "default_published"
    wait_until(lambda: checkpoints(folder), process)
    published_sequence.rename(tmp_path / "elsewhere")
    line = one_line_and_exit_2(*finished(process))
    assert str(published_sequence) in line
    assert all(read_checkpoint(path).step >= 2 for path in checkpoints(folder))
