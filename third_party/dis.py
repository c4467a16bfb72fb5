"""Dense Inverse Search optical flow (Kroeger et al., ECCV 2016) with OpenCV: the default flow, without weights.

How the settings were chosen: share of the bear clip's annotated joints (BADJA) that flow at 256x256 places within 4 px.
- OpenCV's medium preset stops at half resolution. Finest scale 0 (full resolution) raises direct flow from 0.39 to 0.42
  and flow chained over adjacent frames from 0.41 to 0.47; a flow takes 30 ms instead of 9 ms (two cores).
- A weaker smoothness term (alpha 5 instead of 20) raises chained flow to 0.55 at the same cost. Larger patches are
  worse in all tests.
- For adjacent frames, doubling the image size raises chained flow to 0.57 (`ADJACENT_SIDE`). All chains consist of the
  few flows between adjacent frames. For distant frames it raises direct flow by 0.01 at five times the cost.
- Starting the search from a chained flow does not help: the refined flow (0.48) is worse than the chain.
Against the ground truth of rendered clips at 256x256:
- Two instead of five iterations of the variational refinement are as good and take 10% less time. With one, and 8
  iterations of the search for adjacent frames, these clips are as good, but tracks of the bear and the demo are worse.
- For adjacent frames, a coarser grid of patches (stride 4 instead of 3) and 12 instead of 25 iterations of the search
  are as good (97% within 1/4 px in both) and take half the time. For distant frames they are worse.
"""

from math import prod
from threading import local

import cv2
import numpy as np

from common.opencv import without_ipp

SIDE = 256           # pixels of the shorter side at which flow is computed; smaller images are not enlarged
ADJACENT_SIDE = 512  # the same for adjacent frames, which may be enlarged
MAX_ZOOM = 2         # largest enlargement of adjacent frames
MIN_SIDE = 16        # pixels; OpenCV's DIS fails on smaller images
PIXEL_BYTES = 220    # memory of a search for each pixel, with its result (measured)


class DisFlow:
    """Flow between gray images. Safe to call from several threads.

    adjacent: use the slower, more accurate settings for adjacent frames."""

    def __init__(self, adjacent: bool = False):
        self.adjacent = adjacent
        self.side = ADJACENT_SIDE if adjacent else SIDE
        self.max_zoom = MAX_ZOOM if adjacent else 1
        self._searches = local()  # for each thread, a search object, which keeps its buffers

    def gray(self, image: np.ndarray) -> np.ndarray:
        """An image `(H, W, 3)` uint8 RGB in gray, at the size at which flow is computed: `(h, w)` uint8."""
        height, width = self.flow_size(image.shape[:2])
        shrinks = width < image.shape[1]
        with without_ipp():
            gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
            return cv2.resize(gray, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)

    def flow_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size (h, w) at which the flow of images of `size` (H, W) is computed."""
        zoom = min(self.max_zoom, self.side / min(size))
        height, width = (max(round(side * zoom), MIN_SIDE) for side in size)
        return height, width

    def working_bytes(self, size: tuple[int, int]) -> int:
        """Memory that a thread keeps for flow between images of `size` (H, W), in bytes."""
        return PIXEL_BYTES * prod(self.flow_size(size))

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Flow `(h, w, 2)` float32, in pixels, from a to b, two `(h, w)` uint8 gray images."""
        with without_ipp():
            if not hasattr(self._searches, "search"):
                self._searches.search = self._new_search()
            return self._searches.search.calc(a, b, None)

    def _new_search(self) -> cv2.DISOpticalFlow:
        search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        search.setFinestScale(0)
        search.setVariationalRefinementAlpha(5.0)
        search.setVariationalRefinementIterations(2)
        if self.adjacent:
            search.setPatchStride(4)
            search.setGradientDescentIterations(12)
        return search
