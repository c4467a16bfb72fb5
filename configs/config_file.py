"""Options as the text of a config file: a run's args.txt."""

from argparse import Namespace
from pathlib import Path

import configargparse

from common.errors import UserError
from configs.options import OPTIONS


def as_config(options: Namespace) -> str:
    """Text of a config file from which `--config` reads the same option values."""
    lines = []
    for option in OPTIONS:
        value = getattr(options, option.name)
        if value == "" and option.default == "":
            continue
        text = _quoted(option.name, value) if isinstance(value, str) else value
        lines.append(f"{option.name} = {text}\n")
    return "".join(sorted(lines))


def _quoted(name: str, value: str) -> str:
    """`value` as the config file's parser reads it back unchanged: blanks, #, ;, quotes, = and : need quotes."""
    if "\n" in value or ('"' in value and "'" in value):
        raise UserError(f"--{name} has a line break or both kinds of quotes, which no config file can hold: rename it")
    if value and not set(value) & set(" \t#;'\"=:"):
        return value
    quote = "'" if '"' in value else '"'
    return f"{quote}{value}{quote}"


def read_options_file(path: Path) -> dict[str, str]:
    """The texts of the options in a run's args.txt by name. FileNotFoundError if there is none; UserError if it is
    damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            found = configargparse.DefaultConfigFileParser().parse(file)
    except (UnicodeDecodeError, configargparse.ConfigFileParserException) as error:
        raise UserError(f"{path} cannot be read as options: restore it, or remove it") from error
    return {name: text for name, text in found.items() if isinstance(text, str)}
