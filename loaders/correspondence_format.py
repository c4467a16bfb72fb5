"""Binary format of the correspondence store (docs/method.md).

Notation
    T, H, W  frames, height, width
    n        stored pixels of an ordered pair (i, j): all pixels of frame i if |i - j| = 1, else those with a flag
    flags    cycle: forward-backward consistent; occlusion: consistent only in the second cycle, occluded in frame j;
             both: tentative, which is forward-backward consistent, but fails the appearance check
    q        flow in 1/16 px as int16; the rounding error is at most 1/32 px for displacements up to 2047 px
    valid    number of pixels with exactly one of the flags

Tentative correspondences guide tracks (inference/flow_guided_tracker.py). Nothing is trained on them, and they do not
count as valid. Stores of earlier versions have fewer or none.

A block holds one ordered pair: cycle bit plane | occlusion bit plane | q (n, 2), each padded to ALIGN bytes.
A row file, such as `00012.row`, holds one source frame: int64 header [number of pairs, then (j, n, valid) per pair],
padded to ALIGN bytes | blocks in the order of j | count map (H, W) uint16. The offsets of the blocks are computed from
the header; there is no separate index.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from common.errors import UserError

ALIGN = 64            # bytes
STEPS = 16            # int16 steps per pixel of flow
MAX_FLOW = 32767 / STEPS  # pixels


@dataclass
class StoredPair:
    """The stored correspondences of an ordered pair, sorted by pixel index."""
    pixels: np.ndarray     # (n,) int64 flat indices y * W + x
    flow_q: np.ndarray     # (n, 2) int16 in 1/16 px, memory-mapped
    cycle: np.ndarray      # (n,) bool
    occlusion: np.ndarray  # (n,) bool

    def without_tentative(self) -> "StoredPair":
        """The pair without its tentative correspondences."""
        tentative = self.cycle & self.occlusion
        if not tentative.any():
            return self
        kept = ~tentative
        return StoredPair(self.pixels[kept], self.flow_q[kept], self.cycle[kept], self.occlusion[kept])

    def flow(self, rows: np.ndarray) -> np.ndarray:
        """Flow `(k, 2)` float32, in pixels, of the given rows `(k,)`."""
        return self.flow_q[rows].astype(np.float32) / STEPS

    @property
    def count(self) -> int:
        """Number of stored pixels."""
        return len(self.pixels)

    def find(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Same as `PairIndex.find`."""
        rows = np.searchsorted(self.pixels, pixels).clip(max=max(self.count - 1, 0))
        return rows, self.pixels[rows] == pixels if self.count else np.zeros(len(pixels), bool)

    def parity(self, size: tuple[int, int]) -> int | None:
        """Same as `PairIndex.parity`."""
        y, x = np.divmod(self.pixels, size[1])
        odd = (x + y) % 2 == 1
        return None if odd.any() and not odd.all() else int(odd.any())

    def cycle_at(self, pixels: np.ndarray) -> np.ndarray:
        """Same as `PairIndex.cycle_at`."""
        rows = self.find(pixels)[0]
        return self.cycle[rows] & ~self.occlusion[rows]

    def tentative_at(self, pixels: np.ndarray) -> np.ndarray:
        """Same as `PairIndex.tentative_at`."""
        rows = self.find(pixels)[0]
        return self.cycle[rows] & self.occlusion[rows]


