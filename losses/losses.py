"""The losses of one batch (OmniMotion, section 4.3 and supplement; docs/method.md), one small function each.

Notation
    B, N, K  pairs of frames, points a pair, samples a ray
    p, q     predicted and observed pixel positions                                 (B, N, 2)
    v        weight of an observation, 0 where there is none                        (B, N)
    z, w     sample depths (sorted) and compositing weights                         (..., K)
Flow is in pixels, colors in [0, 1].
"""

import torch
from torch import Tensor


def in_frame(p: Tensor, size: tuple[int, int], padding: float = 0.0) -> Tensor:
    """`(..., 2)` pixels inside a frame of `size` = (H, W), widened by `padding` pixels -> bool `(...)`."""
    x, y = p.unbind(-1)
    return (x >= -padding) & (x <= size[1] - 1 + padding) & (y >= -padding) & (y <= size[0] - 1 + padding)


def front(chosen: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows `chosen` `(M,)` of tensors `(M, ...)` moved to the front in their order, and which rows these are: what
    indexing with the mask gives, without a shape that depends on the data (a GPU would have to wait for it)."""
    order = torch.argsort(~chosen, stable=True)
    return (chosen[order], *(tensor[order] for tensor in tensors))


class Alone:
    """How a batch's counts and extremes are found where several processes share it; here there is one. Elsewhere every
    loss is this process's part, and the loss is the sum of the parts (training.distributed.Processes)."""
    count = 1

    def sum(self, x: Tensor) -> Tensor:
        """Over the processes, the same shape."""
        return x

    max = sum


ALONE = Alone()


def trimmed_mean(error: Tensor, counted: Tensor, weight: Tensor | None = None, normalize: bool = True,
                 whole: Alone = ALONE) -> Tensor:
    """Mean of the `counted` entries of `error` `(M,)` without the largest, as published (a trim at quantile 1).

    `weight` `(M,)` multiplies the errors; `normalize` divides by the weights' sum instead of their number."""
    largest = error.detach().masked_fill(~counted, -torch.inf).amax() if len(error) else error.new_tensor(-torch.inf)
    kept = counted & (error < whole.max(largest))
    if weight is None:
        return (error * kept).sum() / whole.sum(kept.sum()).clamp(min=1)
    if normalize:
        return (error * weight * kept).sum() / (whole.sum((weight * kept).sum()) + 1e-8)
    return (error * weight * kept).sum() / whole.sum(kept.sum()).clamp(min=1)


def flow_loss(p: Tensor, q: Tensor, v: Tensor, seen: Tensor, whole: Alone = ALONE) -> Tensor:
    """Weighted mean absolute flow error in pixels over the points `seen` `(M,)` of `(M, 2)`, `(M, 2)`, `(M,)`."""
    return trimmed_mean((p - q).abs().mean(-1), seen, v, False, whole)


def gradient_loss(a: Tensor, b: Tensor, seen: Tensor, v: Tensor | None = None, whole: Alone = ALONE) -> Tensor:
    """Mean absolute difference of the differences between consecutive points `(M, C)`, of which the first ones are
    `seen` `(M,)`; for colors and flow.

    Points are drawn at random, so that consecutive ones are random pairs: relative motion is compared, as published."""
    error = (a.diff(dim=0) - b.diff(dim=0)).abs().mean(-1)  # (M-1,)
    return trimmed_mean(error, seen[1:] & seen[:-1], None if v is None else v[1:] * v[:-1], whole=whole)


def rgb_loss(rendered: Tensor, observed: Tensor, seen: Tensor, whole: Alone = ALONE) -> Tensor:
    """Mean squared color error of the points `seen` `(M,)` of `(M, 3)`."""
    return ((rendered - observed).square().mean(-1) * seen).sum() / whole.sum(seen.sum()).clamp(min=1)


def depth_range_loss(depth: Tensor, near: float, far: float) -> Tensor:
    """Mean squared distance of mapped depths, any shape, from [near, far]."""
    return ((near - depth).clamp(min=0).square() + (depth - far).clamp(min=0).square()).mean()


def distortion_loss(z: Tensor, w: Tensor) -> Tensor:
    """Spread of the weights along the ray (mip-NeRF 360, eq. 15), mean over rays; `(..., K)` each.

    Sample k stands for the interval [z_k, z_{k+1}], the last for an empty one. With sorted midpoints m the double sum
    of w_i w_j |m_i - m_j| is twice the sum over i of w_i (m_i W_i - V_i), W and V running sums of w and w m before i.
    """
    end = torch.cat([z[..., 1:], z[..., -1:]], dim=-1)
    m = (z + end) / 2
    before = w.cumsum(-1) - w
    moment = (w * m).cumsum(-1) - w * m
    between = 2 * (w * (m * before - moment)).sum(-1)
    within = (w.square() * (end - z)).sum(-1) / 3
    return (between + within).mean()


def depth_prior_loss(depth: Tensor, prior: Tensor) -> Tensor:
    """Scale- and shift-invariant difference of rendered depths and a prior, `(B, N)` each, mean over the frames.

    In each frame both are taken relative to their median, in units of their mean absolute deviation (Ranftl et al.,
    TPAMI 2022, section 5); deviations under 0.01 count as that, so that a flat rendering has bounded gradients."""
    def aligned(d: Tensor) -> Tensor:
        centered = d - d.median(dim=-1, keepdim=True).values
        return centered / centered.abs().mean(dim=-1, keepdim=True).clamp(min=0.01)

    return (aligned(depth) - aligned(prior)).abs().mean()


def smoothness_loss(flow_in: Tensor, flow_out: Tensor, whole: Alone = ALONE) -> Tensor:
    """Mean absolute change of scene flow, `(..., 3)` each (OmniMotion only; pruned from the default)."""
    error = (flow_in - flow_out).abs().mean(-1).flatten()
    return trimmed_mean(error, torch.ones_like(error, dtype=torch.bool), whole=whole)


def objective(prediction, batch, weights: dict[str, float | Tensor], size: tuple[int, int],
              depth_range: tuple[float, float], padding: float = 0.0,
              whole: Alone = ALONE) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss and its terms (detached, unweighted) of a `models.omnimotion.PairPrediction` against a
    `loaders.pair_sampler.Batch`; `weights` as `losses.schedules.loss_weights` gives them, numbers or 0-d tensors. The
    smoothness term needs two more mappings and is added by the caller. `whole`: this is a part of a batch."""
    seen, p, q, v = front(  # a prediction outside the frame has no flow loss
        in_frame(prediction.pixels.detach(), size, padding).flatten(), prediction.pixels.flatten(0, 1),
        batch.pixels2.flatten(0, 1), batch.weights.flatten())
    real, rgb, rgb_seen = front(
        in_frame(batch.pixels1, size).flatten(), prediction.rgb.flatten(0, 1), batch.rgb1.flatten(0, 1))
    terms = {"flow": flow_loss(p, q, v, seen, whole), "rgb": rgb_loss(rgb, rgb_seen, real, whole),
             "rgb_gradient": gradient_loss(rgb, rgb_seen, real, whole=whole),
             "flow_gradient": gradient_loss(p, q, seen, v, whole),
             "depth_range": depth_range_loss(prediction.target[..., 2], *depth_range) / whole.count}
    if "distortion" in weights:
        terms["distortion"] = distortion_loss(prediction.depths, prediction.weights) / whole.count
    total = sum(weights[name] * value for name, value in terms.items())
    return total, {name: value.detach() for name, value in terms.items()}
