"""Appearance features, selected by name (`--features`)."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np

from preprocessing.flow import ModelOptions


class FeatureExtractor(Protocol):
    """A frame `(H, W, 3)` uint8 RGB -> features `(h, w, c)`; corner features lie on the frame's corner pixels.

    It is called from several threads."""
    threshold: float        # cosine similarity above which two features may show the same point
    chain_threshold: float  # the same for the two ends of a trusted chain
    settings: dict          # what the features depend on besides the images; written to meta.json

    def __call__(self, image: np.ndarray) -> np.ndarray: ...


def _sift(options: ModelOptions) -> FeatureExtractor:
    from third_party.sift import DenseSift

    return DenseSift()


def _dino(kind: str, options: ModelOptions) -> FeatureExtractor:
    from third_party.dino import MODELS, DinoFeatures

    return DinoFeatures(options.feature_model or MODELS[kind], options.weights_dir, options.offline,
                        options.feature_side, options.device)


def _aliked(options: ModelOptions) -> FeatureExtractor:
    from preprocessing.pretrained import find_weights
    from third_party.kornia_features import AlikedFeatures

    return AlikedFeatures(find_weights(["aliked-n16.pth"], options.weights_dir, options.offline), options.device)


def _xfeat(options: ModelOptions) -> FeatureExtractor:
    from preprocessing.pretrained import find_weights
    from third_party.kornia_features import XFeatFeatures

    return XFeatFeatures(find_weights(["xfeat.pt"], options.weights_dir, options.offline), options.device)


FEATURE_EXTRACTORS: dict[str, Callable[[ModelOptions], FeatureExtractor]] = {
    "sift": _sift, "dino": partial(_dino, "dino"), "dinov2": partial(_dino, "dinov2"),
    "aliked": _aliked, "xfeat": _xfeat}
