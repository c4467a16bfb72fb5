"""Checkpoint files: `SAVE_DIR/RUN/model_NNNNNN.pth`, written atomically, read without unpickling foreign code.

A checkpoint is the zip file that torch.save writes; its archive comment is the SHA-256 of all bytes before the
comment. PyTorch does not check sums itself when it reads, and one file can be neither newer nor older than its sum.
"""

import hashlib
import logging
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import torch

from common.errors import UserError
from common.files import atomic_path

log = logging.getLogger(__name__)
FORMAT = 2  # of what Trainer.save writes; from 2 on a checkpoint has a sum
COMMENT = re.compile(rb"sha256=([0-9a-f]{64})\Z")
COMMENT_BYTES = 71


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """File of the checkpoint after `step` steps."""
    return run_dir / f"model_{step:06d}.pth"


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, the one with the most steps first; times of files do not count, clocks change."""
    found = {int(match[1]): path for path in run_dir.glob("model_*.pth")
             if (match := re.fullmatch(r"model_(\d+)\.pth", path.name))}
    return [found[step] for step in sorted(found, reverse=True)]


def save_checkpoint(path: Path, state: dict) -> None:
    """Write `state` (tensors and plain containers) with `format` and its sum to `path`, whole or not at all, and onto
    the disk before anything older may go. UserError if it cannot be written."""
    failures: list[OSError] = []
    try:
        with atomic_path(path) as temporary, open(temporary, "w+b") as file:
            torch.save({"format": FORMAT, **state}, _Sink(file, failures))
            _append_sum(file)
            os.fsync(file.fileno())
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        failures += [error] if isinstance(error, OSError) else []
        if not failures:
            raise
        raise UserError(f"{path} cannot be written ({failures[0].strerror}): what was saved before is as it was; make "
                        "room or give another --save_dir, and run the same command again") from error
    log.info("saved %s", path)


class _Sink:
    """A file for torch.save, which turns what went wrong with it into a RuntimeError about positions."""

    def __init__(self, file, failures: list[OSError]):
        self.file, self.failures = file, failures

    def write(self, data) -> int:
        return self._try(self.file.write, data)

    def flush(self) -> None:
        self._try(self.file.flush)

    def _try(self, action, *arguments):
        try:
            return action(*arguments)
        except OSError as error:
            self.failures.append(error)
            raise


def _append_sum(file) -> None:
    """Give a zip file that was just written an archive comment: the sum of all before it."""
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", COMMENT_BYTES))  # length of the comment, the last field of the archive
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.write(b"sha256=" + digest.encode())
    file.flush()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sum_fits(path: Path) -> bool | None:
    """Whether the file's bytes have the sum that its comment says; None if it has no such comment."""
    with open(path, "rb") as file:
        size = os.path.getsize(path)
        file.seek(max(size - COMMENT_BYTES, 0))
        match = COMMENT.match(file.read())
        if not match:
            return None
        file.seek(0)
        digest, left = hashlib.sha256(), size - COMMENT_BYTES
        while left and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest().encode() == match[1]


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU. UserError if the file is missing, damaged or not a plain checkpoint. OmniMotion's
    and those of format 1 have no sum and pass without."""
    damaged = f"{path} cannot be read as a checkpoint, it is damaged: delete it, or give another --ckpt_path"
    try:
        sound = _sum_fits(path)
        if sound is False:
            raise UserError(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint {path}: train first, or give --ckpt_path") from error
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, LookupError, ValueError,
            TypeError, AttributeError, AssertionError, OverflowError) as error:
        raise UserError(damaged) from error
    if sound is None and isinstance(state, dict) and state.get("format") == FORMAT:
        raise UserError(damaged)  # it had a sum
    return state


def newest_checkpoint(run_dir: Path) -> tuple[Path, dict] | None:
    """The run's newest checkpoint that is sound, and its content; None if the run has none at all. Damaged ones are
    named and passed over. UserError if all are damaged."""
    found = checkpoints(run_dir)
    for path in found:
        try:
            return path, load_checkpoint(path)
        except UserError as error:
            log.warning("%s; looking for an older one", str(error).split(": ")[0])
    if found:
        raise UserError(f"all {len(found)} checkpoints in {run_dir} are damaged: copy them from elsewhere, or start "
                        "again with --no_reload")
    return None


def find_checkpoint(run_dir: Path, ckpt_path: str = "") -> tuple[Path, dict]:
    """`ckpt_path` if given, else the run's newest that is sound, and its content. UserError if there is none."""
    if ckpt_path:
        return Path(ckpt_path), load_checkpoint(Path(ckpt_path))
    found = newest_checkpoint(run_dir)
    if found is None:
        raise UserError(f"no checkpoint in {run_dir}: train with the same --config, --data_dir and --save_dir first")
    return found


def drop_old_checkpoints(run_dir: Path, keep: int) -> None:
    """Remove all but the `keep` checkpoints with the most steps; 0 keeps all."""
    for path in checkpoints(run_dir)[keep:] if keep else []:
        path.unlink(missing_ok=True)


def set_aside(run_dir: Path) -> None:
    """Move the checkpoints of an earlier run to `run_dir`/earlier_N: a new run must neither go on from them nor count
    them among its own."""
    found = checkpoints(run_dir)
    if not found:
        return
    number = 1
    while (folder := run_dir / f"earlier_{number}").exists():
        number += 1
    folder.mkdir()
    for path in found:
        os.replace(path, folder / path.name)
    log.info("the checkpoints of the run before are in %s now", folder)


def check_length(checkpoint_frames: int, num_frames: int, path: Path) -> None:
    """UserError unless the checkpoint was trained on as many frames as the sequence has."""
    if checkpoint_frames != num_frames:
        raise UserError(f"{path} was trained on {checkpoint_frames} frames, the sequence has {num_frames}: "
                        "give the sequence it was trained on, or the same --num_imgs")


def check_frames(checkpoint: dict, size: tuple[int, int], hashes: list[str], path: Path) -> None:
    """UserError unless the checkpoint was trained on frames of `size` (H, W) with these contents. OmniMotion's
    checkpoints do not say what they were trained on and pass."""
    frames = checkpoint.get("frames")
    if frames is None:
        return
    again = "give its own --data_dir, another --expname, or train again with --no_reload"
    if tuple(frames["size"]) != tuple(size):
        raise UserError(f"{path} was trained on frames of {frames['size'][1]}x{frames['size'][0]}, these are "
                        f"{size[1]}x{size[0]}: {again}")
    changed = sum(a != b for a, b in zip(frames["hashes"], hashes, strict=False))
    if changed:
        raise UserError(f"{path} was trained on other frames ({changed} of {len(hashes)} differ): {again}")
