"""Optical flow by name.

A flow model encodes a frame once and then finds the flow between encoded frames, so that what a frame's pairs share is
not computed again for each. Callable from several threads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

Encoding = tuple[np.ndarray, ...]


class FlowModel(Protocol):
    """What the pipeline needs of optical flow."""
    settings: dict  # what the flow depends on besides the images; goes to meta.json
    warm: bool      # whether a pair starts from the pair before it (the same source frame, a nearer target)
    batch: int      # pairs a call
    spill: bool     # whether an encoding is worth keeping on the disk

    def working_bytes(self, size: tuple[int, int]) -> int:
        """Memory of a call for frames of `size` (H, W)."""

    def encode(self, image: np.ndarray) -> Encoding:
        """A frame `(H, W, 3)` uint8 RGB as `flow` wants it."""

    def flow(self, a: list[Encoding], b: list[Encoding], starts: list[np.ndarray | None],
             close: bool) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """From each of a to each of b: (flow `(H, W, 2)` float32 pixels, start of the pair after it).

        close: the frames are adjacent. Every chain is made of adjacent flows and there are few of them, so a model may
        spend more on them."""


@dataclass(frozen=True)
class ModelOptions:
    """Where models come from and how they run."""
    device: str = "cpu"
    weights: str = ""            # file name of RAFT's weights; empty: the best that is in weights_dir
    weights_dir: Path | None = None
    offline: bool = False
    iterations: int = 20
    correlation: str = "auto"    # all_pairs where memory allows it, else on_demand
    precision: str = "float32"
    warm: bool = True
    batch: int = 8               # pairs at a time on CUDA
    feature_model: str = ""      # another DINO or DINOv2, of the hub or in a folder
    feature_side: int = 480      # shorter side of the image that DINO describes


class _Dis:
    """DIS beside what the pipeline wants of a flow model; its encoding is the frame itself."""
    settings, warm, batch, spill = {}, False, 1, False

    def __init__(self):
        from third_party.dis import DisFlow

        self.estimators = {close: DisFlow(close) for close in (False, True)}

    def working_bytes(self, size: tuple[int, int]) -> int:
        return 60 * max(size[0] * size[1], 512 * 512)

    def encode(self, image: np.ndarray) -> Encoding:
        return (image,)

    def flow(self, a, b, starts, close):
        return [(self.estimators[close](image_a, image_b), None) for (image_a,), (image_b,) in zip(a, b, strict=True)]


def _dis(options: ModelOptions, size: tuple[int, int], memory: int) -> FlowModel:
    return _Dis()


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
    full = model("all_pairs")
    return full if options.device == "cuda" or full.working_bytes(size) <= memory else model("on_demand")


# (options, frame size (H, W), bytes of memory for a call) -> model
FLOW_MODELS: dict[str, Callable[[ModelOptions, tuple[int, int], int], FlowModel]] = {"dis": _dis, "raft": _raft}
