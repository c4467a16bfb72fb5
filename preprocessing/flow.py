"""Optical flow models, selected by name (`--flow`).

A model encodes each frame once and then computes the flow of pairs of encoded frames, so that the part of the work that
depends on one frame only is not repeated for every pair.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from common.opencv import without_ipp

Encoding = tuple[np.ndarray, ...]


class FlowModel(Protocol):
    """What the pipeline needs of an optical flow model. It is called from several threads."""
    settings: dict  # what the flow depends on besides the images; written to meta.json
    warm: bool      # whether a pair starts from the flow of the pair with the same source and the next nearer target
    batch: int      # pairs per call
    spill: bool     # whether encodings are written to a temporary folder instead of being computed again

    def working_bytes(self, size: tuple[int, int]) -> int:
        """Memory of a thread that calls `flow`, in bytes, for frames of `size` (H, W)."""

    def encode(self, image: np.ndarray) -> Encoding:
        """The encoding of a frame `(H, W, 3)` uint8 RGB."""

    def flow(self, a: list[Encoding], b: list[Encoding], starts: list[np.ndarray | None],
             close: bool) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Flow from a[k] to b[k] for each k, as (flow `(h, w, 2)` float32, start of the next pair). The model chooses
        the size (h, w) at which it sees the frames; flow is in pixels of that size.

        starts: for each pair, what the call for the pair before it returned as the start of the next, or None
        close:  whether the frames are adjacent. A model may spend more time on adjacent frames: there are few of these
                pairs, and all chains consist of them."""


@dataclass(frozen=True)
class ModelOptions:
    """Where models are loaded from and how they run."""
    device: str = "cpu"
    weights: str = ""            # file name of RAFT's weights; empty: the best file in weights_dir
    weights_dir: Path | None = None  # None: the user's cache
    offline: bool = False        # do not download
    iterations: int = 20         # of RAFT
    correlation: str = "auto"    # of RAFT: all_pairs, on_demand, or auto: all_pairs where memory allows it
    precision: str = "float32"   # of RAFT's networks
    warm: bool = True            # of RAFT: start from the flow of the pair before
    batch: int = 8               # pairs that RAFT computes per call on CUDA
    feature_model: str = ""      # another DINO or DINOv2 model: a name on the Hugging Face hub, or a folder
    feature_side: int = 480      # pixels of the shorter side of the image given to DINO


RESIZED_BYTES = 24  # for each pixel of a frame: flow in both directions at its size, and one before it is scaled


class _Dis:
    """DIS as a FlowModel. A frame is encoded as two gray images: for distant frames, and for adjacent ones."""
    warm = False
    batch = 1
    spill = False

    def __init__(self):
        from third_party.dis import DisFlow

        self.settings = {}
        self.estimators = DisFlow(adjacent=False), DisFlow(adjacent=True)

    def working_bytes(self, size: tuple[int, int]) -> int:
        resized = RESIZED_BYTES * size[0] * size[1]
        return resized + sum(estimator.working_bytes(size) for estimator in self.estimators)

    def encode(self, image: np.ndarray) -> Encoding:
        return tuple(estimator.gray(image) for estimator in self.estimators)

    def flow(self, a, b, starts, close):
        return [(self.estimators[close](x[close], y[close]), None) for x, y in zip(a, b, strict=True)]


def _raft(options: ModelOptions, size: tuple[int, int], memory: int) -> FlowModel:
    from preprocessing.pretrained import RAFT_FILES, find_weights
    from third_party.raft_flow import RaftFlow, RaftOptions

    path = find_weights([options.weights] if options.weights else RAFT_FILES, options.weights_dir, options.offline)
    batch = options.batch if options.device == "cuda" else 1

    def model(correlation: str) -> FlowModel:
        return RaftFlow(path, RaftOptions(options.iterations, correlation, options.precision, options.warm,
                                          options.device, batch))

    if options.correlation != "auto":
        return model(options.correlation)
    all_pairs = model("all_pairs")
    if options.device == "cuda" or all_pairs.working_bytes(size) <= memory:
        return all_pairs
    return model("on_demand")


# name -> function of (options, frame size (H, W), bytes of memory for one call) that loads the model
FLOW_MODELS: dict[str, Callable[[ModelOptions, tuple[int, int], int], FlowModel]] = {
    "dis": lambda options, size, memory: _Dis(), "raft": _raft}


def flow_between(model: FlowModel, image_a: np.ndarray, image_b: np.ndarray, adjacent: bool,
                 size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Flow from image a to b and from b to a, `(H, W, 2)` float32 pixels of frames of `size` (H, W); images
    `(H', W', 3)` uint8 RGB.

    Both directions are computed at the same time, on two threads."""
    a, b = model.encode(image_a), model.encode(image_b)
    with ThreadPoolExecutor(2) as pool:
        both = pool.map(lambda pair: model.flow([pair[0]], [pair[1]], [None], adjacent)[0][0], [(a, b), (b, a)])
    return tuple(resize_flow(flow, size) for flow in both)


def resize_flow(flow: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Flow `(h, w, 2)` in pixels of that size as flow `(H, W, 2)` in pixels of frames of `size` (H, W), float32."""
    h, w = flow.shape[:2]
    H, W = size
    if (h, w) == (H, W):
        return flow
    shrinks = H * W < h * w
    with without_ipp():
        flow = cv2.resize(flow, (W, H), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return flow * np.array([W / w, H / h], np.float32)
