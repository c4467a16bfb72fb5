"""The loss terms, one small function each (OmniMotion, section 4.3 and supplement; docs/method.md).

Notation
    B, N, K  pairs of frames, points a pair, samples a ray
    p, q     predicted and observed pixel positions                                 (B, N, 2)
    v        weight of a correspondence, 0 where there is none                      (B, N)
    z, w     sample depths (sorted) and compositing weights                         (..., K)
Flow is in pixels, colors in [0, 1].

Where several processes share a batch, each computes its part of every term and the loss is the sum of the parts.
Counts and maxima that concern the whole batch are reduced over the processes: `processes` is a
training.distributed.Processes, or SINGLE_PROCESS.
"""

import torch
from torch import Tensor


def in_frame(p: Tensor, size: tuple[int, int], padding: float = 0.0) -> Tensor:
    """`(..., 2)` pixels inside a frame of `size` = (H, W), widened by `padding` pixels -> bool `(...)`."""
    x, y = p.unbind(-1)
    return (x >= -padding) & (x <= size[1] - 1 + padding) & (y >= -padding) & (y <= size[0] - 1 + padding)


def front(chosen: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors `(M, ...)` with the rows `chosen` `(M,)` first, in their order; the reordered mask comes first.

    Unlike indexing with the mask, the shape of the result does not depend on the data, so the CPU does not wait for
    the GPU."""
    order = torch.argsort(~chosen, stable=True)
    return (chosen[order], *(tensor[order] for tensor in tensors))


class SingleProcess:
    """No-op reductions for a single process, with the interface of training.distributed.Processes."""
    count = 1

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the processes; the same shape."""
        return x

    def max(self, x: Tensor) -> Tensor:
        """Maximum over the processes; the same shape."""
        return x


SINGLE_PROCESS = SingleProcess()


def trimmed_mean(error: Tensor, counted: Tensor, weight: Tensor | None = None, normalize: bool = True,
                 processes: SingleProcess = SINGLE_PROCESS) -> Tensor:
    """Mean of the `counted` entries of `error` `(M,)` without the largest one (OmniMotion's code trims at quantile 1).

    `weight` `(M,)` multiplies the errors; `normalize` divides by the weights' sum instead of their number."""
    largest = error.detach().masked_fill(~counted, -torch.inf).amax() if len(error) else error.new_tensor(-torch.inf)
    kept = counted & (error < processes.max(largest))
    if weight is None:
        return (error * kept).sum() / processes.sum(kept.sum()).clamp(min=1)
    if normalize:
        return (error * weight * kept).sum() / (processes.sum((weight * kept).sum()) + 1e-8)
    return (error * weight * kept).sum() / processes.sum(kept.sum()).clamp(min=1)


def flow_loss(p: Tensor, q: Tensor, v: Tensor, seen: Tensor, processes: SingleProcess = SINGLE_PROCESS) -> Tensor:
    """Weighted mean absolute flow error in pixels over the points `seen` `(M,)` of `(M, 2)`, `(M, 2)`, `(M,)`."""
    return trimmed_mean((p - q).abs().mean(-1), seen, v, normalize=False, processes=processes)


def gradient_loss(a: Tensor, b: Tensor, seen: Tensor, v: Tensor | None = None,
                  processes: SingleProcess = SINGLE_PROCESS) -> Tensor:
    """Mean absolute difference of the differences between consecutive points `(M, C)`, of which the first ones are
    `seen` `(M,)`; for colors and flow.

    Consecutive points are random pairs, because points are drawn at random. This compares relative motion (or color),
    as in OmniMotion's code."""
    error = (a.diff(dim=0) - b.diff(dim=0)).abs().mean(-1)  # (M-1,)
    return trimmed_mean(error, seen[1:] & seen[:-1], None if v is None else v[1:] * v[:-1], processes=processes)


def rgb_loss(rendered: Tensor, observed: Tensor, seen: Tensor, processes: SingleProcess = SINGLE_PROCESS) -> Tensor:
    """Mean squared color error of the points `seen` `(M,)` of `(M, 3)`."""
    return ((rendered - observed).square().mean(-1) * seen).sum() / processes.sum(seen.sum()).clamp(min=1)


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
    TPAMI 2022, section 5). A smaller deviation than 0.01 is replaced by 0.01, so that the gradients of a flat rendering
    are bounded."""
    def aligned(d: Tensor) -> Tensor:
        centered = d - d.median(dim=-1, keepdim=True).values
        return centered / centered.abs().mean(dim=-1, keepdim=True).clamp(min=0.01)

    return (aligned(depth) - aligned(prior)).abs().mean()


def smoothness_loss(flow_in: Tensor, flow_out: Tensor, processes: SingleProcess = SINGLE_PROCESS) -> Tensor:
    """Mean absolute change of scene flow, `(..., 3)` each (OmniMotion, supplement; not in the default losses)."""
    error = (flow_in - flow_out).abs().mean(-1).flatten()
    return trimmed_mean(error, torch.ones_like(error, dtype=torch.bool), processes=processes)
