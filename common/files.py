"""Atomic writing of files, and reading of small JSON files."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError

MAX_JSON = 256 << 20  # bytes; flow_stats.json of 1,000 frames has 25 MB
MAX_PIXELS = 1 << 26  # of an image, unless told otherwise; 8192x8192, room for 8K (7680x4320, and 8192x4320)


@contextmanager
def atomic_path(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """A temporary path beside `path` (hidden, same suffix) that becomes `path` when the block ends without an error.

    Makes the folder if it is missing. A killed process leaves at most a hidden file that no reader looks at. With
    `sync` the content is on the disk before the name is, so that a crash of the machine leaves no empty file either."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        if sync:
            _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that replaces the folder `path`, if there is one, when the block ends without an
    error."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_json(path: str | Path, advice: str) -> dict:
    """The object of a JSON file. UserError, which ends with `advice`, if it is missing, damaged, too large or another
    kind of value."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_JSON + 1)
        out = json.loads(text) if len(text) <= MAX_JSON else None
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: {advice}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
        raise UserError(f"{path} is damaged: {advice}") from error
    if not isinstance(out, dict):
        raise UserError(f"{path} is damaged: {advice}")
    return out


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
