"""Appearance features by name.

An extractor is `image -> features`: a frame `(H, W, 3)` uint8 RGB to `(h, w, c)`, whose corner features lie on the
frame's corner pixels; callable from several threads. Its `threshold` is the cosine similarity above which two
features may show the same point (0.5 for DINO, as in OmniMotion); `chain_threshold` is that for the ends of a trusted
chain, which did not lose the point while its look changed.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from preprocessing.flow import ModelOptions


class FeatureExtractor(Protocol):
    """What the appearance check needs."""
    threshold: float
    chain_threshold: float
    settings: dict  # what features depend on besides the images; goes to meta.json

    def __call__(self, image: np.ndarray) -> np.ndarray: ...


def _sift(options: ModelOptions) -> FeatureExtractor:
    from third_party.sift import DenseSift

    return DenseSift()


def _dino(kind: str) -> Callable[[ModelOptions], FeatureExtractor]:
    def load(options: ModelOptions) -> FeatureExtractor:
        from third_party.dino import MODELS, DinoFeatures

        return DinoFeatures(options.feature_model or MODELS[kind], options.weights_dir, options.offline,
                            options.feature_side, options.device)
    return load


FEATURE_EXTRACTORS: dict[str, Callable[[ModelOptions], FeatureExtractor]] = {
    "sift": _sift, "dino": _dino("dino"), "dinov2": _dino("dinov2")}
