"""Reading of correspondence stores (docs/method.md); preprocessing/correspondence_writer.py writes them.

Notation
    T, H, W  frames, height, width
    P        ordered pairs of frames in the store
    (i, j)   ordered pair of frames; its correspondences map pixels of frame i to points in frame j
    valid    cycle-consistent, or occluded in frame j with a reliable position

`seq/correspondences/meta.json` is written last; a store without it is incomplete.
"""

from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import read_json
from loaders.correspondence_format import DensePair, PairIndex, Row, StoredPair, as_images
from loaders.images import size_text
from loaders.omnimotion_layout import OmniMotionFolder, has_omnimotion_layout
from loaders.sequence import VideoSequence

FOLDER = "correspondences"
FORMAT = 1  # version of the file format
ADVICE = "delete its folder and run `python -m preprocessing` again"
MAX_FB = 1.0  # pixels; chains of adjacent flow end where the forward-backward error is larger


class CorrespondenceStore:
    """Memory-mapped correspondences of the first `num_frames` frames; several threads may read it."""

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
        """Correspondences from frame i to frame j, without tentative ones; KeyError if the pair is not in `pairs`."""
        return self._rows[i].pair(j).without_tentative()

    def index(self, i: int, j: int) -> PairIndex:
        """Correspondences from frame i to frame j, also tentative ones, for lookup of single pixels. KeyError as in
        `stored`."""
        return self._rows[i].index(j)

    def dense(self, i: int, j: int) -> DensePair:
        """Correspondences from frame i to frame j, without tentative ones, as images. KeyError as in `stored`."""
        return as_images(self.stored(i, j), self.size)

    def count_map(self, i: int) -> np.ndarray:
        """Number of valid correspondences of each pixel of frame i over all target frames `(H, W)` uint16."""
        return self._rows[i].count_map()


def open_correspondences(sequence: VideoSequence):
    """The sequence's CorrespondenceStore, or else its correspondences in OmniMotion's layout (same interface).

    UserError if there is neither, if the store is incomplete, or if it was made for other frames."""
    root = sequence.root / FOLDER
    if (root / "meta.json").is_file():
        meta = read_meta(root / "meta.json")
        check_frames(meta, sequence, root / "meta.json")
        return CorrespondenceStore(root, meta, len(sequence))
    if (root / "unfinished.json").is_file():
        raise UserError(f"{root} is unfinished: run the same `python -m preprocessing` command with --resume")
    if has_omnimotion_layout(sequence.root):
        return OmniMotionFolder(sequence)
    raise UserError(f"no correspondences in {sequence.root}: run `python -m preprocessing --data_dir {sequence.root}`")


def check_adjacent_flow(store) -> None:
    """UserError unless adjacent frames have flow at every pixel (checked for frames 0 and 1).

    Stores made from point tracks do not have it."""
    H, W = store.size
    if not (store.pairs == (0, 1)).all(axis=1).any() or store.index(0, 1).count != H * W:
        raise UserError(f"the correspondences in {store.root} have no flow of every pixel between adjacent frames, as "
                        "those that are made of tracks: make them with --flow dis or raft")


def read_meta(path: Path) -> dict:
    """Read the meta.json of a store. UserError if it is damaged or has another format version."""
    meta = read_json(path, ADVICE)
    if meta.get("format") != FORMAT:
        raise UserError(f"{path} is of another format than {FORMAT}: delete its folder and run preprocessing again")
    size, texts = meta.get("size"), [meta.get("names"), meta.get("hashes")]
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
            and all(isinstance(text, list) and text and all(isinstance(x, str) for x in text) for text in texts)
            and len(texts[0]) == len(texts[1]) and isinstance(meta.get("method"), dict)):
        raise UserError(f"{path} is damaged: {ADVICE}")
    return meta


def check_frames(meta: dict, sequence: VideoSequence, path: Path) -> None:
    """UserError unless the frames of the sequence are the first frames of the store, or all of them."""
    T, again = len(sequence), "delete that folder and run `python -m preprocessing` again"
    if tuple(meta["size"]) != sequence.size:
        raise UserError(f"{path} was made for frames of {size_text(meta['size'])}, these are "
                        f"{size_text(sequence.size)}: {again}")
    if meta["names"] != list(sequence.names) and sorted(meta["names"]) == sorted(sequence.names):
        raise UserError(f"{path} has the frames in another order (before, names were sorted as text: 1, 10, 2; now as "
                        f"numbers: 1, 2, 10): {again}")
    if meta["names"][:T] != list(sequence.names):
        raise UserError(f"{path} was made for other frames ({len(meta['names'])}, {meta['names'][0]} to "
                        f"{meta['names'][-1]}; here {T}, {sequence.names[0]} to {sequence.names[-1]}): {again}")
    changed = [name for name, a, b in zip(sequence.names, meta["hashes"], sequence.hashes, strict=False) if a != b]
    if changed:
        raise UserError(f"{path} was made for other frames: {len(changed)} changed since, first {changed[0]}: {again}")


def row_path(root: Path, i: int) -> Path:
    """Path of the row file of source frame i."""
    return root / f"{i:05d}.row"
