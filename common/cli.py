"""Command-line interface shared by all commands: argument parser, boolean options, option types, error reporting."""

import argparse
import logging
import os
import sys
from collections.abc import Callable

import configargparse

from common.errors import UserError, os_error_line
from common.interrupts import raise_interrupts, say_stopped

YES = ("true", "yes", "on", "1")
NO = ("false", "no", "off", "0")


def yes_or_no(text: str) -> bool:
    """Parse true, yes, on, 1 (True) or false, no, off, 0 (False), in upper or lower case. ValueError for other text."""
    word = text.strip().lower()
    if word not in YES + NO:
        raise ValueError(f"'{text}' is neither true nor false")
    return word in YES


class HelpFormatter(argparse.HelpFormatter):
    """Help text: one entry per option, under its current name only (no old names), followed by its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return self._format_args(action, action.dest.upper())
        name = action.option_strings[0]
        if isinstance(action, Flag):
            return f"{name}, --no-{name.removeprefix('--')}"
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        return f"{name} {self._format_args(action, name.lstrip('-').upper())}"

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if isinstance(action, Flag):
            default = "yes" if action.default else "no"
        elif default in (None, "", argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return f"{action.help} (default: {str(default).replace('%', '%%')})"


class Parser(configargparse.ArgumentParser):
    """A parser that reports an error as one line on stderr and exits with code 2."""

    def __init__(self, **settings):
        super().__init__(**{"formatter_class": HelpFormatter, "add_config_file_help": False} | settings)

    def error(self, message: str) -> None:
        sys.stderr.write(f"{self.prog}: {message} (--help lists the options)\n")
        sys.exit(2)

    def convert_item_to_command_line_arg(self, action: argparse.Action | None, key: str, value) -> list[str]:
        """Convert a config file entry to arguments. A flag keeps the name in the file, which may be a negation."""
        if isinstance(action, Flag):
            return [f"--{key.lstrip('-')}={value}"]
        return super().convert_item_to_command_line_arg(action, key, value)


class Flag(argparse.Action):
    """A boolean option: `--name` is True, `--no-name` is False. In a config file: `name = true` or `name = false`.

    `old_names`: additional names, accepted for compatibility. `old_negations`: additional names that set it to False.
    Unless `nargs` is 0, an explicit value may follow: `--name 0`."""

    def __init__(self, option_strings: list[str], dest: str, default: bool = False, help: str = "",
                 old_names: tuple[str, ...] = (), old_negations: tuple[str, ...] = (), nargs: int | str = "?"):
        names = [*(name.removeprefix("--") for name in option_strings), *old_names]
        self.negations = {f"--no{sign}{name}" for name in names for sign in "-_"} | {f"--{n}" for n in old_negations}
        super().__init__([f"--{name}" for name in names] + sorted(self.negations), dest, nargs=nargs,
                         default=default, help=help)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            value = yes_or_no(values) if isinstance(values, str) else True
        except ValueError as error:
            parser.error(f"{option_string}: {error}")
        setattr(namespace, self.dest, value != (option_string in self.negations))


def at_least(low: int) -> Callable[[str], int]:
    """Type of an option: an integer of at least `low`."""
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {low}")
        return int(text)
    return parse


def positive(text: str) -> float:
    """Type of an option: a finite number greater than 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def share(text: str) -> float:
    """Type of an option: a number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value


def start_logging() -> None:
    """Write messages to stderr: all, or those from the level in the environment variable LOG_LEVEL on (WARNING)."""
    logging.basicConfig(level=os.environ.get("LOG_LEVEL") or "INFO", format="%(message)s")


def run(main: Callable[[], None]) -> None:
    """Call the main function of a command.

    A UserError or an OSError of the operating system is printed as one line on stderr, and the exit code is 2. Ctrl-C
    prints one line; the exit code is 130."""
    raise_interrupts()
    try:
        main()
    except KeyboardInterrupt:
        say_stopped()
        sys.exit(130)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except OSError as error:
        if error.errno is None:  # raised by a library, not by the operating system
            raise
        sys.stderr.write(f"error: {os_error_line(error)}; files saved before are intact\n")
        sys.exit(2)
