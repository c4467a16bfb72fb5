"""Correspondence stores: what preprocessing found between the frames of a sequence (docs/method.md).

Notation
    T, H, W  frames, height, width
    (i, j)   ordered pair of frames; its correspondences start at the pixels of frame i and end in frame j
    valid    cycle-consistent, or occluded in j with a reliable position

`seq/correspondences/meta.json` is the last file that is written: a folder without it is an unfinished store.
"""

import json
import logging
import shutil
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import atomic_path, read_json, write_text
from loaders.correspondence_format import (
    ALIGN,
    DensePair,
    PairIndex,
    Row,
    StoredPair,
    as_images,
    block_bytes,
    decode,
    encode,
    flags,
    pad,
    row_header,
    thinned,
)
from loaders.npy import read_npy, save_npy
from loaders.sequence import VideoSequence

log = logging.getLogger(__name__)
FOLDER = "correspondences"
FORMAT = 1
AGAIN = "delete its folder and run `python -m preprocessing` again"
AFRESH = "run the same command without --resume"
MAX_FB = 1.0  # pixels; a larger forward-backward error breaks a chain of flow between adjacent frames


class CorrespondenceStore:
    """Memory-mapped correspondences of the first `num_frames` frames; safe to read from several threads."""

    def __init__(self, root: Path, meta: dict, num_frames: int):
        self.root, self.meta, self.num_frames = root, meta, num_frames
        self.size: tuple[int, int] = tuple(meta["size"])
        self._rows = [Row(row_path(root, i), self.size) for i in range(num_frames)]
        self.counts = np.zeros((num_frames, num_frames), np.int64)  # (T, T) valid correspondences
        for i, row in enumerate(self._rows):
            known = row.targets < num_frames
            self.counts[i, row.targets[known]] = row.valid[known]
        self.pairs = np.array([(i, j) for i, row in enumerate(self._rows) for j in row.targets if j < num_frames],
                              np.int64).reshape(-1, 2)  # (P, 2)

    def stored(self, i: int, j: int) -> StoredPair:
        """Correspondences from frame i to frame j; KeyError if the pair is not in `pairs`."""
        return self._rows[i].pair(j)

    def index(self, i: int, j: int) -> PairIndex:
        """The same, looked up pixel by pixel."""
        return self._rows[i].index(j)

    def dense(self, i: int, j: int) -> DensePair:
        """The same as images."""
        return as_images(self.stored(i, j), self.size)

    def count_map(self, i: int) -> np.ndarray:
        """Number of valid correspondences of each pixel of frame i over all target frames `(H, W)` uint16."""
        return self._rows[i].count_map()


def open_correspondences(sequence: VideoSequence):
    """The sequence's CorrespondenceStore, else its PublishedFolder (OmniMotion's layout; same interface).

    UserError if there is neither, if the store is unfinished, or if it was made for other frames."""
    from loaders.omnimotion_layout import PublishedFolder, is_published  # it needs this module's dataclasses

    root = sequence.root / FOLDER
    if (root / "meta.json").is_file():
        meta = read_meta(root / "meta.json")
        check_frames(meta, sequence, root / "meta.json")
        return CorrespondenceStore(root, meta, len(sequence))
    if (root / "unfinished.json").is_file():
        raise UserError(f"{root} is unfinished: run the same `python -m preprocessing` command with --resume")
    if is_published(sequence.root):
        return PublishedFolder(sequence)
    raise UserError(f"no correspondences in {sequence.root}: run `python -m preprocessing --data_dir {sequence.root}`")


def check_adjacent_flow(store) -> None:
    """UserError unless the store has the flow of every pixel between adjacent frames (stores made from point tracks do
    not have it)."""
    H, W = store.size
    if not (store.pairs == (0, 1)).all(axis=1).any() or store.index(0, 1).count != H * W:
        raise UserError(f"the correspondences in {store.root} have no flow of every pixel between adjacent frames, as "
                        "those that are made of tracks: make them with --flow dis or raft")


def finished_store(sequence: VideoSequence, method: dict) -> CorrespondenceStore | None:
    """The sequence's store if there is a finished one. UserError if it is of other frames or another method."""
    meta = sequence.root / FOLDER / "meta.json"
    if not meta.is_file():
        return None
    check_same(read_meta(meta), describe(sequence, method), meta)
    log.info("%s is finished already: left as it is", meta.parent)
    return CorrespondenceStore(meta.parent, read_meta(meta), len(sequence))


def describe(sequence: VideoSequence, method: dict) -> dict:
    """The content of meta.json: what the store was made of, and how (`method`: names and thresholds)."""
    return json.loads(json.dumps({  # tuples become lists, as they will be when it is read again
        "format": FORMAT, "size": sequence.size, "names": sequence.names, "hashes": sequence.hashes(),
        "method": method}))


