"""Reading and writing of .npy and .npz files. Files may come from untrusted sources: only numeric arrays are read.

The data size in a header must match the length of the file before memory is allocated. Python objects are not read.
"""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.errors import UserError
from common.files import atomic_path

MAX_BYTES = 4_000_000_000  # bytes, uncompressed; limit for an array in an .npz and for the frames of a video
KINDS = "biuf"             # dtype kinds: bool, signed and unsigned integer, float
READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
Header = tuple[tuple[int, ...], bool, np.dtype]  # shape, whether in Fortran order, dtype


def save_npy(path: str | Path, array: np.ndarray, sync: bool = True) -> None:
    """Write an array as .npy, atomically. Unlike numpy.save, this reports a full disk as ENOSPC."""
    array = np.ascontiguousarray(array)
    with atomic_path(path, sync) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def read_npy(path: str | Path, advice: str) -> np.ndarray:
    """The array of an .npy file.

    UserError, whose message ends with `advice`, if the file is missing or damaged, or the array is not numeric."""
    with _user_errors(path, advice), open(path, "rb") as file:
        return _content(file, *_checked_header(file, Path(path).stat().st_size))


def map_npy(path: str | Path, advice: str) -> np.ndarray:
    """The array of an .npy file, memory-mapped and read-only. Errors as in `read_npy`."""
    with _user_errors(path, advice):
        with open(path, "rb") as file:
            shape, fortran, dtype = _checked_header(file, Path(path).stat().st_size)
            offset = file.tell()
        if not math.prod(shape):
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


class ArrayFile:
    """The arrays of an .npz by name; each is read when it is accessed.

    UserError, whose message ends with `advice`, if the file is missing or damaged, or if an array is not numeric or
    larger than MAX_BYTES."""

    def __init__(self, path: str | Path, advice: str):
        self.path, self.advice = path, advice
        with _user_errors(path, advice), zipfile.ZipFile(path) as archive:
            self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        self.names = list(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> np.ndarray:
        info = self._members[name]
        with _user_errors(self.path, self.advice), zipfile.ZipFile(self.path) as archive:
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"`{name}` is compressed in a way that numpy does not use")
            if info.file_size > MAX_BYTES:
                raise ValueError(f"`{name}` takes {info.file_size / 1e9:.1f} GB unpacked, at most "
                                 f"{MAX_BYTES / 1e9:.0f} are read")
            with archive.open(info) as file:
                out = _content(file, *_checked_header(file, info.file_size))
                file.read(1)  # zipfile compares the checksum at the end of the file
            return out


def _checked_header(file: BinaryIO, length: int) -> Header:
    """The header of an array in a file of `length` bytes; afterwards the file position is the start of the data."""
    version = np.lib.format.read_magic(file)
    if version not in READERS:
        raise ValueError("it is of a format version that numbers do not need")
    shape, fortran, dtype = READERS[version](file)
    if dtype.kind not in KINDS:
        raise ValueError(f"it holds {'Python objects' if dtype.hasobject else dtype}, not numbers")
    claimed, there = math.prod(shape) * dtype.itemsize, length - file.tell()
    if min(shape, default=0) < 0 or claimed != there:
        raise ValueError(f"its header claims {claimed} bytes of data, {there} are there")
    return shape, fortran, dtype


def _content(file: BinaryIO, shape: tuple[int, ...], fortran: bool, dtype: np.dtype) -> np.ndarray:
    """The array whose data start at the current position of the file."""
    out = np.empty(math.prod(shape), dtype)
    if file.readinto(out.view(np.uint8)) != out.nbytes:
        raise EOFError("it is cut short")
    return out.reshape(shape, order="F" if fortran else "C")


@contextmanager
def _user_errors(path: str | Path, advice: str) -> Iterator[None]:
    """Convert any exception in the block into a UserError of one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: {advice}") from error
    except Exception as error:  # a damaged file can raise any exception in numpy, zipfile and zlib
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise UserError(f"{path} cannot be read as arrays of numbers ({' '.join(why.split())[:160]}): {advice}") \
            from error
