"""Pack tracks into few bytes that a browser unpacks quickly (web/unpack.js).

Notation
    T, h, w    frames, and rows and columns of the grid of query points; arrays are (T, h, w) here
    quantum    step in pixels to which positions are rounded; the error is at most half of it

A packed block is one zlib stream of, in this order: x, y, visible, depth, score.
    x, y       position / quantum as int16; then the difference from the frame before, and of that the difference from
               the left neighbor (both modulo 2^16); zigzag, so that small differences have a zero
               high byte; all low bytes, then all high bytes
    visible    one bit each, the lowest bit of a byte first
    depth      uint8, 0 and 255 are the ends of the range; difference from the frame before (modulo 2^8)
    score      uint8, 255 is 1; difference from the frame before (modulo 2^8)
"""

import zlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GridTracks:
    """Tracks of a grid of query points of one frame."""
    query_frame: int     # index among the page's frames
    shape: tuple[int, int]
    tracks: np.ndarray   # (h * w, T, 2) float32 pixels
    visible: np.ndarray  # (h * w, T) bool
    depth: np.ndarray    # (h * w, T) float32
    score: np.ndarray    # (h * w, T) float32, in [0, 1]

    def thinned(self) -> "GridTracks":
        """Every second row and column."""
        h, w = self.shape
        rows = np.arange(h * w).reshape(h, w)[::2, ::2]
        kept = rows.ravel()
        return GridTracks(self.query_frame, rows.shape, self.tracks[kept], self.visible[kept], self.depth[kept],
                          self.score[kept])


def pack(block: GridTracks, quantum: float, depth_range: tuple[float, float]) -> bytes:
    """Pack a block; positions are clipped to 32767 quanta."""
    near, far = depth_range
    depth = (block.depth - near) / max(far - near, 1e-6)
    parts = [_positions(_cube(block.tracks[..., axis], block.shape), quantum) for axis in (0, 1)]
    parts.append(np.packbits(_cube(block.visible, block.shape), bitorder="little").tobytes())
    parts += [_levels(_cube(values, block.shape)) for values in (depth, block.score)]
    return zlib.compress(b"".join(parts), 6)  # 9 is ten times slower for 7% less


def coarsest_quantum(size: tuple[int, int], quantum: float) -> float:
    """`quantum`, doubled until int16 holds positions up to one frame side outside a frame of `size` (H, W)."""
    while 2 * max(size) / quantum > 32_767:
        quantum *= 2
    return quantum


def _cube(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`(h * w, T)` as `(T, h, w)`."""
    return np.ascontiguousarray(values.T).reshape(-1, *shape)


def _positions(values: np.ndarray, quantum: float) -> bytes:
    whole = np.rint(np.nan_to_num(values) / quantum).clip(-32_767, 32_767).astype(np.int16)
    change = np.diff(np.diff(whole, axis=0, prepend=np.int16(0)), axis=2, prepend=np.int16(0))  # int16 wraps around
    zigzag = ((change << 1) ^ (change >> 15)).view(np.uint16)
    return (zigzag & 255).astype(np.uint8).tobytes() + (zigzag >> 8).astype(np.uint8).tobytes()


def _levels(values: np.ndarray) -> bytes:
    whole = np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    return np.diff(whole, axis=0, prepend=np.uint8(0)).tobytes()
