"""Run the videos of a benchmark, one after the other on this machine or in parallel on Ray, with the same output."""

import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from multiprocessing.connection import wait
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.errors import UserError, os_error_line
from evaluation.video_job import Job, record_failure, run_video, running_file
from inference.processes import exit_name

log = logging.getLogger("eval")
CONNECT_SECONDS = 10  # timeout for a connection to a Ray cluster
RETRIES = 3  # number of restarts of a video whose Ray worker was lost
NO_CLUSTER = "no Ray cluster at {} ({}): start one with `ray start --head`, or give --ray without an address"
ROOT = Path(__file__).resolve().parents[1]


def run_here(jobs: Sequence[Job], finished: Callable[[Job], None]) -> None:
    """Run each video in its own process, so that a crash affects no other video and memory is freed.

    SystemExit 130 after a Ctrl-C or SIGTERM: the video under way has saved its state."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evaluation.video_job"])  # import PyTorch once, not for every video
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        for i, job in enumerate(jobs, 1):
            log.info("[%d/%d] %s", i, len(jobs), job.name)
            process = context.Process(target=_in_process, args=(job,))
            process.start()
            _join(process)
            if process.exitcode == 130:
                raise KeyboardInterrupt
            if process.exitcode:
                _record_crash(job, f"its process ended with {exit_name(process.exitcode)}")
            finished(job)
    except KeyboardInterrupt:
        log.info("stopped: the same command continues")
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def run_on_ray(jobs: Sequence[Job], finished: Callable[[Job], None], address: str, num_cpus: float,
               num_gpus: float) -> None:
    """Run each video as a Ray task, on this machine (`address` 'local') or a cluster with a shared file system.

    The output of a video goes to RESULTS/NAME.log. A video whose worker is lost is restarted, up to RETRIES times; it
    resumes from its last checkpoint. UserError without Ray or without the cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray needs Ray: pip install -r requirements-ray.txt, or leave --ray out") from error
    if num_gpus < 0:
        num_gpus = 1 if jobs[0].options.device != "cpu" and torch.cuda.is_available() else 0
    _check_reachable(address)
    local = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR,
                 runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, **local)
    except Exception as error:  # Ray also raises plain exceptions, for example if starting takes too long
        why = " ".join(str(error).split())[:200]
        if address == "local":
            raise UserError(f"Ray does not start on this machine ({why}): try again, or leave --ray out") from error
        raise UserError(NO_CLUSTER.format(address, why)) from error
    # max_calls: a new process for each video
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=RETRIES, max_calls=1)(_on_ray)
    try:
        pending = {task.remote(job): job for job in jobs}
        with tqdm(total=len(jobs), desc="videos") as bar, logging_redirect_tqdm():
            while pending:
                ready, _ = ray.wait(list(pending), num_returns=1, timeout=1)
                bar.set_postfix_str(_under_way(pending.values()))
                for reference in ready:
                    job = pending.pop(reference)
                    try:
                        ray.get(reference)
                    except ray.exceptions.RayError as error:
                        _record_crash(job, f"its Ray worker was lost: {str(error).splitlines()[0]}")
                    bar.update()
                    finished(job)
    except KeyboardInterrupt:
        log.info("stopped: the same command continues")
        sys.exit(130)
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """UserError if `address` is HOST:PORT and nothing listens there. Ray itself would retry for many minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():  # local, auto, ray://
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(NO_CLUSTER.format(address, error)) from error


def _in_process(job: Job) -> None:
    """Run a video in this child process. SIGTERM acts like Ctrl-C; it is also sent when the parent has ended."""
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with logging_redirect_tqdm():
            run_video(job)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # the failure file could not be written, for example on a full disk
        if error.errno is None:
            raise
        log.error("%s: %s", job.name, os_error_line(error))
        sys.exit(2)


def _on_ray(job: Job) -> None:
    with open(job.results / f"{job.name}.log", "a", buffering=1) as file, redirect_stderr(file):
        handler = logging.StreamHandler(file)
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)
        run_video(job)


def _stop_with_parent() -> None:
    """Wait until the parent process has ended, then send SIGTERM to this one."""
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _join(process: multiprocessing.Process) -> None:
    """Wait for the process. Ctrl-C or SIGTERM is passed on to it, and this waits until it has saved its state."""
    try:
        process.join()
    except KeyboardInterrupt:
        process.terminate()
        try:
            process.join()
        except KeyboardInterrupt:  # a second signal: do not wait for the checkpoint
            process.kill()
        raise


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _record_crash(job: Job, why: str) -> None:
    for tracker in job.trackers:
        if not job.result(tracker).is_file() and not job.failure(tracker).is_file():
            record_failure(job, tracker, f"{why}; the same command tries again")
    running_file(job).unlink(missing_ok=True)


def _under_way(jobs: Sequence[Job]) -> str:
    """The running videos and their stages, for example 'bear train, camel preprocess'."""
    states = []
    for job in jobs:
        try:
            states.append(f"{job.name} {json.loads(running_file(job).read_text())['stage']}")
        except (FileNotFoundError, json.JSONDecodeError):
            continue
    return ", ".join(states[:8])
