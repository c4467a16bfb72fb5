"""Checkpoint files: `SAVE_DIR/RUN/model_NNNNNN.pth`. This module owns their format; nothing else reads or writes them.

A checkpoint is the zip file that torch.save writes. Its archive comment is the SHA-256 of all bytes before the comment:
PyTorch does not verify checksums when it reads. Files are written to a temporary name and renamed, and read with
`weights_only=True`.

Formats
    1   no checksum, no "faults"
    2   "faults" holds a second copy of the model and of the optimizers' state
    3   everything once (this version)
    OmniMotion's own format has the three networks and `num_imgs`; models/omnimotion_checkpoint.py converts it
"""

import hashlib
import io
import logging
import os
import pickle
import re
import struct
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import flush_to_disk, write_bytes

log = logging.getLogger(__name__)
FORMAT = 3
COMMENT = re.compile(rb"sha256=([0-9a-f]{64})\Z")
COMMENT_BYTES = 71
OMNIMOTION_KEYS = {"feature_mlp", "deform_mlp", "color_mlp", "num_imgs"}


@dataclass
class Checkpoint:
    """The content of a checkpoint. Everything after `model` is what a resumed run needs besides the model."""
    config: dict[str, Any]                       # asdict(models.omnimotion.ModelConfig); {} in OmniMotion's format
    model: dict[str, Any]                        # state dict; in OmniMotion's format the whole file
    step: int = 0                                # steps taken
    optimizers: dict[str, dict] = field(default_factory=dict)   # state dicts by name: adam, muon
    skipped_in_a_row: int = 0                    # steps skipped up to here because they were not finite
    error_map: dict[str, Tensor] | None = None
    sampler: dict[str, Any] = field(default_factory=dict)
    generators: dict[str, Tensor] = field(default_factory=dict)  # states: sampler, jitter
    rng: dict[str, Tensor | None] | None = None  # PyTorch's global generators: cpu, cuda
    device: str | None = None                    # type of the device that it was trained on
    frames: dict[str, Any] | None = None         # size (H, W) and hashes of the frames; None: not known
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def omnimotion(self) -> bool:
        """Whether the file is in OmniMotion's own format."""
        return not self.config


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """File of the checkpoint after `step` steps."""
    return run_dir / f"model_{step:06d}.pth"


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, the one with the most steps first; times of files do not count, clocks change."""
    found = {int(match[1]): path for path in run_dir.glob("model_*.pth")
             if (match := re.fullmatch(r"model_(\d+)\.pth", path.name))}
    return [found[step] for step in sorted(found, reverse=True)]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint with its checksum to `path`, completely or not at all, and flush it to the disk.

    UserError if it cannot be written."""
    content = {"format": FORMAT} | {f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}
    encoded = io.BytesIO()  # writing to a file, torch.save replaces a full disk's OSError by a RuntimeError
    torch.save(content, encoded)
    encoded.seek(-2, os.SEEK_END)
    encoded.write(struct.pack("<H", COMMENT_BYTES))  # length of the comment, the last field of the archive
    encoded.write(b"sha256=" + hashlib.sha256(encoded.getbuffer()).hexdigest().encode())
    try:
        write_bytes(path, encoded.getbuffer())
        flush_to_disk(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): earlier checkpoints are intact; free some space "
                        "or give another --save_dir, and run the same command again") from error
    log.info("saved %s", path)


def _checksum_is_right(path: Path) -> bool | None:
    """Whether the file's bytes have the checksum in its comment; None if it has no such comment."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = max(os.path.getsize(path) - COMMENT_BYTES, 0)
        while left and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
        match = COMMENT.match(file.read(COMMENT_BYTES))
    return digest.hexdigest().encode() == match[1] if match else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of any format onto the CPU. UserError if the file is missing, damaged or no checkpoint."""
    damaged = f"{path} cannot be read as a checkpoint, it is damaged: delete it, or give another --ckpt_path"
    try:
        right = _checksum_is_right(path)
        if right is False:
            raise UserError(damaged)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint {path}: train first, or give --ckpt_path") from error
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, LookupError, ValueError,
            TypeError, AttributeError, AssertionError, OverflowError) as error:
        raise UserError(damaged) from error
    keys = content.keys() if isinstance(content, dict) else set()
    if right is None and "format" in keys and content["format"] != 1:  # formats from 2 on have a checksum
        raise UserError(damaged)
    if {"config", "model"} <= keys:
        return Checkpoint(**{f.name: content[f.name] for f in fields(Checkpoint) if f.name in keys})
    if OMNIMOTION_KEYS <= keys:
        return Checkpoint(config={}, model=content)
    raise UserError(f"{path} is not a checkpoint of this project or of OmniMotion: give another --ckpt_path")


def newest_checkpoint(run_dir: Path) -> tuple[Path, Checkpoint] | None:
    """Path and content of the run's newest checkpoint that is not damaged; None if the run has none at all.

    Damaged ones are reported and skipped. UserError if all are damaged."""
    found = checkpoints(run_dir)
    for path in found:
        try:
            return path, read_checkpoint(path)
        except UserError as error:
            log.warning("%s; looking for an older one", str(error).split(": ")[0])
    if found:
        raise UserError(f"all {len(found)} checkpoints in {run_dir} are damaged: copy them from elsewhere, or start "
                        "again with --no_reload")
    return None


def find_checkpoint(run_dir: Path, ckpt_path: str = "") -> tuple[Path, Checkpoint]:
    """Path and content of `ckpt_path` if given, else of the run's newest one that is not damaged. UserError if there is
    none."""
    if ckpt_path:
        return Path(ckpt_path), read_checkpoint(Path(ckpt_path))
    found = newest_checkpoint(run_dir)
    if found is None:
        raise UserError(f"no checkpoint in {run_dir}: train first, or give the run's own --config or --expname, "
                        "--data_dir and --save_dir")
    return found


def check_length(checkpoint_frames: int, num_frames: int, path: Path) -> None:
    """UserError unless the checkpoint was trained on as many frames as the sequence has."""
    if checkpoint_frames != num_frames:
        raise UserError(f"{path} was trained on {checkpoint_frames} frames, the sequence has {num_frames}: "
                        "give the sequence it was trained on, or the same --num_imgs")


def check_frames(checkpoint: Checkpoint, size: tuple[int, int], hashes: list[str], path: Path) -> None:
    """UserError unless the checkpoint was trained on frames of `size` (H, W) with these hashes.

    OmniMotion's format does not say what a model was trained on: such checkpoints pass."""
    frames = checkpoint.frames
    if frames is None:
        return
    again = "give its own --data_dir, another --expname, or train again with --no_reload"
    if tuple(frames["size"]) != tuple(size):
        raise UserError(f"{path} was trained on frames of {frames['size'][1]}x{frames['size'][0]}, these are "
                        f"{size[1]}x{size[0]}: {again}")
    if list(frames["hashes"]) != list(hashes) and sorted(frames["hashes"]) == sorted(hashes):
        raise UserError(f"{path} was trained on these frames in another order (before, file names were sorted as "
                        f"text: 1, 10, 2; now as numbers: 1, 2, 10): {again}")
    changed = sum(a != b for a, b in zip(frames["hashes"], hashes, strict=False))
    if changed:
        raise UserError(f"{path} was trained on other frames ({changed} of {len(hashes)} differ): {again}")
