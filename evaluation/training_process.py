"""Train one video of a benchmark: run train.py in a separate process."""

import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from common.errors import UserError
from common.files import write_text
from configs.options import run_dir
from loaders.checkpoint import checkpoint_path
from training.run_metadata import as_config
from training.signals import record_signals

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
STOPPED = 130  # exit code of a run that saved its state after a signal
ERROR_CHARACTERS = 4_000  # length of the end of stderr that is kept for error messages


def train(options: Namespace, num_threads: int) -> None:
    """Start or resume training; does nothing if the checkpoint of the last step exists.

    num_threads: threads of PyTorch. SIGINT and SIGTERM are passed on; training saves its state, and this raises
    SystemExit 130. UserError for a user's mistake; RuntimeError if training fails otherwise."""
    folder = run_dir(options)
    if checkpoint_path(folder, options.num_iters).is_file():
        return
    write_text(folder / "args.txt", as_config(options))
    process = subprocess.Popen([sys.executable, str(TRAIN), "--config", str(folder / "args.txt")],
                               stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": str(num_threads)})
    with record_signals(process.terminate) as received:
        errors = _show_errors(process)
        code = process.wait()
    if code == STOPPED or (received and code):
        sys.exit(STOPPED)
    if code == 2:
        raise UserError(errors.strip().splitlines()[-1].removeprefix("error: "))
    if code:
        raise RuntimeError(f"train.py ended with {exit_name(code)}: {errors}")


def _show_errors(process: subprocess.Popen) -> str:
    """Copy the stderr of `process` to this one's until it ends; returns its last ERROR_CHARACTERS.

    If this process is killed, the pipe closes, and `process` ends at its next output."""
    errors = ""
    with process.stderr:
        while chunk := process.stderr.read1(4096):
            text = chunk.decode(errors="replace")
            sys.stderr.write(text)
            sys.stderr.flush()
            errors = (errors + text)[-ERROR_CHARACTERS:]
    return errors


def exit_name(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"signal {name}" + (", out of memory?" if name == "SIGKILL" else "")
