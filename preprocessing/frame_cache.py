"""A cache of arrays that are computed once, per frame or per pair of frames, with a limit on memory."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from threading import Event, Lock

import numpy as np

from common.errors import UserError
from common.files import atomic_path
from loaders.npy import ArrayFile

log = logging.getLogger(__name__)
Arrays = tuple[np.ndarray, ...]


class FrameCache:
    """`cache[t]` returns `compute(t)`, the arrays of frame t, or of another key. Safe to use from several threads: if
    one asks for what another one is computing, it waits. `compute(t)` may ask for other keys, but not in a circle.

    budget: bytes of arrays to keep in memory; the least recently used ones are dropped
    folder: where to also keep all arrays as files, whose keys must be integers. Without it, dropped arrays are computed
            again"""

    def __init__(self, compute: Callable[[Hashable], Arrays], budget: int, folder: Path | None = None):
        self.compute = compute
        self.budget = budget
        self.folder = folder
        self._kept: OrderedDict[Hashable, Arrays] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()
        self._being_computed: dict[Hashable, Event] = {}  # set when the arrays are kept, or could not be computed

    def __getitem__(self, t: Hashable) -> Arrays:
        while True:
            with self._lock:
                if t in self._kept:
                    self._kept.move_to_end(t)
                    return self._kept[t]
                other = self._being_computed.get(t)
                if other is None:
                    done = self._being_computed[t] = Event()
                    break
            other.wait()
        try:
            arrays = self._fetch(t)
            self._keep(t, arrays)
        finally:
            with self._lock:
                del self._being_computed[t]
            done.set()
        return arrays

    def clear(self) -> None:
        """Drop all arrays that are in memory."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def _keep(self, t: Hashable, arrays: Arrays) -> None:
        with self._lock:
            self._kept[t] = arrays
            self._bytes += _size(arrays)
            while self._bytes > self.budget and len(self._kept) > 1:
                self._bytes -= _size(self._kept.popitem(last=False)[1])

    def _fetch(self, t: Hashable) -> Arrays:
        path = self.folder / f"{t:05d}.npz" if self.folder else None
        if path and path.is_file():
            try:  # read, not memory-mapped: mapped pages would count as memory of the process
                file = ArrayFile(path, "it is computed again")
                return tuple(file[name] for name in file.names)
            except UserError as error:  # the file is incomplete if the machine crashed while it was written
                log.warning("%s", error)
        # In C order, as when read from a file: rounding of sums depends on the memory layout.
        arrays = tuple(np.ascontiguousarray(array) for array in self.compute(t))
        if path:
            with atomic_path(path, sync=False) as temporary, open(temporary, "wb") as file:
                np.savez(file, *arrays)
        return arrays


def _size(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays)
