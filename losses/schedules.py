"""Schedules as shares of the run (docs/method.md).

Notation
    step     0-based step of this run of `num_iters` steps
    s        reference step: the same moment of a run of 100,000 steps, s = step * 100,000 / num_iters
Step numbers in the options are reference steps, so that a short run follows the same schedule as a long one.
"""

import math

REFERENCE_ITERS = 100_000


def reference_step(step: int, num_iters: int) -> float:
    """The step of a 100,000-step run that corresponds to `step` of `num_iters`."""
    return step * REFERENCE_ITERS / num_iters


def own_step(s: float, num_iters: int) -> int:
    """Inverse of `reference_step`, rounded: the step of this run at which reference step `s` is reached."""
    return round(s * num_iters / REFERENCE_ITERS)


def loss_weights(s: float, distortion_start: float = 40_000, smoothness: float = 0.0,
                 depth_prior: float = 0.0) -> dict[str, float]:
    """Weights of the loss terms at reference step `s`, by the names of losses.objective.TERMS.

    Color, flow gradient and distortion are warmed up. A term without a weight need not be computed: distortion before
    `distortion_start`, and the optional terms `smoothness` and `depth_prior` where their weight is 0."""
    def ramp(start: float, length: float, top: float) -> float:
        return min(max((s - start) / length, 0.0), top)

    w_rgb = ramp(0, 5_000, 10)
    weights = {"flow": 1.0, "rgb": w_rgb, "rgb_gradient": w_rgb, "flow_gradient": ramp(0, 500_000, 0.1),
               "depth_range": 10.0}
    if s > distortion_start:
        weights["distortion"] = ramp(distortion_start, 2_000, 10)
    if smoothness:
        weights["smoothness"] = smoothness
    if depth_prior:
        weights["depth_prior"] = depth_prior
    return weights


def max_interval(s: float, start_interval: int, num_frames: int) -> int:
    """Largest |i - j| of a pair: it grows by one every 2,000 reference steps (OmniMotion's curriculum)."""
    return min(start_interval + int(s // 2_000), num_frames - 1)


def pair_weight(interval: int, largest: int) -> float:
    """Weight of the flow loss of a pair `interval` frames apart: flow between near frames is more reliable."""
    return math.cos((interval - 1) / largest * math.pi / 2)


def learning_rate_factor(s: float, decay_steps: float, decay_factor: float, warmup_steps: float = 0) -> float:
    """Factor of the learning rate: `decay_factor` every `decay_steps` reference steps; it rises linearly
    over the first `warmup_steps` reference steps."""
    return decay_factor ** int(s // decay_steps) * min((s + 1) / (warmup_steps + 1), 1.0)
