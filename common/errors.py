"""Errors that are the user's to mend: drivers print them as one line and exit with code 2."""

import errno

ADVICE = {
    errno.ENOSPC: "the disk is full: free some of it",
    errno.EDQUOT: "the disk quota is used up: free some of it",
    errno.EFBIG: "the file would be larger than is allowed here (ulimit -f, or the file system)",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission is denied: choose another folder, or change its rights",
    errno.EPERM: "permission is denied: choose another folder, or change its rights",
    errno.ENOENT: "it is not there, or no longer",
    errno.ENOTDIR: "a part of the path is a file and no folder",
    errno.EISDIR: "it is a folder and no file",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EMFILE: "too many files are open (ulimit -n)",
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the network file system has lost it",
}


class UserError(Exception):
    """What is wrong, in which file, and what to do, in one line."""


def os_error_line(error: OSError, where: object = "") -> str:
    """What the operating system refused, as one line; `where` is named if the error names no file."""
    path = error.filename or where
    said = ADVICE.get(error.errno) or error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{path}: {said}" if path else said
