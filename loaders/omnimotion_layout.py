"""Correspondences in OmniMotion's folder layout, with the interface of loaders/correspondences.py.

A and B are file names in color/.
raft_exhaustive/A_B.npy  (H, W, 2) float flow from frame A to frame B, pixels
raft_masks/A_B.png       channel 0: cycle-consistent; channel 1: occluded in B with a reliable position
count_maps/A.png         (H, W) uint16 number of valid correspondences of each pixel
flow_stats.json          {A: {B: number of valid correspondences}}
"""

from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import read_json
from loaders.correspondence_format import MAX_FLOW, STEPS, DensePair, StoredPair, as_images
from loaders.images import read_image, read_levels
from loaders.npy import map_npy
from loaders.sequence import VideoSequence

ADVICE = "process the sequence again"


def has_omnimotion_layout(root: Path) -> bool:
    """Whether the sequence folder has correspondences in OmniMotion's layout."""
    return (root / "flow_stats.json").is_file() and (root / "raft_exhaustive").is_dir()


class OmniMotionFolder:
    """Correspondences of a sequence folder in OmniMotion's layout; the interface of CorrespondenceStore.

    UserError if flow_stats.json does not match the frames. When a pair is read, UserError if a file is missing, damaged
    or has the wrong shape."""

    def __init__(self, sequence: VideoSequence):
        self.root, self.size, self.num_frames = sequence.root, sequence.size, len(sequence)
        self.max_pixels = sequence.max_pixels
        self.names, self.meta = sequence.names, {"layout": "omnimotion", "size": list(sequence.size)}
        path = self.root / "flow_stats.json"
        stats = read_json(path, ADVICE)
        try:
            counts = [[int(stats.get(a, {}).get(b, 0)) for b in self.names] for a in self.names]
            self.counts = np.array(counts, np.int64)  # (T, T)
        except (ValueError, AttributeError, TypeError, OverflowError) as error:
            raise UserError(f"{path} is damaged: {ADVICE}") from error
        if self.counts.min() < 0 or self.counts.max() > np.prod(self.size):
            raise UserError(f"{path} counts {self.counts.min()} to {self.counts.max()} correspondences in frames of "
                            f"{np.prod(self.size)} pixels: {ADVICE}")
        if not self.counts.any():
            raise UserError(f"{path} has no pair of the frames in {self.root / 'color'}: {ADVICE}")
        known = [(i, j) for i, a in enumerate(self.names) for j, b in enumerate(self.names) if b in stats.get(a, {})]
        self.pairs = np.array(known, np.int64)  # (P, 2)

    def stored(self, i: int, j: int) -> StoredPair:
        """Correspondences from frame i to frame j: all pixels if the frames are adjacent, else the valid pixels.

        Pixels whose flow is not finite are not valid. A pixel with both masks is cycle-consistent."""
        name = f"{self.names[i]}_{self.names[j]}"
        masks = read_image(self.root / "raft_masks" / f"{name}.png", self.max_pixels) > 0  # (H, W, 3)
        flow = map_npy(self.root / "raft_exhaustive" / f"{name}.npy", ADVICE)
        if masks.shape[:2] != self.size or flow.shape != (*self.size, 2):
            raise UserError(f"flow or mask {name} in {self.root} is not of the frames' size: {ADVICE}")
        finite = np.isfinite(flow).all(axis=-1).ravel()
        cycle = masks[..., 0].ravel() & finite
        occlusion = masks[..., 1].ravel() & finite & ~cycle
        pixels = np.arange(cycle.size) if abs(i - j) == 1 else np.flatnonzero(cycle | occlusion)
        if self.counts[i, j] and not len(pixels):
            raise UserError(f"{name} in {self.root / 'raft_masks'} has no valid pixel, flow_stats.json says otherwise: "
                            f"{ADVICE}")
        flow = np.nan_to_num(flow.reshape(-1, 2)[pixels]).clip(-MAX_FLOW, MAX_FLOW)
        return StoredPair(pixels, np.rint(flow * STEPS).astype(np.int16), cycle[pixels], occlusion[pixels])

    def index(self, i: int, j: int) -> StoredPair:
        """Same as `stored`: this layout has no lookup of single pixels."""
        return self.stored(i, j)

    def dense(self, i: int, j: int) -> DensePair:
        """Correspondences from frame i to frame j as images."""
        return as_images(self.stored(i, j), self.size)

    def count_map(self, i: int) -> np.ndarray:
        """Number of valid correspondences of each pixel of frame i over all target frames `(H, W)` uint16."""
        path = self.root / "count_maps" / Path(self.names[i]).with_suffix(".png")
        levels = read_levels(path, self.max_pixels)
        if levels.shape != self.size:
            raise UserError(f"{path} is not of the frames' size: {ADVICE}")
        return levels
