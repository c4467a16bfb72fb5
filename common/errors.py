"""Errors that the user can correct. Commands print them as one line and exit with code 2 (common.cli.run)."""

import errno
import re

ADVICE = {
    errno.ENOSPC: "the disk is full: free some of it",
    errno.EDQUOT: "the disk quota is used up: free some of it",
    errno.EFBIG: "the file would be larger than is allowed here (ulimit -f, or the file system)",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission is denied: choose another folder, or change its rights",
    errno.EPERM: "permission is denied: choose another folder, or change its rights",
    errno.ENOENT: "it does not exist",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EMFILE: "too many files are open (ulimit -n)",
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the file is gone from the network file system",
}


class UserError(Exception):
    """An error that the user can correct. The message is one line: the file, the problem, and what to do."""


def os_error_line(error: OSError, where: object = "") -> str:
    """Format an operating system error as one line: file and reason. `where` is used if the error has no file name.

    A file that was to be written is named, not the temporary file beside it (common.files.atomic_path)."""
    path = re.sub(r"\.tmp-[0-9]+-(?=[^/]*$)", "", str(error.filename or where))
    said = ADVICE.get(error.errno) or error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{path}: {said}" if path else said
