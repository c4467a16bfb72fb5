"""Dense Inverse Search optical flow (Kroeger et al., ECCV 2016) as OpenCV implements it: the default flow, no weights.

Measured on the bear clip at 256x256 against its human joint annotations (share of joints within 4 px, two cores):
- the medium preset stops at half resolution. Going on to the full one (finest scale 0) lifts direct flow from 0.39 to
  0.42 and flow chained over adjacent frames from 0.41 to 0.47, at 30 ms instead of 9 ms a flow;
- a weaker smoothness term (alpha 5 for 20) lifts chained flow to 0.55 at no cost; larger patches lose everywhere;
- for adjacent frames, doubling the image first lifts chained flow to 0.57. Every chain walks along adjacent flows, and
  there are few of them, so they get this (`CLOSE_SIDE`); for distant frames it costs five times as much for 0.01;
- starting from a chained flow does not help: refined flow of distant frames is worse (0.48) than the chain itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np

SIDE = 256        # shorter side of the images that flow is computed at
CLOSE_SIDE = 512  # the same for adjacent frames
MAX_ZOOM = 2      # larger zooms invent no detail


class DisFlow:
    """`(image_a, image_b) -> flow`: two `(H, W, 3)` uint8 images to `(H, W, 2)` float32 pixels from a to b.

    close: the frames are adjacent, spend more on them. Safe to call from several threads."""

    def __init__(self, close: bool = False):
        self.side, self.max_zoom = (CLOSE_SIDE, MAX_ZOOM) if close else (SIDE, 1)

    def __call__(self, image_a: np.ndarray, image_b: np.ndarray) -> np.ndarray:
        H, W = image_a.shape[:2]
        zoom = min(self.max_zoom, self.side / min(H, W))
        height, width = max(round(H * zoom), 16), max(round(W * zoom), 16)  # DIS needs room for its patches
        with _without_ipp():
            a, b = (self._gray(image, width, height) for image in (image_a, image_b))
            flow = self._search().calc(a, b, None)
            if (height, width) == (H, W):
                return flow
            flow = cv2.resize(flow, (W, H), interpolation=cv2.INTER_AREA if zoom > 1 else cv2.INTER_LINEAR)
        return flow * np.array([W / width, H / height], np.float32)

    @staticmethod
    def _gray(image: np.ndarray, width: int, height: int) -> np.ndarray:
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        shrinks = width < image.shape[1]
        return cv2.resize(gray, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)

    @staticmethod
    def _search() -> cv2.DISOpticalFlow:
        search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        search.setFinestScale(0)
        search.setVariationalRefinementAlpha(5.0)
        return search


@contextmanager
def _without_ipp() -> Iterator[None]:
    """Within it OpenCV computes with its own code. Intel's IPP, which it calls otherwise, rounds by the processor and
    does not promise the same bits for arrays that lie elsewhere in memory; DIS can turn a last bit into a pixel. The
    switch is one of each thread."""
    before = cv2.ipp.useIPP()
    cv2.ipp.setUseIPP(False)
    try:
        yield
    finally:
        cv2.ipp.setUseIPP(before)
