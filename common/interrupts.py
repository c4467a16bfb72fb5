"""Importing this module makes Ctrl-C print one line instead of a traceback.

Commands import it first, because importing PyTorch takes seconds. Afterwards `common.cli.run` does the same, and some
commands save their state.
"""

import sys

STOPPED = "stopped by Ctrl-C; files that were written before are intact\n"
show_other_exceptions = sys.excepthook


def say_stopped() -> None:
    """Print the line. On a terminal it begins a new line, because a progress bar can be there."""
    sys.stderr.write("\n" * sys.stderr.isatty() + STOPPED)


def excepthook(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """The handler of exceptions that nothing catches."""
    if issubclass(kind, KeyboardInterrupt):
        say_stopped()
    else:
        show_other_exceptions(kind, error, trace)


sys.excepthook = excepthook
