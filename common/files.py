"""Atomic writing of files, and reading of small JSON files."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError

MAX_JSON = 256 << 20  # bytes; flow_stats.json of 1,000 frames takes 25 MB
MAX_PIXELS = 1 << 26  # pixels; default of --max_pixels; 8192x8192, enough for 8K (7680x4320 and 8192x4320)


@contextmanager
def atomic_path(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """A temporary path beside `path` (hidden, same suffix) that becomes `path` when the block ends without an error.

    The parent folder is created if it is missing. A killed process leaves at most a hidden file, which readers ignore.
    With `sync`, the content is flushed to the disk before the rename, so that a system crash leaves no empty file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        if sync:
            flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that is renamed to `path` when the block ends without an error.

    An existing folder `path` is deleted first."""
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
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a binary file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, value: object) -> None:
    """Write a value as a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | Path, advice: str) -> dict:
    """Read a JSON file that contains an object.

    UserError, whose message ends with `advice`, if the file is missing, damaged, larger than MAX_JSON, or contains
    another kind of value."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_JSON + 1)
        out = json.loads(text) if len(text) <= MAX_JSON else None
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: {advice}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise UserError(f"{path} is damaged: {advice}") from error
    if not isinstance(out, dict):
        raise UserError(f"{path} is damaged: {advice}")
    return out


def flush_to_disk(path: Path) -> None:
    """Flush a file or folder to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
