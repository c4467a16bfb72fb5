"""Optical flow estimators by name.

An estimator is `(image_a, image_b) -> flow`: two frames `(H, W, 3)` uint8 RGB to `(H, W, 2)` float32 pixels from a to
b, callable from several threads. A factory takes `close`: whether the frames will be adjacent. Every chain is made of
adjacent flows and there are few of them, so an estimator may spend more on them.
"""

from collections.abc import Callable

import numpy as np

FlowEstimator = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _dis(close: bool) -> FlowEstimator:
    from third_party.dis import DisFlow

    return DisFlow(close)


FLOW_ESTIMATORS: dict[str, Callable[[bool], FlowEstimator]] = {"dis": _dis}
