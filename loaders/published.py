"""OmniMotion's published folder layout, read with the interface of our store (loaders/store.py).

raft_exhaustive/A_B.npy  (H, W, 2) float flow from frame A to frame B, pixels; A and B are file names of color/
raft_masks/A_B.png       channel 0: cycle-consistent, channel 1: occluded but reliable
count_maps/A.png         (H, W) uint16 number of valid correspondences of each pixel
flow_stats.json          {A: {B: number of valid correspondences}}
"""

import json
from pathlib import Path

import cv2
import numpy as np

from errors import UserError
from loaders.sequence import VideoSequence, read_image
from loaders.store_format import MAX_FLOW, STEPS, DensePair, StoredPair, as_images


def is_published(root: Path) -> bool:
    """Whether the sequence folder has correspondences in OmniMotion's layout."""
    return (root / "flow_stats.json").is_file() and (root / "raft_exhaustive").is_dir()


class PublishedFolder:
    """Correspondences of a sequence folder in OmniMotion's layout; the interface of CorrespondenceStore.

    UserError if flow_stats.json does not fit the frames, or, when a pair is read, if a file is missing or misshapen."""

    def __init__(self, sequence: VideoSequence):
        self.root, self.size, self.num_frames = sequence.root, sequence.size, len(sequence)
        self.names, self.meta = sequence.names, {"layout": "omnimotion", "size": list(sequence.size)}
        path = self.root / "flow_stats.json"
        try:
            stats = json.loads(path.read_text())
            counts = [[int(stats.get(a, {}).get(b, 0)) for b in self.names] for a in self.names]
            self.counts = np.array(counts, np.int64)  # (T, T)
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{path} is damaged: process the sequence again") from error
        if not self.counts.any():
            raise UserError(f"{path} has no pair of the frames in {self.root / 'color'}: process the sequence again")
        known = [(i, j) for i, a in enumerate(self.names) for j, b in enumerate(self.names) if b in stats.get(a, {})]
        self.pairs = np.array(known, np.int64)  # (P, 2)

    def stored(self, i: int, j: int) -> StoredPair:
        """Correspondences from frame i to frame j: all pixels of adjacent frames, else the valid ones."""
        name = f"{self.names[i]}_{self.names[j]}"
        masks = read_image(self.root / "raft_masks" / f"{name}.png") > 0  # (H, W, 3)
        flow = self._flow(self.root / "raft_exhaustive" / f"{name}.npy")
        if masks.shape[:2] != self.size or flow.shape != (*self.size, 2):
            raise UserError(f"flow or mask {name} in {self.root} is not of the frames' size: process it again")
        cycle, occlusion = masks[..., 0].ravel(), masks[..., 1].ravel()
        pixels = np.arange(cycle.size) if abs(i - j) == 1 else np.flatnonzero(cycle | occlusion)
        flow = flow.reshape(-1, 2)[pixels].clip(-MAX_FLOW, MAX_FLOW)
        return StoredPair(pixels, np.rint(flow * STEPS).astype(np.int16), cycle[pixels], occlusion[pixels])

    def dense(self, i: int, j: int) -> DensePair:
        """The same as images."""
        return as_images(self.stored(i, j), self.size)

    def count_map(self, i: int) -> np.ndarray:
        """Number of valid correspondences of each pixel of frame i over all target frames `(H, W)` uint16."""
        path = self.root / "count_maps" / Path(self.names[i]).with_suffix(".png")
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) if path.is_file() else None
        if image is None or image.shape != self.size:
            raise UserError(f"{path} is missing or not of the frames' size: process the sequence again")
        return image.astype(np.uint16)

    def _flow(self, path: Path) -> np.ndarray:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is missing or damaged: process the sequence again") from error
