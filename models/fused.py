"""One coupling layer as a single differentiable function: the fast twin of `CouplingLayer.scale_shift_plain`.

Notation
    B, M     frames, points of each                         x, y: the changed coordinate before and after    (B, M)
    a        the two kept coordinates                                                                        (B, M, 2)
    e        their code, h_0, h_1, ... hidden activations   (B M, 18), (B M, width)
    chain    [(W, b)] of `CouplingLayer.fuse`; entry 1 meets the latent, its bias is one a frame           (B, 1, width)
    s, o     log-scale (clamped to [-8, 8]) and offset                                                       (B, M)

Autograd would keep and pass over more than twice as many arrays of size (B M, width); here every activation is stored
once, changed in place, and its sign is read from the stored result in the backward pass.
"""

import torch
from torch import Tensor

from models.encoding import frequencies

S_MAX = 8.0  # clamp of the log-scale, as published
NEGATIVE_SLOPE = 0.01  # LeakyReLU


def couple(x: Tensor, a: Tensor, chain: list[tuple[Tensor, Tensor]], octaves: int, first_slope: float,
           inverse: bool) -> Tensor:
    """y = (x - o) exp(-s), or y = x exp(s) + o if `inverse`, with (s, o) from the MLP `chain` on `a`; `(B, M)`.

    `first_slope` is the slope of the first activation for negative input: 0 is a ReLU."""
    return _Couple.apply(x, a, octaves, first_slope, inverse, *(tensor for layer in chain for tensor in layer))


def encode(a: Tensor, octaves: int) -> Tensor:
    """(identity, sines, cosines) of `(n, 2)` at `octaves` octaves of pi, `(n, 2 + 4 octaves)`, written once."""
    w = frequencies(octaves, torch.pi, a)
    e = a.new_empty(len(a), 2 + 4 * octaves)
    waves = e[:, 2:].view(len(a), 2, 2, octaves)
    torch.mul(a[:, :, None], w, out=waves[:, :, 0])
    torch.add(waves[:, :, 0], torch.pi / 2, out=waves[:, :, 1])  # cos(v) = sin(v + pi/2)
    e[:, 2:].sin_()
    e[:, :2] = a
    return e


class _Couple(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, octaves, first_slope, inverse, *tensors):
        B, M = x.shape
        weights, biases = tensors[::2], tensors[1::2]
        e = encode(a.reshape(-1, 2), octaves)
        h = [torch.addmm(biases[0], e, weights[0].T)]
        torch.nn.functional.leaky_relu_(h[0], first_slope)
        for layer, (weight, bias) in enumerate(zip(weights[1:-1], biases[1:-1], strict=True)):
            if layer == 0:
                h.append(h[-1] @ weight.T)
                h[-1].view(B, M, -1).add_(bias)
            else:
                h.append(torch.addmm(bias, h[-1], weight.T))
            torch.nn.functional.leaky_relu_(h[-1], NEGATIVE_SLOPE)
        raw, o = torch.addmm(biases[-1], h[-1], weights[-1].T).view(B, M, 2).unbind(-1)
        s = raw.clamp(-S_MAX, S_MAX)
        factor = torch.exp(s if inverse else -s)
        y = x * factor + o if inverse else (x - o) * factor
        ctx.save_for_backward(e, raw, factor, x if inverse else y, *h, *weights)
        ctx.inverse, ctx.first_slope, ctx.octaves = inverse, first_slope, octaves
        ctx.num_hidden, ctx.shape = len(h), (B, M)
        return y

    @staticmethod
    def backward(ctx, grad):
        e, raw, factor, kept, *rest = ctx.saved_tensors
        h, weights = rest[: ctx.num_hidden], rest[ctx.num_hidden:]
        B, M = ctx.shape
        grad_x = grad * factor
        grad_o, grad_s = (grad, grad_x * kept) if ctx.inverse else (-grad_x, -grad * kept)
        grad_s = grad_s * (raw.abs() < S_MAX)
        g = torch.stack([grad_s, grad_o], dim=-1).view(-1, 2)  # (B M, 2)
        grads = [g.T @ h[-1], g.sum(0)]
        for layer in range(ctx.num_hidden - 1, 0, -1):
            g = _activation_backward(g @ weights[layer + 1], h[layer], NEGATIVE_SLOPE)
            bias = g.view(B, M, -1).sum(1, keepdim=True) if layer == 1 else g.sum(0)
            grads[:0] = [g.T @ h[layer - 1], bias]
        g = _activation_backward(g @ weights[1], h[0], ctx.first_slope)
        grads[:0] = [g.T @ e, g.sum(0)]
        grad_a = _encode_backward(g @ weights[0], e, ctx.octaves).view(B, M, 2)
        return grad_x, grad_a, None, None, None, *grads


def _activation_backward(g: Tensor, h: Tensor, slope: float) -> Tensor:
    """Gradient before a LeakyReLU from the gradient `g` after it and its result `h`."""
    return torch.ops.aten.leaky_relu_backward(g, h, slope, True)


def _encode_backward(g: Tensor, e: Tensor, octaves: int) -> Tensor:
    """Gradient of `a` `(n, 2)`: a sine's derivative is the cosine that stands beside it."""
    waves, gw = (v[:, 2:].view(len(e), 2, 2, octaves) for v in (e, g))
    return g[:, :2] + (gw[:, :, 0] * waves[:, :, 1] - gw[:, :, 1] * waves[:, :, 0]) @ frequencies(octaves, torch.pi, e)
