"""Optimize a small model on one video: python train.py --config configs/default.txt --data_dir seqs/clip

The result is SAVE_DIR/EXPNAME_SEQUENCE/: checkpoints, args.txt, TensorBoard files, pictures. Started again, it goes on
where it stopped; Ctrl-C and SIGTERM save and stop.
"""

import logging
import signal
import sys
import time
from argparse import Namespace

import numpy as np
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
from training.run_metadata import write_record
from training.tensorboard import Board
from training.trainer import CHECK_EVERY, Trainer

log = logging.getLogger("train")


def train(options: Namespace, processes: Processes | None = None) -> None:
    """Run `num_iters` steps, or what is left of them. SystemExit 130 if a signal stopped it."""
    stop = stop_on_signal()
    trainer = Trainer(options, processes)
    if trainer.step < options.num_iters:
        log.info("memory at the peak: about %s", plan(trainer, int(options.max_memory * GIB)))
    board = begin(trainer)
    begun, saved = trainer.step, time.monotonic()
    with tqdm(total=options.num_iters, initial=trainer.step, desc=trainer.dir.name, unit="step", dynamic_ncols=True,
              disable=board is None) as bar:
        while trainer.step < options.num_iters:
            due = options.save_every_minutes and time.monotonic() - saved > 60 * options.save_every_minutes
            stopping, saving = agreed(trainer, bool(stop), bool(due))
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
    if board is not None:
        board.close()
    log.info("results are in %s", trainer.dir)
    if trainer.step < options.num_iters:
        log.info("stopped at step %d of %d; the same command goes on from here", trainer.step, options.num_iters)
        sys.exit(130)


def begin(trainer: Trainer) -> Board | None:
    """Write down what makes the run, and open its board; None in processes that write nothing."""
    if not trainer.processes.first:
        return None
    write_record(trainer.dir, trainer.options, trainer.step)
    return Board(trainer.dir, tensorboard=trainer.options.tensorboard, step=trainer.step)


def agreed(trainer: Trainer, *flags: bool) -> list[bool]:
    """The flags as all processes see them; several processes with GPUs ask each other now and then only."""
    processes = trainer.processes
    if processes.count > 1 and trainer.device.type == "cuda" and trainer.step % CHECK_EVERY:
        return [False] * len(flags)
    return processes.any(*flags)


def show(board: Board, bar: tqdm, trainer: Trainer, terms: dict[str, Tensor], error: Tensor) -> None:
    """What a step leaves on the bar, in the curves, and as pictures."""
    options, step = trainer.options, trainer.step
    if step % 10 == 0:
        bar.set_postfix(loss=f"{terms['total']:.3f}", flow_px=f"{error:.2f}", refresh=False)
    if step % options.i_print == 0:
        rates = {f"lr/{name}": group["lr"] for name, group in trainer.parameter_groups().items()}
        losses = {f"loss/{name}": float(value) for name, value in terms.items()}
        speed = bar.format_dict["rate"] or 0.0
        board.scalars({**losses, **rates, "flow_error_px": float(error), "steps_per_second": speed,
                       "gradient_norm": float(trainer.gradient_norm),
                       "samples_per_second": speed * trainer.samples_per_step}, step)
    if options.i_img and step % options.i_img == 0:
        draw(board, trainer)


def draw(board: Board, trainer: Trainer) -> None:
    """The pictures of the run so far: matches, flow, depth and colors of the first and the middle frame."""
    tracker = Tracker(trainer.model, chunk_size=trainer.options.chunk_size)
    ids = first, second = [0, len(trainer.sequence) // 2]
    points, interval = point_grid(tracker.size), dense.grid_interval(tracker)
    colors, depths = zip(*(dense.colors_and_depths(tracker, t, interval) for t in ids), strict=True)
    frames, errors = (a[ids].cpu().numpy() for a in (trainer.sampler.frames, trainer.error_map.mean()))
    board.pictures(trainer.step, ids, frames, points, tracker.correspond(points, first, second),
                   dense.coarse_flow(tracker, first, second, interval), np.stack(depths), np.stack(colors), errors)
    board.weights({name: value.detach().cpu().numpy() for name, value in trainer.model.named_parameters()
                   if value.ndim >= 2}, trainer.step)


def stop_on_signal() -> list:
    """A list that a Ctrl-C or SIGTERM makes non-empty: the loop stops between two steps, never inside one."""
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))
    return received


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse("train")
    limit_pixels(options.max_pixels)
    run_dir(options)  # is there anything to train on?
    with logging_redirect_tqdm():
        train(options, join_processes(options))
    leave_processes()


if __name__ == "__main__":
    run(main)