class PairIndex:
    """The block with `stored` pixels at `offset` of a uint8 buffer; single pixels are found without decoding all.

    It has the methods `find`, `cycle_at`, `tentative_at` and `flow` of StoredPair. ValueError if the flags do not match
    `stored`."""

    def __init__(self, buffer: np.ndarray, offset: int, stored: int, size: tuple[int, int]):
        plane = plane_bytes(size)
        self._cycle, self._occlusion = buffer[offset: offset + 2 * plane].reshape(2, plane)
        self._flags = self._cycle | self._occlusion
        self._words = self._flags.view(">u8").astype(np.uint64)  # 64 pixels each, the first one is the highest bit
        in_word = np.bitwise_count(self._words)
        self._before = np.cumsum(in_word, dtype=np.int64) - in_word  # number of flags in all words before each word
        self._pixels = size[0] * size[1]
        self.count = stored
        self._all = stored == self._pixels
        self.num_flagged = int(self._before[-1] + in_word[-1])
        tentative = self._cycle & self._occlusion
        self.valid = self.num_flagged - int(np.bitwise_count(tentative.view(np.uint64)).sum(dtype=np.int64))
        beyond = np.unpackbits(self._flags[self._pixels // 8:])[self._pixels % 8:]  # padding of the plane
        if not self._all and (self.num_flagged != stored or beyond.any()):
            raise ValueError(f"{self.num_flagged} flags for {stored} stored pixels")
        start = offset + 2 * plane
        self._flow_q = buffer[start: start + 4 * stored].view(np.int16).reshape(stored, 2)

    def find(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows `(M,)` of pixels `(M,)`, and whether each is stored `(M,)` bool. Other rows are undefined."""
        if self._all:
            return pixels, np.ones(len(pixels), bool)
        word = pixels >> 6
        shifted = self._words.take(word) >> (63 - (pixels & 63)).astype(np.uint64)
        return self._before.take(word) + np.bitwise_count(shifted) - 1, (shifted & 1).astype(bool)

    def parity(self, size: tuple[int, int]) -> int | None:
        """0 or 1 if all stored pixels of a frame of `size` (H, W) have even x + y + parity, as with `--density half`;
        else None."""
        if self._all:
            return None
        odd = _odd_pixels(size)
        if not (self._flags & odd).any():
            return 0
        return None if (self._flags & ~odd).any() else 1

    def cycle_at(self, pixels: np.ndarray) -> np.ndarray:
        """Whether stored pixels `(M,)` are cycle-consistent and not tentative `(M,)` bool."""
        return self._bits(self._cycle, pixels) & ~self._bits(self._occlusion, pixels)

    def tentative_at(self, pixels: np.ndarray) -> np.ndarray:
        """Whether stored pixels `(M,)` are tentative `(M,)` bool."""
        return self._bits(self._cycle, pixels) & self._bits(self._occlusion, pixels)

    def _bits(self, plane: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        return (plane.take(pixels >> 3) >> (7 - (pixels & 7)).astype(np.uint8) & 1).astype(bool)

    def flow(self, rows: np.ndarray) -> np.ndarray:
        """Flow `(k, 2)` float32, in pixels, of the given rows `(k,)`."""
        return self._flow_q.take(rows, axis=0).astype(np.float32) / STEPS  # five times as fast as indexing

    def decode(self) -> StoredPair:
        """All stored pixels; the flow is a view of the buffer."""
        pixels = np.arange(self._pixels) if self._all else np.flatnonzero(self.flagged())
        return StoredPair(pixels, self._flow_q, self._image(self._cycle)[pixels], self._image(self._occlusion)[pixels])

    def flagged(self) -> np.ndarray:
        """Whether each pixel of the frame has a flag `(H * W,)` bool."""
        return self._image(self._flags)

    def valid_pixels(self) -> np.ndarray:
        """Whether each pixel of the frame has a valid correspondence `(H * W,)` bool."""
        return self._image(self._cycle ^ self._occlusion)

    def _image(self, plane: np.ndarray) -> np.ndarray:
        return np.unpackbits(plane, count=self._pixels).view(bool)


@dataclass
class DensePair:
    """The correspondences of an ordered pair as images; tentative ones have both flags."""
    flow: np.ndarray       # (H, W, 2) float32 pixels, 0 where not stored
    stored: np.ndarray     # (H, W) bool
    cycle: np.ndarray      # (H, W) bool
    occlusion: np.ndarray  # (H, W) bool

    def without_tentative(self) -> "DensePair":
        """The pair without the flags of tentative correspondences."""
        return DensePair(self.flow, self.stored, self.cycle & ~self.occlusion, self.occlusion & ~self.cycle)


def as_images(pair: StoredPair, size: tuple[int, int]) -> DensePair:
    """Convert a stored pair to images of `size` (H, W)."""
    H, W = size
    if pair.count == H * W:
        return DensePair(pair.flow(slice(None)).reshape(H, W, 2), np.ones(size, bool), pair.cycle.reshape(size),
                         pair.occlusion.reshape(size))
    flow, images = np.zeros((H * W, 2), np.float32), np.zeros((3, H * W), bool)
    flow[pair.pixels] = pair.flow(slice(None))
    for image, values in zip(images, (True, pair.cycle, pair.occlusion), strict=True):
        image[pair.pixels] = values
    return DensePair(flow.reshape(H, W, 2), *images.reshape(3, H, W))


def checkerboard_parity(i: int, j: int) -> int:
    """With `--density half`, a pair of frames that are not adjacent has the pixels with even x + y + parity.

    The parity differs between frames and between the intervals 2, 4, 8, ..., so that every pixel has distant
    correspondences. Stores of earlier versions have the parity of i + j, which these intervals do not change."""
    return (int(i) + int(abs(i - j)).bit_length()) % 2


@lru_cache
def _odd_pixels(size: tuple[int, int]) -> np.ndarray:
    """Bit plane of the pixels with odd x + y."""
    plane = np.zeros(plane_bytes(size), np.uint8)
    bits = np.packbits(np.indices(size).sum(0) % 2 == 1)
    plane[:len(bits)] = bits
    return plane


def block_bytes(stored: int, size: tuple[int, int]) -> int:
    """Length in bytes of a block with `stored` pixels."""
    return 2 * plane_bytes(size) + padded(4 * stored)


def plane_bytes(size: tuple[int, int]) -> int:
    """Length in bytes of a padded bit plane."""
    return padded(-(-size[0] * size[1] // 8))


def padded(length: int) -> int:
    """`length` rounded up to a multiple of ALIGN."""
    return -(-length // ALIGN) * ALIGN


class Row:
    """A memory-mapped row file. UserError if it is missing, or its header is invalid or does not match its length."""

    def __init__(self, path: Path, size: tuple[int, int]):
        if not path.is_file():
            raise UserError(f"{path} is missing: run `python -m preprocessing` again in a fresh folder")
        self.damaged = f"{path} is damaged: delete its folder and run `python -m preprocessing` again"
        if path.stat().st_size < ALIGN:
            raise UserError(self.damaged)
        self.size = size
        # Mode c (copy-on-write): PyTorch expects writable arrays, but nothing is written. Indexing a plain array is
        # faster than indexing a memmap.
        self.data = np.memmap(path, np.uint8, mode="c").view(np.ndarray)
        pairs = int(self.data[:8].view(np.int64)[0])
        if not 0 <= pairs <= (len(self.data) - 8) // 24:
            raise UserError(self.damaged)
        table = self.data[8: 8 + 24 * pairs].view(np.int64).reshape(-1, 3)
        self.targets, self.stored, self.valid = (np.array(column) for column in table.T)  # (P,) each
        if not ((self.targets >= 0).all() and (np.diff(self.targets) > 0).all() and (self.valid >= 0).all()
                and (self.valid <= self.stored).all() and (self.stored <= size[0] * size[1]).all()):
            raise UserError(self.damaged)
        lengths = [block_bytes(int(n), size) for n in self.stored]
        self.offsets = padded(8 + 24 * pairs) + np.cumsum([0, *lengths])
        if len(self.data) != self.offsets[-1] + 2 * size[0] * size[1]:
            raise UserError(self.damaged)
        self.place = {int(j): k for k, j in enumerate(self.targets)}

    def pair(self, j: int) -> StoredPair:
        """Correspondences to frame j, also tentative ones. KeyError if the file has none, UserError if they do not
        match the header."""
        return self.index(j).decode()

    def index(self, j: int) -> PairIndex:
        """Correspondences to frame j for lookup of single pixels. Errors as in `pair`."""
        k = self.place[j]
        try:
            out = PairIndex(self.data, int(self.offsets[k]), int(self.stored[k]), self.size)
        except ValueError as error:
            raise UserError(self.damaged) from error
        if self.valid[k] not in (out.valid, out.num_flagged):  # all flags: earlier versions had none with both
            raise UserError(self.damaged)
        return out

    def count_map(self) -> np.ndarray:
        """Number of valid correspondences of each pixel over all target frames `(H, W)` uint16."""
        H, W = self.size
        return self.data[self.offsets[-1]:].view(np.uint16).reshape(H, W)
