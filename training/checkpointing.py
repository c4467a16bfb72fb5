"""Checkpoints of a trainer: save its state, find the checkpoint to start from, resume from it, remove old files.

loaders/checkpoint.py owns the file format.
"""

import logging
import os
from dataclasses import asdict
from pathlib import Path

import torch

from common.errors import UserError
from loaders.checkpoint import (
    Checkpoint,
    check_frames,
    check_length,
    checkpoint_path,
    checkpoints,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from models.factory import checkpoint_num_frames, config_from_options
from models.omnimotion import ModelConfig
from training.optimizers import fits

log = logging.getLogger("train")


def find_start(trainer) -> tuple[Path | None, Checkpoint | None, bool]:
    """Path and content of the checkpoint that a run starts from, and whether the run is resumed from it (the newest of
    its folder) or takes only its model (`--ckpt_path`); (None, None, False) for a new model.

    UserError if the checkpoint does not fit the sequence or the options."""
    options = trainer.options
    if not options.reload and trainer.processes.first:
        move_aside(trainer.dir)
    trainer.processes.wait()
    found = newest_checkpoint(trainer.dir)
    if found is None and not options.ckpt_path:
        return None, None, False
    if found and options.ckpt_path:
        log.warning("--ckpt_path is not used, because %s exists; --no_reload starts a new run", found[0])
    path, checkpoint = found or (Path(options.ckpt_path), read_checkpoint(Path(options.ckpt_path)))
    check_length(checkpoint_num_frames(checkpoint, path), len(trainer.sequence), path)
    if found:
        check_frames(checkpoint, trainer.sequence.size, trainer.hashes, path)
        _check_config(trainer, checkpoint, path)
    return path, checkpoint, found is not None


def _check_config(trainer, checkpoint: Checkpoint, path: Path) -> None:
    """UserError if the options describe a model that differs from the checkpoint's."""
    saved = ModelConfig(**checkpoint.config)  # settings that an older format lacks have their defaults
    wanted = asdict(config_from_options(trainer.options, saved.num_frames, trainer.sequence.size, saved.grid_layers))
    settings = asdict(saved)
    settings = {"deform": settings["deform"], **settings}  # first: it decides what others may be
    for name, value in settings.items():
        if value != wanted[name] and not (name == "coordinates" and list(value) == list(wanted[name])):
            raise UserError(f"{path} was trained with {name} {value}, now it is {wanted[name]}: give the same, another "
                            "--expname, or --no_reload to start again")


def save(trainer) -> None:
    """Write a checkpoint with everything that the next step depends on, and remove old ones.

    All processes call this, the first one writes. UserError if it cannot be written."""
    trainer.hard_mining.sum_over_processes()
    if trainer.processes.first:
        write_checkpoint(checkpoint_path(trainer.dir, trainer.step), checkpoint_of(trainer))
        drop_old_checkpoints(trainer.dir, trainer.options.keep)
    trainer.processes.wait()


def checkpoint_of(trainer) -> Checkpoint:
    """The state of a trainer."""
    on_gpu = trainer.device.type == "cuda"
    return Checkpoint(
        config=asdict(trainer.model.config),
        model=trainer.model.state_dict(),
        step=trainer.step,
        optimizers={name: optimizer.state_dict() for name, optimizer in trainer.optimizers.items()},
        skipped_in_a_row=trainer.guard.report(),
        error_map=trainer.error_map.state_dict(),
        sampler=trainer.sampler.state_dict(),
        generators={name: generator.get_state() for name, generator in trainer.generators.items()},
        rng={"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if on_gpu else None},
        device=trainer.device.type,
        frames={"size": trainer.sequence.size, "hashes": trainer.hashes},
        options={name: value for name, value in vars(trainer.options).items() if isinstance(value, str | int | float)})


def resume(trainer, checkpoint: Checkpoint, path: Path) -> None:
    """Load everything but the model from a checkpoint of this run. UserError if it does not fit the options."""
    trainer.step = checkpoint.step
    _resume_optimizers(trainer, checkpoint, path)
    if checkpoint.error_map["sums"].shape != trainer.error_map.sums.shape:
        raise UserError(f"{path} was made with another --error_map_cell: give the same, or --no_reload")
    trainer.error_map.load_state_dict(checkpoint.error_map)
    trainer.sampler.load_state_dict(checkpoint.sampler)
    trainer.guard.resume(checkpoint.skipped_in_a_row)
    trainer.generators["sampler"].set_state(checkpoint.generators["sampler"])
    if (checkpoint.device or trainer.device.type) != trainer.device.type:
        log.warning("%s was made on %s: the pixels and depths drawn from here on differ from those of an uninterrupted "
                    "run", path, checkpoint.device)
        trainer.generators["jitter"].manual_seed(trainer.options.seed + 1 + trainer.step)
        return
    trainer.generators["jitter"].set_state(checkpoint.generators["jitter"])
    if checkpoint.rng is not None:
        torch.set_rng_state(checkpoint.rng["cpu"])
        if trainer.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint.rng["cuda"])


def _resume_optimizers(trainer, checkpoint: Checkpoint, path: Path) -> None:
    saved = checkpoint.optimizers
    if saved.keys() != trainer.optimizers.keys():
        raise UserError(f"{path} was made with another --optimizer ({' and '.join(saved)}): give the same, or "
                        "--no_reload to start again")
    for name, optimizer in trainer.optimizers.items():
        if not fits(saved[name], optimizer):
            raise UserError(
                f"{path} was made with --mlp_backend {checkpoint.options.get('mlp_backend')}, whose optimizer state "
                f"--mlp_backend {trainer.options.mlp_backend} cannot take over: give the same, or start a new run "
                "from its model with --ckpt_path and another --expname")
        optimizer.load_state_dict(saved[name])


def drop_old_checkpoints(run_dir: Path, keep: int) -> None:
    """Remove all but the `keep` checkpoints with the most steps; 0 keeps all."""
    for path in checkpoints(run_dir)[keep:] if keep else []:
        path.unlink(missing_ok=True)


def move_aside(run_dir: Path) -> None:
    """Move the checkpoints of an earlier run to `run_dir`/earlier_N, so that a new run neither resumes from them nor
    counts them among its own."""
    found = checkpoints(run_dir)
    if not found:
        return
    number = 1
    while (folder := run_dir / f"earlier_{number}").exists():
        number += 1
    folder.mkdir()
    for path in found:
        os.replace(path, folder / path.name)
    log.info("the checkpoints of the earlier run were moved to %s", folder)
