"""Writing of correspondence stores, whose bytes loaders/correspondence_format.py describes.

Notation
    T, H, W  frames, height, width
    (i, j)   ordered pair of frames; its correspondences start at the pixels of frame i and end in frame j
    part     file of one written pair in `parts/`, until the pairs of a source frame are packed into its row file

`unfinished.json` is written first and renamed to `meta.json` when the store is finished.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import atomic_path, write_text
from loaders.correspondence_format import (
    ALIGN,
    MAX_FLOW,
    STEPS,
    DensePair,
    PairIndex,
    Row,
    as_images,
    block_bytes,
    checkerboard_parity,
    padded,
)
from loaders.correspondences import FOLDER, FORMAT, CorrespondenceStore, read_meta, row_path
from loaders.npy import read_npy, save_npy
from loaders.scenes import Scenes, one_scene, scenes_of_meta
from loaders.sequence import VideoSequence
from preprocessing.pair_selection import ordered_pairs

log = logging.getLogger(__name__)
OMITTED_SETTINGS = {"pairs": "all", "keep": "all", "find_scenes": True}  # values that meta.json leaves out
START_AGAIN = "run the same command without --resume"
REVISION = 3  # raised when the same frames and settings give other bytes: older unfinished stores are begun again


class StoreWriter:
    """Writes a store pair by pair, in any order and from several threads. A killed run can be resumed.

    sequence: its `correspondences` folder is written
    method:   what the store depends on besides the frames; goes to meta.json. With "keep" "half", the finished store
              has every other correspondence of the pairs that are not adjacent (a checkerboard)
    resume:   continue an unfinished store of the same frames, method, and revision; otherwise delete it and start again
    find:     finds the scenes, which also go to meta.json; a resumed store keeps those it has. None: one scene

    UserError if `resume` is set and the unfinished store is of other frames or another method."""

    def __init__(self, sequence: VideoSequence, method: dict, resume: bool = False,
                 find: Callable[[], Scenes] | None = None):
        self.root = sequence.root / FOLDER
        self.size = sequence.size
        self.num_frames = len(sequence)
        self.half = method.get("keep") == "half"
        y, x = np.ogrid[:self.size[0], :self.size[1]]
        self._checkerboards = [(x + y + parity) % 2 == 0 for parity in (0, 1)]
        self._unfiltered = method.get("chain") is True  # these chains need all correspondences of direct flow
        self._parts = self.root / "parts"
        self._journal = self.root / "unfinished.json"
        meta = describe(sequence, method) | {"revision": REVISION}
        begun = read_meta(self._journal) if resume and self._journal.is_file() else None
        if begun and begun.get("revision") != REVISION:
            log.warning("%s was begun by another version: it is begun again", self.root)
            begun = None
        if begun:
            check_same(begun, meta, self._journal)
            self.scenes = scenes_of_meta(begun, self.num_frames, self._journal)
        else:
            shutil.rmtree(self.root, ignore_errors=True)
            self.scenes = find() if find else one_scene(self.num_frames)
            entry = {"scenes": self.scenes.as_dict()} if find else {}
            write_text(self._journal, json.dumps(meta | entry, indent=1))
        for leftover in self.root.rglob(".tmp-*"):
            leftover.unlink()

    def has(self, i: int, j: int) -> bool:
        """Whether the ordered pair is completely written. Parts are not flushed to the disk one by one, so a system
        crash may truncate them."""
        return self.has_row(i) or self._is_whole(self._part(i, j))

    def has_row(self, i: int) -> bool:
        """Whether source frame i is packed."""
        return row_path(self.root, i).is_file()

    def kept(self, i: int, j: int) -> np.ndarray | None:
        """The pixels `(H, W)` bool whose correspondences the finished store keeps; None: all."""
        return self._checkerboards[checkerboard_parity(i, j)] if self.half and abs(i - j) > 1 else None

    def kept_at_first(self, i: int, j: int) -> np.ndarray | None:
        """The pixels whose correspondences are kept until the store is finished; None: all, since chains need them."""
        return None if self._unfiltered or j in self._links(i) else self.kept(i, j)

    def write(self, i: int, j: int, flow: np.ndarray, cycle: np.ndarray, occlusion: np.ndarray,
              every_pixel: bool = True) -> None:
        """Keep the pair's flow `(H, W, 2)` pixels and flags `(H, W)` bool, where `kept_at_first`.

        every_pixel: of adjacent frames keep pixels without a flag too."""
        adjacent = every_pixel and abs(i - j) == 1
        block = encode(flow, *_only((cycle, occlusion), self.kept_at_first(i, j)), every_pixel=adjacent)
        with atomic_path(self._part(i, j), sync=False) as temporary, open(temporary, "wb") as file:
            file.write(pad(np.array([block.stored, block.valid], np.int64).tobytes()))
            file.write(block.data)
            if adjacent:  # chains add up this flow, so it is also kept without round-off until the store is finished
                file.write(np.ascontiguousarray(flow, np.float32))

    def dense(self, i: int, j: int) -> DensePair:
        """A direct pair that was written and, unless it is a link of chains, whose row is not packed yet. The flow of
        adjacent frames has no round-off."""
        stored, data, exact = self._read(self._part(i, j))
        pair = as_images(PairIndex(data, 0, stored, self.size).decode(), self.size)
        if len(exact):
            pair.flow = exact.view(np.float32).reshape(*self.size, 2)
        return pair

    def scratch(self, name: str) -> Path:
        """A folder for temporary files; it is deleted when the store is finished."""
        return self._parts / name

    def used_bytes(self) -> int:
        """Bytes that the unfinished store takes on the disk."""
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())

    def keep_start(self, i: int, j: int, start: np.ndarray) -> None:
        """Write what the flow of the next farther pair starts from (warm start). Call it before `write` of (i, j)."""
        save_npy(self._start(i, j), start, sync=False)

    def start(self, i: int, j: int) -> np.ndarray:
        """What `keep_start` wrote for a pair. UserError if it is missing or damaged."""
        return read_npy(self._start(i, j), START_AGAIN)

    def drop_starts(self, interval: int) -> None:
        """Delete what `keep_start` wrote for the pairs `interval` frames apart."""
        for i in range(self.num_frames):
            for j in (i - interval, i + interval):
                self._start(i, j).unlink(missing_ok=True)

    def targets(self, i: int) -> list[int]:
        """Frames j for which (i, j) is written and whose row is not packed yet, ascending."""
        return sorted(int(path.stem) for path in self._part(i, 0).parent.glob("[0-9]*.pair"))

    def block(self, i: int, j: int, flow: np.ndarray, cycle: np.ndarray, occlusion: np.ndarray) -> "Block":
        """A pair of frames that are not adjacent as the finished store has it. Arguments as of `write`."""
        return encode(flow, *_only((cycle, occlusion), self.kept(i, j)), every_pixel=False)

    def pack(self, i: int, chained: dict[int, "Block"] | None = None) -> None:
        """Turn the parts of source frame i into its row file; only one part is in memory at a time.

        chained: blocks of target frames that take the place of the written parts"""
        chained = chained or {}
        targets = self.targets(i)
        count_map = np.zeros(self.size[0] * self.size[1], np.uint16)
        heads = [(j, 0, 0) for j in targets]
        with atomic_path(row_path(self.root, i)) as temporary, open(temporary, "wb") as file:
            file.write(row_header(heads))  # placeholder; the counts are known at the end
            for k, j in enumerate(targets):
                block = chained.get(j)
                if block is None:
                    stored, data, _ = self._read(self._part(i, j))
                    if self.kept(i, j) is not None and self.kept_at_first(i, j) is None:
                        pair = as_images(PairIndex(data, 0, stored, self.size).decode(), self.size)
                        block = self.block(i, j, pair.flow, pair.cycle, pair.occlusion)
                if block is not None:
                    stored = block.stored
                    data = np.frombuffer(block.data, np.uint8)
                index = PairIndex(data, 0, stored, self.size)
                count_map += index.valid_pixels()
                heads[k] = (j, stored, index.valid)
                file.write(data)
            file.write(count_map)
            file.seek(0)
            file.write(row_header(heads))
        links = self._links(i)  # which chains of other rows still need
        for path in self._part(i, 0).parent.iterdir():
            if int(path.stem) not in links:
                path.unlink()

    def finish(self, wanted: Iterable[tuple[int, int]] = ()) -> None:
        """Pack what is not packed yet and turn the folder into a finished store.

        UserError if it lacks one of the ordered pairs `wanted`."""
        for i in range(self.num_frames):
            if not self.has_row(i):
                self.pack(i)
        rows = [Row(row_path(self.root, i), self.size) for i in range(self.num_frames)]
        check_pairs(self.root, {(i, j) for i, row in enumerate(rows) for j in row.targets.tolist()}, wanted)
        shutil.rmtree(self._parts, ignore_errors=True)
        self._journal.replace(self.root / "meta.json")

    def _links(self, i: int) -> set:
        """The frames to which frame i has a link of chains."""
        return {i - 1, i + 1, self.scenes.next(i, -1), self.scenes.next(i, 1)}

    def _part(self, i: int, j: int) -> Path:
        return self._parts / f"{i:05d}" / f"{j:05d}.pair"

    def _start(self, i: int, j: int) -> Path:
        return self.scratch("starts") / f"{i:05d}_{j:05d}.npy"

    def _is_whole(self, path: Path) -> bool:
        """Whether a part exists and has the length that its header implies, with or without exact flow."""
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            stored = int.from_bytes(file.read(8), "little")
        pixels = self.size[0] * self.size[1]
        exact_flow = path.stat().st_size - ALIGN - block_bytes(stored, self.size)  # bytes after the block
        return stored <= pixels and exact_flow in (0, 8 * pixels)

    def _read(self, path: Path) -> tuple[int, np.ndarray, np.ndarray]:
        """Number of stored pixels, bytes of the block, and bytes of the exact flow, if any. UserError if damaged."""
        if not self._is_whole(path):
            raise UserError(f"{path} is missing or damaged: {START_AGAIN}")
        data = np.fromfile(path, np.uint8)
        stored = int(data[:8].view(np.int64)[0])
        end = ALIGN + block_bytes(stored, self.size)
        return stored, data[ALIGN:end], data[end:]


def finished_store(sequence: VideoSequence, method: dict, chosen: dict[int, int]) -> CorrespondenceStore | None:
    """The sequence's store if there is a finished one. UserError if it is of other frames or another method, or lacks
    pairs of the `intervals` `chosen`."""
    meta = sequence.root / FOLDER / "meta.json"
    if not meta.is_file():
        return None
    check_same(read_meta(meta), describe(sequence, method), meta)
    content = read_meta(meta)
    store = CorrespondenceStore(meta.parent, content, len(sequence))
    scenes = scenes_of_meta(content, len(sequence), meta)
    check_pairs(meta.parent, set(map(tuple, store.pairs.tolist())), ordered_pairs(chosen, scenes))
    log.info("%s is finished already: left as it is", meta.parent)
    return store


def check_pairs(root: Path, present: set[tuple[int, int]], wanted: Iterable[tuple[int, int]]) -> None:
    """UserError if a store in `root` lacks some of the ordered pairs `wanted`."""
    wanted = list(wanted)
    missing = [pair for pair in wanted if pair not in present]
    if missing:
        raise UserError(f"{root} lacks {len(missing)} of {len(wanted)} pairs, first {missing[0]}: delete that folder "
                        "and run the same command again")


def describe(sequence: VideoSequence, method: dict) -> dict:
    """The content of meta.json: the frames, and the `method` (names and thresholds)."""
    return json.loads(json.dumps({  # tuples become lists, as when the file is read
        "format": FORMAT, "size": sequence.size, "names": sequence.names, "hashes": sequence.hashes,
        "method": method}))


def check_same(old: dict, new: dict, path: Path) -> None:
    """UserError naming what differs between two metas: frames, size, or a setting."""
    advice = "delete that folder, or give the same settings"
    if old["names"] != new["names"] and sorted(old["names"]) == sorted(new["names"]):
        raise UserError(f"{path} has the frames in another order (before, names were sorted as text: 1, 10, 2; now as "
                        "numbers: 1, 2, 10): delete that folder")
    for key, name in (("size", "frame size"), ("names", "frame names"), ("hashes", "frame contents")):
        if old[key] != new[key]:
            raise UserError(f"{path} was made with another {name}: {advice}")
    if old["method"].get("flow_frames") != new["method"].get("flow_frames"):  # hashes
        raise UserError(f"{path} was made from other images (flow_frames/, --flow_frames): {advice}")
    for key in sorted(old["method"].keys() | new["method"].keys()):
        a, b = (meta["method"].get(key, OMITTED_SETTINGS.get(key)) for meta in (old, new))
        if a != b:
            raise UserError(f"{path} was made with {key} {a}, now it is {b}: {advice}")


@dataclass
class Block:
    """An encoded pair; `valid` counts its pixels with exactly one of the flags."""
    stored: int
    valid: int
    data: bytes


def encode(flow: np.ndarray, cycle: np.ndarray, occlusion: np.ndarray, every_pixel: bool) -> Block:
    """Flow `(H, W, 2)` pixels and flags `(H, W)` as a block. Flow that is not finite or too large loses its flags."""
    if not -MAX_FLOW <= flow.min() <= flow.max() <= MAX_FLOW:  # also if a value is not finite
        in_range = (np.abs(np.nan_to_num(flow, nan=np.inf)) <= MAX_FLOW).all(axis=-1)
        cycle = cycle & in_range
        occlusion = occlusion & in_range
        flow = np.nan_to_num(flow).clip(-MAX_FLOW, MAX_FLOW)
    stored = flow.reshape(-1, 2) if every_pixel else flow[cycle | occlusion]
    q = np.rint(stored * np.float32(STEPS)).astype(np.int16)  # (n, 2)
    sections = (np.packbits(cycle).tobytes(), np.packbits(occlusion).tobytes(), q.tobytes())
    return Block(len(q), int((cycle ^ occlusion).sum()), b"".join(map(pad, sections)))


def _only(flags: tuple[np.ndarray, np.ndarray], kept: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Flags `(H, W)` of the pixels `kept` `(H, W)`; None: of all."""
    return flags if kept is None else tuple(flag & kept for flag in flags)


def row_header(table: list[tuple[int, int, int]]) -> bytes:
    """Header of a row file from its (target frame, stored, valid) in ascending order."""
    return pad(np.array([len(table), *np.ravel(table)], np.int64).tobytes())


def pad(section: bytes) -> bytes:
    """`section` with zeros up to a multiple of ALIGN."""
    return section.ljust(padded(len(section)), b"\0")
