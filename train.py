"""Optimize a small model on one video: python train.py --config configs/default.txt --data_dir seqs/clip

Results go to SAVE_DIR/EXPNAME_SEQUENCE/: checkpoints, args.txt, TensorBoard files, pictures. The same command resumes a
run that was stopped; Ctrl-C and SIGTERM save a checkpoint first.
"""

import logging
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.cli import run
from configs.options import parse, run_dir
from drawing.tracks import point_grid
from inference import dense
from inference.tracker import Tracker
from loaders.images import limit_pixels
from training.distributed import Processes, join_processes, leave_processes
from training.failure_modes import watch
from training.memory import GIB, plan
from training.optimizers import parameter_groups
from training.run_metadata import write_run_metadata
from training.tensorboard import Board
from training.trainer import CHECK_EVERY, Trainer

log = logging.getLogger("train")


def train(options: Namespace, processes: Processes | None = None) -> None:
    """Run `num_iters` steps, or what is left of them. SystemExit 130 if a signal stopped the run."""
    with stop_on_signal() as received:
        trainer = Trainer(options, processes)
        if trainer.step < options.num_iters:
            log.info("estimated peak memory: %s", plan(trainer, int(options.max_memory * GIB)))
        board = open_board(trainer)
        take_steps(trainer, board, received)
    if board is not None:
        board.close()
    log.info("results are in %s", trainer.dir)
    if trainer.step < options.num_iters:
        log.info("stopped at step %d of %d; the same command resumes the run", trainer.step, options.num_iters)
        sys.exit(130)


def take_steps(trainer: Trainer, board: Board | None, received: list[int]) -> None:
    """Train until the last step or a signal; checkpoints, curves and pictures on the way."""
    options = trainer.options
    begun = trainer.step
    saved = time.monotonic()
    with tqdm(total=options.num_iters, initial=trainer.step, desc=trainer.dir.name, unit="step", dynamic_ncols=True,
              disable=board is None) as bar:
        while trainer.step < options.num_iters:
            due = options.save_every_minutes and time.monotonic() - saved > 60 * options.save_every_minutes
            stopping, saving = agree_on(trainer, bool(received), bool(due))
            if stopping:
                break
            if saving or (trainer.step % options.i_weight == 0 and trainer.step > begun):
                trainer.save()
                saved = time.monotonic()
            terms, error = trainer.train_step()
            bar.update()
            if board is not None:
                show(board, bar, trainer, terms, error)
                watch(trainer)
    if trainer.step > begun:
        trainer.save()


def open_board(trainer: Trainer) -> Board | None:
    """Write run metadata and open the TensorBoard writer; None in processes other than the first."""
    if not trainer.processes.first:
        return None
    write_run_metadata(trainer.dir, trainer.options, trainer.step)
    return Board(trainer.dir, tensorboard=trainer.options.tensorboard, step=trainer.step)


def agree_on(trainer: Trainer, *flags: bool) -> list[bool]:
    """Whether any process has each flag set. On several GPUs processes ask each other every CHECK_EVERY steps only."""
    processes = trainer.processes
    if processes.count > 1 and trainer.device.type == "cuda" and trainer.step % CHECK_EVERY:
        return [False] * len(flags)
    return processes.any(*flags)


def show(board: Board, bar: tqdm, trainer: Trainer, terms: dict[str, Tensor], error: Tensor) -> None:
    """Show a step on the progress bar, in TensorBoard's curves, and every `i_img` steps as pictures."""
    options = trainer.options
    step = trainer.step
    if step % 10 == 0:
        bar.set_postfix(loss=f"{terms['total']:.3f}", flow_px=f"{error:.2f}", refresh=False)
    if step % options.i_print == 0:
        rates = {f"lr/{name}": group["lr"] for name, group in parameter_groups(trainer.optimizers).items()}
        losses = {f"loss/{name}": float(value) for name, value in terms.items()}
        speed = bar.format_dict["rate"] or 0.0
        board.scalars({**losses, **rates, "flow_error_px": float(error), "steps_per_second": speed,
                       "gradient_norm": float(trainer.gradient_norm),
                       "samples_per_second": speed * trainer.samples_per_step}, step)
    if options.i_img and step % options.i_img == 0:
        draw(board, trainer)


def draw(board: Board, trainer: Trainer) -> None:
    """Pictures of the model as it is: matches, flow, depth and colors of the first and the middle frame."""
    tracker = Tracker(trainer.model, chunk_size=trainer.options.chunk_size)
    first, second = ids = [0, len(trainer.sequence) // 2]
    interval = dense.grid_interval(tracker)
    points = point_grid(tracker.size)
    colors, depths = zip(*(dense.colors_and_depths(tracker, t, interval) for t in ids), strict=True)
    frames = trainer.sampler.frames[ids].cpu().numpy()
    errors = trainer.error_map.mean()[ids].cpu().numpy()
    board.pictures(trainer.step, ids, frames, points, tracker.correspond(points, first, second),
                   dense.coarse_flow(tracker, first, second, interval), np.stack(depths), np.stack(colors), errors)
    board.weights({name: value.detach().cpu().numpy() for name, value in trainer.model.named_parameters()
                   if value.ndim >= 2}, trainer.step)


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """A list that receives SIGINT and SIGTERM, so that the loop stops between two steps; afterwards the former handlers
    are active again."""
    received: list[int] = []
    former = {number: signal.signal(number, lambda number, frame: received.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_flush_denormal(True)  # denormal numbers are common in vanishing filters and moments, and slow on a CPU
    options = parse("train")
    limit_pixels(options.max_pixels)
    run_dir(options)  # refuses missing --data_dir before anything else is started
    with logging_redirect_tqdm():
        train(options, join_processes(options))
    leave_processes()


if __name__ == "__main__":
    run(main)
