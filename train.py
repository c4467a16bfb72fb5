"""Optimize a small model on one video: python train.py --config configs/default.txt --data_dir seqs/clip

Results go to SAVE_DIR/EXPNAME_SEQUENCE/: checkpoints, args.txt, TensorBoard files, pictures. The same command resumes a
run that was stopped; Ctrl-C and SIGTERM save a checkpoint first.
"""

import common.interrupts  # first: Ctrl-C prints one line also while PyTorch is imported
import common.threads  # noqa: F401, before PyTorch: it loads OpenMP

# isort: split
from configs.options import parse

if __name__ == "__main__":
    parse("train")  # --help and mistakes end here, before PyTorch is imported, which takes seconds

# isort: split
import logging
import sys
from argparse import Namespace
from contextlib import closing, nullcontext

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from common.cli import run, start_logging
from common.locks import lock_folder
from common.signals import record_signals
from configs.options import run_dir
from training.distributed import Processes, join_processes, leave_processes
from training.failure_modes import diagnosis_due, failures_at
from training.memory import plan
from training.monitoring import Monitor
from training.run_metadata import write_run_metadata
from training.trainer import Trainer

log = logging.getLogger("train")


def train(options: Namespace, processes: Processes) -> None:
    """Run `num_iters` steps, or what is left of them. SystemExit 130 if a signal stopped the run."""
    lock = lock_folder(run_dir(options), make=True) if processes.first else nullcontext()
    with record_signals() as received, lock:
        trainer = Trainer(options, processes)
        if trainer.step < options.num_iters:
            log.info("estimated peak memory: %s", plan(trainer))
        elif trainer.step > options.num_iters:
            log.info("nothing to do: the run has %d steps, more than --num_iters %d", trainer.step, options.num_iters)
        if processes.first:
            write_run_metadata(trainer.dir, options, trainer.step)
        with closing(Monitor(trainer)) as monitor:
            take_steps(trainer, monitor, received)
        if trainer.step > trainer.saved_step:
            trainer.save()
    log.info("results are in %s", trainer.dir)
    if trainer.step < options.num_iters:
        log.info("stopped at step %d of %d; the same command resumes the run", trainer.step, options.num_iters)
        sys.exit(130)
    if processes.first:
        for line in failures_at(trainer.dir, trainer.step):
            log.warning("this run ended with a failure: %s", line)


def take_steps(trainer: Trainer, monitor: Monitor, received: list[int]) -> None:
    """Train until the last step, or until a signal is in `received`; save checkpoints on the way."""
    options = trainer.options
    while trainer.step < options.num_iters:
        stopping, overdue = trainer.any_process(bool(received), trainer.checkpoint_overdue())
        if stopping:
            break
        if overdue or (trainer.step % options.i_weight == 0 and trainer.step > trainer.saved_step):
            trainer.save()
        terms, error = trainer.train_step()
        monitor.show(terms, error)
        if diagnosis_due(trainer.step, options.num_iters):
            trainer.save()  # before the diagnosis, which could be killed, for example for its memory
            monitor.diagnose()


def main() -> None:
    start_logging()
    torch.set_flush_denormal(True)  # denormal numbers are common in vanishing filters and moments, and slow on a CPU
    options = parse("train")
    run_dir(options)  # refuses missing --data_dir before anything else is started
    processes = join_processes(options)
    if not processes.first:
        logging.getLogger().setLevel(logging.WARNING)
    with logging_redirect_tqdm():
        train(options, processes)
    leave_processes()


if __name__ == "__main__":
    run(main)
