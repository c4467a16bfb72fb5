"""Schedules as shares of the run (docs/method.md).

Notation
    step     0-based step of this run of `num_iters` steps
    s        the same moment of the published run of 100,000 steps, s = step * 100,000 / num_iters
Every step number in the options is one of the published run, so that a short run is a short version of the long one.
"""

import math

PUBLISHED_ITERS = 100_000


def published_step(step: int, num_iters: int) -> float:
    """The step of the published 100,000-step run that corresponds to `step` of `num_iters`."""
    return step * PUBLISHED_ITERS / num_iters


def own_step(s: float, num_iters: int) -> int:
    """Inverse of `published_step`, rounded: the step of this run at which published step `s` is reached."""
    return round(s * num_iters / PUBLISHED_ITERS)


def loss_weights(s: float, distortion_start: float = 40_000) -> dict[str, float]:
    """Weights of the loss terms at published step `s`; colors, flow gradient and distortion are warmed up. Distortion
    is left out while it has none: it need not be computed."""
    def ramp(start: float, length: float, top: float) -> float:
        return min(max((s - start) / length, 0.0), top)

    w_rgb = ramp(0, 5_000, 10)
    out = {"flow": 1.0, "rgb": w_rgb, "rgb_gradient": w_rgb, "flow_gradient": ramp(0, 500_000, 0.1),
           "depth_range": 10.0}
    return out | {"distortion": ramp(distortion_start, 2_000, 10)} if s > distortion_start else out


def max_interval(s: float, start_interval: int, num_frames: int) -> int:
    """Largest |i - j| of a pair: it grows by one every 2,000 published steps (OmniMotion's curriculum)."""
    return min(start_interval + int(s // 2_000), num_frames - 1)


def pair_weight(interval: int, largest: int) -> float:
    """Weight of the flow loss of a pair `interval` frames apart: near pairs are trusted more."""
    return math.cos((interval - 1) / largest * math.pi / 2)


def learning_rate_factor(s: float, decay_steps: float, decay_factor: float, warmup_steps: float = 0) -> float:
    """Factor of the learning rate: `decay_factor` every `decay_steps` published steps, in steps; it rises linearly
    over the first `warmup_steps`."""
    return decay_factor ** int(s // decay_steps) * min((s + 1) / (warmup_steps + 1), 1.0)