def read_meta(path: Path) -> dict:
    """A store's meta.json. UserError if it is damaged or of another format."""
    meta = read_json(path, AGAIN)
    if meta.get("format") != FORMAT:
        raise UserError(f"{path} is of another format than {FORMAT}: delete its folder and run preprocessing again")
    size, texts = meta.get("size"), [meta.get("names"), meta.get("hashes")]
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
            and all(isinstance(text, list) and text and all(isinstance(x, str) for x in text) for text in texts)
            and len(texts[0]) == len(texts[1]) and isinstance(meta.get("method"), dict)):
        raise UserError(f"{path} is damaged: {AGAIN}")
    return meta


def check_frames(meta: dict, sequence: VideoSequence, path: Path) -> None:
    """UserError unless the sequence's frames are the store's, or its first ones."""
    T, again = len(sequence), "delete that folder and run `python -m preprocessing` again"
    if tuple(meta["size"]) != sequence.size:
        raise UserError(f"{path} was made for frames of {meta['size'][1]}x{meta['size'][0]}, "
                        f"these are {sequence.size[1]}x{sequence.size[0]}: {again}")
    if meta["names"][:T] != list(sequence.names):
        raise UserError(f"{path} was made for other frames ({len(meta['names'])}, {meta['names'][0]} to "
                        f"{meta['names'][-1]}; here {T}, {sequence.names[0]} to {sequence.names[-1]}): {again}")
    changed = [name for name, a, b in zip(sequence.names, meta["hashes"], sequence.hashes(), strict=False) if a != b]
    if changed:
        raise UserError(f"{path} was made for other frames: {len(changed)} changed since, first {changed[0]}: {again}")


def row_path(root: Path, i: int) -> Path:
    """File of source frame i."""
    return root / f"{i:05d}.row"


