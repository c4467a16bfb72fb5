"""Atomic writing of files, reading of small JSON files, and the order of file names."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import ADVICE, UserError

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


def check_writable(folder: str | Path, option: str) -> None:
    """Create a folder if it is missing, and write and remove an empty file in it.

    UserError that names the folder and the `option` that selects it, if that is not possible."""
    folder = Path(folder)
    probe = folder / f".tmp-{os.getpid()}-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        why = ADVICE.get(error.errno, error.strerror or "unknown reason").split(":")[0]
        raise UserError(f"{folder} cannot be written, {why}: choose another folder with {option}") from error


def natural_key(name: str) -> tuple:
    """Sorting key of a file name that compares digits as numbers: img_2 comes before img_10.

    Names whose numbers are equal (img_1, img_01) are compared as text."""
    parts = re.split(r"([0-9]+)", name)  # text and digits in turn, beginning with text
    return tuple(int(part) if k % 2 else part for k, part in enumerate(parts)), name


def in_natural_order(paths: Iterable[Path]) -> list[Path]:
    """Paths in the order of `natural_key` of their file names."""
    return sorted(paths, key=lambda path: natural_key(path.name))


def flush_to_disk(path: Path) -> None:
    """Flush a file or folder to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
