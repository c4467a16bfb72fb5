"""Run the project's commands as processes: training, and what makes a sequence folder."""

import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from common.errors import UserError
from common.files import write_text
from common.signals import record_signals
from configs.config_file import as_config
from configs.options import run_dir
from loaders.checkpoint import checkpoint_path

ROOT = Path(__file__).resolve().parents[1]
STOPPED = 130  # exit code of a command that a signal stopped
ERROR_CHARACTERS = 4_000  # length of the end of stderr that is kept for error messages


def train(options: Namespace, num_threads: int | None = None, show: Callable[[str], object] | None = None) -> None:
    """Start or resume training with train.py; does nothing if the checkpoint of the last step exists.

    num_threads: threads of PyTorch. show, errors: as of `run_command`; training saves its state before it is stopped"""
    folder = run_dir(options)
    if checkpoint_path(folder, options.num_iters).is_file():
        return
    write_text(folder / "args.txt", as_config(options))
    run_command([str(ROOT / "train.py"), "--config", str(folder / "args.txt")], num_threads, show)


def run_command(arguments: list[str], num_threads: int | None = None,
                show: Callable[[str], object] | None = None) -> None:
    """Run `python ARGUMENTS` to its end, where `-m` finds the project's packages. SIGINT and SIGTERM are passed on.

    num_threads: threads of PyTorch; None: as in this process's environment
    show: is called with what the process writes to stderr, piece by piece: bars, warnings, and the error that ended it;
          None: it goes to this process's stderr, with all messages
    SystemExit 130 if a signal stopped it. UserError for a user's mistake, or if it was killed; RuntimeError if it fails
    otherwise."""
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}  # not the current folder
    if show is not None:
        environment["LOG_LEVEL"] = "WARNING"
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, env=environment)
    with record_signals(process.terminate) as received:
        errors = _read_stderr(process, show or _write_stderr)
        code = process.wait()
    if code == STOPPED or (received and code):
        sys.exit(STOPPED)
    if code == 2:
        raise UserError(errors.strip().splitlines()[-1].removeprefix("error: "))
    name = Path(arguments[1 if arguments[0] == "-m" else 0]).name
    if code == -signal.SIGKILL:
        raise UserError(f"{name} was killed (signal SIGKILL), perhaps because memory was short: free memory, then run "
                        "the same command, which continues")
    if code:
        raise RuntimeError(f"{name} ended with {exit_name(code)}: {errors}")


def _read_stderr(process: subprocess.Popen, show: Callable[[str], object]) -> str:
    """Pass the stderr of `process` to `show` until it ends; returns its last ERROR_CHARACTERS.

    If this process is killed, the pipe closes, and `process` ends at its next output."""
    errors = ""
    with process.stderr:
        while chunk := process.stderr.read1(4096):
            text = chunk.decode(errors="replace")
            show(text)
            errors = (errors + text)[-ERROR_CHARACTERS:]
    return errors


def _write_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def exit_name(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"signal {name}" + (", out of memory?" if name == "SIGKILL" else "")
