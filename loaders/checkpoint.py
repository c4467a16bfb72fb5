"""Checkpoint files: `SAVE_DIR/RUN/model_NNNNNN.pth`, written atomically, read without unpickling foreign code."""

import logging
import pickle
import re
import zipfile
from pathlib import Path

import torch

from errors import UserError
from loaders.files import atomic_path

log = logging.getLogger(__name__)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """File of the checkpoint after `step` steps."""
    return run_dir / f"model_{step:06d}.pth"


def save_checkpoint(path: Path, state: dict) -> None:
    """Write `state` (tensors and plain containers) to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        torch.save(state, temporary)
    log.info("saved %s", path)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU. UserError if the file is missing, truncated or not a plain checkpoint."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint {path}: train first, or give --ckpt_path") from error
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint: delete it, or give another --ckpt_path") from error


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The run's checkpoint with the most steps, None if there is none."""
    found = {int(match[1]): path for path in run_dir.glob("model_*.pth")
             if (match := re.fullmatch(r"model_(\d+)\.pth", path.name))}
    return found[max(found)] if found else None


def find_checkpoint(run_dir: Path, ckpt_path: str = "") -> Path:
    """`ckpt_path` if given, else the run's newest. UserError if there is none."""
    if ckpt_path:
        return Path(ckpt_path)
    path = newest_checkpoint(run_dir)
    if path is None:
        raise UserError(f"no checkpoint in {run_dir}: train with the same --config, --data_dir and --save_dir first")
    return path


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
