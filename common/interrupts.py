"""Importing this module in a command makes Ctrl-C print one line instead of a traceback.

Commands import it first, because importing PyTorch takes seconds. `common.cli.run` then handles Ctrl-C in another way:
some commands save their state.
"""

import os
import signal
import sys
from pathlib import Path

STOPPED = "stopped by Ctrl-C; files that were written before are intact\n"
ROOT = Path(__file__).resolve().parents[1]


def say_stopped() -> None:
    """Print the line. On a terminal it begins a new line, because a progress bar can be there."""
    sys.stderr.write("\n" * sys.stderr.isatty() + STOPPED)


def stop_now(number: int, frame: object) -> None:
    """Handler of SIGINT while modules are imported: end at once.

    Extension modules would turn a KeyboardInterrupt into other errors."""
    say_stopped()
    sys.stderr.flush()
    os._exit(130)


def raise_interrupts() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, as usual."""
    if signal.getsignal(signal.SIGINT) is stop_now:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    """Whether this process runs one of the project's commands, and not a program that imports one."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return file is not None and Path(file).resolve().parent in (ROOT, ROOT / "preprocessing")


if signal.getsignal(signal.SIGINT) is signal.default_int_handler and _is_command():
    signal.signal(signal.SIGINT, stop_now)
