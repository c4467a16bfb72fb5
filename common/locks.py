"""A lock on a folder, so that two processes do not write to it at the same time."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import UserError

NAME = ".lock"
HELD = (errno.EWOULDBLOCK, errno.EACCES)  # error numbers of a lock that another process has


@contextmanager
def lock_folder(folder: str | Path, make: bool = False) -> Iterator[None]:
    """Hold the lock of a folder: the file FOLDER/.lock, which is locked and names the process.

    The operating system releases the lock when the process ends in any way, even if the file stays. Nothing is locked
    where that is impossible: in a folder that does not exist (with `make`, it is made, and deleted if it stays empty),
    is read-only, or whose file system has no locks. UserError if another process has the lock."""
    path = Path(folder) / NAME
    file = _locked_file(path, make)
    try:
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # before the lock is released, so that it is this process's file
            file.close()
            if make:
                with suppress(OSError):  # it has files
                    path.parent.rmdir()


def _locked_file(path: Path, make: bool):
    """The lock file, locked; None if that is impossible. Whatever writes to the folder will report why."""
    while True:
        try:
            if make:
                path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_current(file, path):
                file.truncate(0)
                file.write(f"{os.getpid()} {socket.gethostname()}")
                file.flush()
                return file
        except OSError as error:
            if error.errno in HELD:
                holder = _holder(file)
                file.close()
                raise UserError(f"another process works in {path.parent}{holder}: wait for its end, or give another "
                                "folder") from error
            return file
        file.close()  # its last holder deleted it after it was opened here


def _is_current(file, path: Path) -> bool:
    """Whether an open file is the one that is at `path` now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(file) -> str:
    """The process that has the lock, as text; empty if it is not known."""
    file.seek(0)
    number, _, machine = file.read(300).strip().partition(" ")
    return f" (process {number} on {machine})" if number.isdecimal() and machine.isprintable() else ""