class StoreWriter:
    """Writes a store pair by pair, in any order and from several threads; what is written survives a kill.

    sequence: its `correspondences` folder is written
    method:   what the store depends on besides the frames; goes to meta.json. With "keep" "half", the finished store
              has every other correspondence of the pairs that are not adjacent (a checkerboard)
    resume:   go on with an unfinished store of the same frames and method; otherwise start afresh

    UserError if `resume` is set and the unfinished store is of other frames or another method."""

    def __init__(self, sequence: VideoSequence, method: dict, resume: bool = False):
        self.root, self.size, self.num_frames = sequence.root / FOLDER, sequence.size, len(sequence)
        self.half = method.get("keep") == "half"
        self._parts, self._journal = self.root / "parts", self.root / "unfinished.json"
        meta = describe(sequence, method)
        if resume and self._journal.is_file():
            check_same(read_meta(self._journal), meta, self._journal)
        else:
            shutil.rmtree(self.root, ignore_errors=True)
            write_text(self._journal, json.dumps(meta, indent=1))
        for leftover in self.root.rglob(".tmp-*"):
            leftover.unlink()

    def has(self, i: int, j: int) -> bool:
        """Whether the ordered pair is written, and whole: parts are not forced onto the disk one by one, so a machine
        that died may have left some of them short."""
        return self.has_row(i) or self._is_whole(self._part(i, j))

    def has_row(self, i: int) -> bool:
        """Whether source frame i is packed."""
        return row_path(self.root, i).is_file()

    def write(self, i: int, j: int, flow: np.ndarray, cycle: np.ndarray, occlusion: np.ndarray,
              chained: bool = False, every_pixel: bool = True) -> None:
        """Keep the pair's flow `(H, W, 2)` pixels and flags `(H, W)` bool. A chained version is kept beside the direct
        one and takes its place when the row is packed. every_pixel: of adjacent frames keep pixels without a flag
        too."""
        adjacent = every_pixel and abs(i - j) == 1
        block = encode(flow, cycle, occlusion, every_pixel=adjacent)
        with atomic_path(self._part(i, j, chained), sync=False) as temporary, open(temporary, "wb") as file:
            file.write(pad(np.array([block.stored, block.valid], np.int64).tobytes()))
            file.write(block.data)
            if adjacent:  # chains add these up: until the store is finished they are also kept without round-off
                file.write(np.ascontiguousarray(flow, np.float32))

    def dense(self, i: int, j: int) -> DensePair:
        """A direct pair that was written and, unless the frames are adjacent, whose row is not packed yet. The flow of
        adjacent frames has no round-off."""
        stored, data, exact = self._read(self._part(i, j))
        pair = as_images(decode(data, 0, stored, self.size), self.size)
        if len(exact):
            pair.flow = exact.view(np.float32).reshape(*self.size, 2)
        return pair

    def scratch(self, name: str) -> Path:
        """A folder for what is needed until the store is finished."""
        return self._parts / name

    def used_bytes(self) -> int:
        """What the unfinished store takes on the disk."""
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())

    def keep_start(self, i: int, j: int, start: np.ndarray) -> None:
        """Keep what the flow of the pair after (i, j) starts from; call it before the pair is written."""
        save_npy(self._start(i, j), start, sync=False)

    def start(self, i: int, j: int) -> np.ndarray:
        """What `keep_start` kept of a pair that is written. UserError if it is gone or damaged."""
        return read_npy(self._start(i, j), AFRESH)

    def drop_starts(self, interval: int | None) -> None:
        """Forget what was kept of the pairs `interval` apart."""
        for i in range(self.num_frames if interval else 0):
            for j in (i - interval, i + interval):
                self._start(i, j).unlink(missing_ok=True)

    def targets(self, i: int) -> list[int]:
        """Frames j for which (i, j) is written and whose row is not packed yet, ascending."""
        return sorted({int(path.stem) for path in self._part(i, 0).parent.glob("[0-9]*")})

    def pack(self, i: int) -> None:
        """Turn the parts of source frame i into its row file; only one part is in memory at a time."""
        chosen = [self._part(i, j, chained=True) for j in self.targets(i)]
        chosen = [path if path.is_file() else path.with_suffix(".pair") for path in chosen]
        count_map = np.zeros(self.size[0] * self.size[1], np.uint16)
        heads = [(int(path.stem), 0, 0) for path in chosen]
        with atomic_path(row_path(self.root, i)) as temporary, open(temporary, "wb") as file:
            file.write(row_header(heads))  # room for it; the numbers are known at the end
            for k, path in enumerate(chosen):
                j, stored, data = int(path.stem), *self._read(path)[:2]
                if self.half and abs(i - j) > 1:
                    block = thinned(data, 0, stored, self.size, i + j)
                    stored, data = block.stored, np.frombuffer(block.data, np.uint8)
                valid = np.logical_or(*flags(data, 0, self.size))
                count_map += valid
                heads[k] = (j, stored, int(valid.sum()))
                file.write(data)
            file.write(count_map)
            file.seek(0)
            file.write(row_header(heads))
        for path in self._part(i, 0).parent.iterdir():
            if abs(int(path.stem) - i) > 1:  # chains of other rows still walk along the adjacent pairs
                path.unlink()

    def finish(self) -> None:
        """Pack what is not packed yet and turn the folder into a finished store."""
        for i in range(self.num_frames):
            if not self.has_row(i):
                self.pack(i)
        shutil.rmtree(self._parts, ignore_errors=True)
        self._journal.replace(self.root / "meta.json")

    def _part(self, i: int, j: int, chained: bool = False) -> Path:
        return self._parts / f"{i:05d}" / f"{j:05d}.{'chained' if chained else 'pair'}"

    def _start(self, i: int, j: int) -> Path:
        return self.scratch("starts") / f"{i:05d}_{j:05d}.npy"

    def _is_whole(self, path: Path) -> bool:
        """Whether a part is there and as long as its header says, with or without exact flow."""
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            stored = int.from_bytes(file.read(8), "little")
        length, pixels = path.stat().st_size, self.size[0] * self.size[1]
        return stored <= pixels and length - ALIGN - block_bytes(stored, self.size) in (0, 8 * pixels)

    def _read(self, path: Path) -> tuple[int, np.ndarray, np.ndarray]:
        """Number of stored pixels, bytes of the block, and bytes of the exact flow, if any. UserError if damaged."""
        if not self._is_whole(path):
            raise UserError(f"{path} is missing or damaged: {AFRESH}")
        data = np.fromfile(path, np.uint8)
        stored = int(data[:8].view(np.int64)[0])
        end = ALIGN + block_bytes(stored, self.size)
        return stored, data[ALIGN:end], data[end:]


def check_same(old: dict, new: dict, path: Path) -> None:
    """UserError naming what differs between two metas: frames, size, or a setting."""
    again = "delete that folder, or give the same settings"
    for key, name in (("size", "frame size"), ("names", "frame names"), ("hashes", "frame contents")):
        if old[key] != new[key]:
            raise UserError(f"{path} was made with another {name}: {again}")
    for key in sorted(old["method"].keys() | new["method"].keys()):
        a, b = old["method"].get(key), new["method"].get(key)
        if a != b:
            raise UserError(f"{path} was made with {key} {a}, now it is {b}: {again}")
