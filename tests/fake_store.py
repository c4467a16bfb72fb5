"""Correspondence stores of motion that is known in closed form, without pictures and without files."""

import numpy as np

from loaders.correspondence_format import STEPS, StoredPair, checkerboard_parity


class FakeStore:
    """What tests need of a correspondence store; subclasses define `dense`. All pairs of frames are there.

    stored: "all" pixels, or "half" of those of pairs that are not adjacent, on one color of a checkerboard."""

    def __init__(self, size, num_frames):
        self.size = size
        self.num_frames = num_frames
        self.counts = 1 - np.eye(num_frames, dtype=int)
        self.stored = "all"

    @property
    def pairs(self):
        return np.argwhere(self.counts)

    def index(self, i, j):
        """As in the store. Invalid flow is random."""
        pair, noise = self.dense(i, j), np.random.default_rng(i)
        flow = np.where(pair.cycle[..., None], pair.flow, noise.uniform(-20, 20, pair.flow.shape))
        half = self.stored == "half" and abs(i - j) > 1
        kept = (np.indices(self.size).sum(0) + checkerboard_parity(i, j)) % 2 == 0 if half else np.ones(self.size, bool)
        pixels = np.flatnonzero(kept)
        return StoredPair(pixels, np.rint(flow.reshape(-1, 2)[pixels] * STEPS).astype(np.int16),
                          pair.cycle.ravel()[pixels], pair.occlusion.ravel()[pixels])
