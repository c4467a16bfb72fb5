"""What is computed once a frame and needed by many pairs, within a bound of memory."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Lock

import numpy as np

from common.errors import UserError
from common.files import atomic_path
from loaders.npy import ArrayFile

log = logging.getLogger(__name__)
Arrays = tuple[np.ndarray, ...]


class FrameCache:
    """`cache[t]` is `compute(t)`, arrays of frame t; safe to use from several threads.

    The arrays used last stay in memory, up to `budget` bytes. With `folder` all are kept there too and computed once;
    without, those that left memory are computed again (frames: read from their files again)."""

    def __init__(self, compute: Callable[[int], Arrays], budget: int, folder: Path | None = None):
        self.compute, self.budget, self.folder = compute, budget, folder
        self._kept: OrderedDict[int, Arrays] = OrderedDict()
        self._bytes, self._lock = 0, Lock()

    def __getitem__(self, t: int) -> Arrays:
        with self._lock:
            if t in self._kept:
                self._kept.move_to_end(t)
                return self._kept[t]
        arrays = self._fetch(t)
        with self._lock:
            if t not in self._kept:
                self._kept[t] = arrays
                self._bytes += _size(arrays)
            while self._bytes > self.budget and len(self._kept) > 1:
                self._bytes -= _size(self._kept.popitem(last=False)[1])
        return arrays

    def _fetch(self, t: int) -> Arrays:
        if self.folder is None:
            return self._compute(t)
        path = self.folder / f"{t:05d}.npz"
        if path.is_file():
            try:  # read, not mapped: mapped pages would count as memory
                file = ArrayFile(path, "it is computed again")
                return tuple(file[name] for name in file.names)
            except UserError as error:  # a machine that died may have left it short
                log.warning("%s", error)
        arrays = self._compute(t)
        with atomic_path(path, sync=False) as temporary, open(temporary, "wb") as file:
            np.savez(file, *arrays)
        return arrays

    def _compute(self, t: int) -> Arrays:
        """Laid out as they will be when they are read again: sums over another layout round otherwise."""
        return tuple(np.ascontiguousarray(array) for array in self.compute(t))


def _size(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays)
