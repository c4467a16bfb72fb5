"""The objective of a training step: the model's prediction for a batch, all loss terms, and their weighted sum.

Training, the memory planner (training/memory.py) and the benchmarks call `objective`; `training.compilation` compiles
`pair_objective`, which is the part without data-dependent shapes.

Notation
    B, N, K  pairs of frames, points a pair, samples a ray
    model    a models.omnimotion.OmniMotion
    batch    a loaders.pair_sampler.Batch
"""

from collections.abc import Callable

from torch import Tensor

from losses.losses import (
    SINGLE_PROCESS,
    SingleProcess,
    depth_prior_loss,
    depth_range_loss,
    distortion_loss,
    flow_loss,
    front,
    gradient_loss,
    in_frame,
    rgb_loss,
    smoothness_loss,
)

# names of all terms, in the order in which reports list them
TERMS = ("flow", "rgb", "rgb_gradient", "flow_gradient", "depth_range", "distortion", "smoothness", "depth_prior")
OPTIONAL_TERMS = ("smoothness", "depth_prior")  # not part of `pair_objective`


def objective(model, batch, jitter: Tensor, weights: dict[str, float], near_share: float = 0.0, padding: float = 0.0,
              depth_prior: Tensor | None = None, processes: SingleProcess = SINGLE_PROCESS,
              pair_terms: Callable | None = None):
    """The prediction for a batch, the total loss (0-d, with gradient), and its unweighted terms (0-d, detached).

    jitter `(B, 1, K)` in [0, 1] and near_share are those of OmniMotion.predict_pairs; weights are those of
    losses.schedules.loss_weights, a term without a weight is not computed; padding is in pixels, see `pair_objective`;
    depth_prior `(B, N)` is the prior at the batch's points, needed for the term of that name; pair_terms replaces
    `pair_objective` by a compiled version."""
    in_every_step = {name: weight for name, weight in weights.items() if name not in OPTIONAL_TERMS}
    if model.config.deform == "warp":  # one sample a layer: there is no spread within a surface, only between layers
        in_every_step.pop("distortion", None)
    prediction, total, terms = (pair_terms or pair_objective)(
        model, batch, jitter, near_share, in_every_step, padding, processes)
    if "smoothness" in weights:
        terms["smoothness"] = _scene_flow_smoothness(model, prediction.local, batch.ids1, processes)
        total = total + weights["smoothness"] * terms["smoothness"]
    if "depth_prior" in weights:
        rendered = (prediction.weights * prediction.depths).sum(-1)  # (B, N)
        terms["depth_prior"] = depth_prior_loss(rendered, depth_prior) / processes.count
        total = total + weights["depth_prior"] * terms["depth_prior"]
    return prediction, total, {name: value.detach() for name, value in terms.items()}


def pair_objective(model, batch, jitter: Tensor, near_share: float, weights: dict[str, float | Tensor],
                   padding: float, processes: SingleProcess):
    """`objective` without the optional terms."""
    prediction = model.predict_pairs(batch.pixels1, batch.ids1, batch.ids2, jitter, near_share)
    depth_range = (model.config.min_depth, model.config.max_depth)
    return prediction, *pair_losses(prediction, batch, weights, model.size, depth_range, padding, processes)


def pair_losses(prediction, batch, weights: dict[str, float | Tensor], size: tuple[int, int],
                depth_range: tuple[float, float], padding: float = 0.0,
                processes: SingleProcess = SINGLE_PROCESS) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum and unweighted terms of a `models.omnimotion.PairPrediction` for frames of `size` (H, W).

    A prediction more than `padding` pixels outside the frame takes no part in the flow terms."""
    # points whose prediction is in the widened frame come first: `reached` marks them
    reached, p, q, v = front(
        in_frame(prediction.pixels.detach(), size, padding).flatten(), prediction.pixels.flatten(0, 1),
        batch.pixels2.flatten(0, 1), batch.weights.flatten())
    # points in their own frame come first: `started` marks them
    started, rendered, observed = front(
        in_frame(batch.pixels1, size).flatten(), prediction.rgb.flatten(0, 1), batch.rgb1.flatten(0, 1))
    terms = {
        "flow": flow_loss(p, q, v, reached, processes),
        "rgb": rgb_loss(rendered, observed, started, processes),
        "rgb_gradient": gradient_loss(rendered, observed, started, processes=processes),
        "flow_gradient": gradient_loss(p, q, reached, v, processes),
        "depth_range": depth_range_loss(prediction.target[..., 2], *depth_range) / processes.count,
    }
    if "distortion" in weights:
        terms["distortion"] = distortion_loss(prediction.depths, prediction.weights) / processes.count
    total = sum(weights[name] * value for name, value in terms.items())
    return total, {name: value.detach() for name, value in terms.items()}


def _scene_flow_smoothness(model, local: Tensor, ids: Tensor, processes: SingleProcess) -> Tensor:
    """The smoothness term on the first quarter of the points of the frames that have a frame before and after them."""
    inner = (ids >= 1) & (ids < model.config.num_frames - 1)
    flows = local.new_zeros(2, 0, 3)
    if inner.any():
        flows = model.scene_flow(local[inner][:, : local.shape[1] // 4], ids[inner])
    return smoothness_loss(*flows, processes)
