"""Optimise a small model on one video: python train.py --config configs/default.txt --data_dir seqs/clip

The result is SAVE_DIR/EXPNAME_SEQUENCE/: checkpoints, args.txt, TensorBoard files, pictures. Started again, it goes on
where it stopped; Ctrl-C and SIGTERM save and stop.
"""

import logging
import signal
import sys
from argparse import Namespace

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from configs.options import parse, run
from drawing.board import Board
from drawing.tracks import point_grid
from loaders.files import write_text
from models import surface
from models.tracker import Tracker
from trainer import Trainer

log = logging.getLogger("train")


def train(options: Namespace) -> None:
    """Run `num_iters` steps, or what is left of them. SystemExit 130 if a signal stopped it."""
    trainer = Trainer(options)
    trainer.dir.mkdir(parents=True, exist_ok=True)
    write_text(trainer.dir / "args.txt", "".join(f"{k} = {v}\n" for k, v in sorted(vars(options).items()) if v != ""))
    board = Board(trainer.dir, tensorboard=not options.no_tensorboard, step=trainer.step)
    stop = stop_on_signal()

    bar = tqdm(total=options.num_iters, initial=trainer.step, desc=trainer.dir.name, unit="step", dynamic_ncols=True)
    while trainer.step < options.num_iters and not stop:
        terms, error = trainer.train_step()
        bar.update()
        if trainer.step % 10 == 0:
            bar.set_postfix(loss=f"{terms['total']:.3f}", flow_px=f"{error:.2f}", refresh=False)
        if trainer.step % options.i_print == 0:
            rates = {f"lr/{name}": group["lr"] for name, group in trainer.parameter_groups().items()}
            losses = {f"loss/{name}": float(value) for name, value in terms.items()}
            speed = bar.format_dict["rate"] or 0.0
            board.scalars({**losses, **rates, "flow_error_px": float(error), "steps_per_second": speed,
                           "samples_per_second": speed * trainer.samples_per_step}, trainer.step)
        if options.i_img and trainer.step % options.i_img == 0:
            draw(board, trainer)
        if trainer.step % options.i_weight == 0 and trainer.step < options.num_iters:
            trainer.save()
    bar.close()
    if trainer.step > bar.initial:
        trainer.save()
    board.close()
    log.info("results are in %s", trainer.dir)
    if trainer.step < options.num_iters:
        log.info("stopped at step %d of %d; the same command goes on from here", trainer.step, options.num_iters)
        sys.exit(130)


def draw(board: Board, trainer: Trainer) -> None:
    """The pictures of the run so far: matches, flow, depth and colours of the first and the middle frame."""
    tracker = Tracker(trainer.model, chunk_size=trainer.options.chunk_size)
    ids = first, second = [0, len(trainer.sequence) // 2]
    points, interval = point_grid(tracker.size), surface.grid_interval(tracker)
    colours, depths = zip(*(surface.colours_and_depths(tracker, t, interval) for t in ids), strict=True)
    frames, errors = (a[ids].cpu().numpy() for a in (trainer.sampler.frames, trainer.error_map.mean()))
    board.pictures(trainer.step, ids, frames, points, tracker.correspond(points, first, second),
                   surface.coarse_flow(tracker, first, second, interval), np.stack(depths), np.stack(colours), errors)
    board.weights({name: value.detach().cpu().numpy() for name, value in trainer.model.named_parameters()
                   if value.ndim == 2}, trainer.step)


def stop_on_signal() -> list:
    """A list that a Ctrl-C or SIGTERM makes non-empty: the loop stops between two steps, never inside one."""
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))
    return received


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with logging_redirect_tqdm():
        train(parse("train"))


if __name__ == "__main__":
    run(main)
