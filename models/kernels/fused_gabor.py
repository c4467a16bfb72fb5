"""The Gabor network as one autograd function: the fast version of `models.gabor.GaborNet`.

Notation (in addition to that of models.gabor)
    n        number of points
    v        input and its squared norm, (v, |v|^2)                              (n, D + 1)
    P, b     weight and bias of a filter layer: v -> phases and exponents        (2F, D + 1), (2F,)
    s, c     exp(exponent) sin(phase) and exp(exponent) cos(phase)               (n, F)
    z, h     hidden layer i: z_i = W_i h_{i-1} + c_i, h_i = s_i z_i              (n, F)

The exponent -gamma |v - mu|^2 / 2 of a filter is linear in (v, |v|^2), so a filter layer is one matrix product. This
product is computed in float32, because phases and exponents need full precision. With bfloat16 products, s, c, z and h
are bfloat16, and so are the operands of the hidden layers' products and of all products in the backward pass.
"""

from itertools import islice

import torch
from torch import Tensor, nn

from models.kernels import native
from models.kernels.backend import Products


def gabor(net: nn.Module, v: Tensor, products: Products) -> Tensor:
    """`net(v)` for a `GaborNet`, `(n, D)` -> `(n, out)`, with the C++ kernel if `products` has one that fits."""
    v = torch.cat([v, v.square().sum(-1, keepdim=True)], dim=-1)
    filters = [_as_linear(filter_) for filter_ in net.filters]
    hidden = [(linear.weight, linear.bias) for linear in [*net.linear, net.output_linear]]
    tensors = [tensor for layer in filters + hidden for tensor in layer]
    if products.native is not None and native.fits(hidden):
        return _NativeGabor.apply(v, products.native, *tensors)
    return _Gabor.apply(v, products.operand, *tensors)


def _as_linear(filter_: nn.Module) -> tuple[Tensor, Tensor]:
    """P `(2F, D + 1)` and b `(2F,)` of a `GaborFilter`."""
    gamma = filter_.gamma[:, None]
    mu = filter_.mu
    phase = torch.cat([filter_.linear.weight, torch.zeros_like(gamma)], dim=1)
    exponent = torch.cat([gamma * mu, -0.5 * gamma], dim=1)
    bias = torch.cat([filter_.linear.bias, -0.5 * filter_.gamma * mu.square().sum(-1)])
    return torch.cat([phase, exponent]), bias


class _NativeGabor(torch.autograd.Function):
    """The C++ kernel. Stores only v and the weights; the backward pass recomputes the activations."""

    @staticmethod
    def forward(ctx, v, kernels, *tensors):
        ctx.kernels = kernels
        tensors = [tensor.contiguous() for tensor in tensors]
        ctx.save_for_backward(v, *tensors)
        return kernels.gabor_forward(v, *_by_kind(tensors))

    @staticmethod
    def backward(ctx, g):
        v, *tensors = ctx.saved_tensors
        grad_v, *grads = ctx.kernels.gabor_backward(g.contiguous(), v, *_by_kind(tensors))
        L = len(tensors) // 4
        P, b, W, c = (grads[k * L:(k + 1) * L] for k in range(4))
        return grad_v, None, *(t for pair in zip(P, b, strict=True) for t in pair), *(
            t for pair in zip(W, c, strict=True) for t in pair)


def _by_kind(tensors: list[Tensor]) -> tuple[list[Tensor], ...]:
    """Group the tensors: weights of the filters, their biases, weights of the linear layers, their biases."""
    half = len(tensors) // 2
    return [list(part) for part in (tensors[:half:2], tensors[1:half:2], tensors[half::2], tensors[half + 1::2])]


class _Gabor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, operand, *tensors):
        L = len(tensors) // 4  # number of filters = number of linear layers
        filters, weights, biases = tensors[:2 * L], tensors[2 * L::2], tensors[2 * L + 1::2]
        sines, cosines, z, h = [], [], [], []
        for i in range(L):
            phase, exponent = torch.addmm(filters[2 * i + 1], v, filters[2 * i].T).chunk(2, dim=-1)
            amplitude = exponent.exp_()
            sines.append(operand(phase.sin() * amplitude))
            cosines.append(operand(phase.cos_().mul_(amplitude)))
            if i:
                z.append(torch.addmm(biases[i - 1].to(h[-1].dtype), h[-1], operand(weights[i - 1]).T))
            h.append(operand(sines[i] * z[-1]) if i else sines[0])
        ctx.save_for_backward(v, *sines, *cosines, *z, *h[1:], *filters[::2], *weights)
        ctx.operand = operand
        return torch.addmm(biases[-1], h[-1].to(v.dtype), weights[-1].T)

    @staticmethod
    def backward(ctx, g):
        v, *saved = ctx.saved_tensors
        L = (len(saved) + 2) // 6  # four lists of L tensors and two of L - 1
        rest = iter(saved)
        sines, cosines, z, h, P, weights = (list(islice(rest, k)) for k in (L, L, L - 1, L - 1, L, L))
        h = [sines[0], *h]
        operand = ctx.operand
        rounded_v = operand(v)
        grad_v = torch.zeros_like(v)
        filter_grads = []
        hidden_grads = [(operand(g).T @ h[-1]).to(g.dtype), g.sum(0)]
        gh = operand(operand(g) @ operand(weights[-1]))  # (n, F)
        for i in range(L - 1, -1, -1):
            gs = gh * z[i - 1] if i else gh
            gp = operand(torch.cat([gs * cosines[i], gs * sines[i]], dim=-1))  # (n, 2F): phases, exponents
            filter_grads[:0] = [(gp.T @ rounded_v).to(g.dtype), gp.sum(0).to(g.dtype)]
            grad_v += gp @ operand(P[i])
            if i:
                gz = operand(gh.mul_(sines[i]))
                hidden_grads[:0] = [(gz.T @ h[i - 1]).to(g.dtype), gz.sum(0).to(g.dtype)]
                gh = operand(gz @ operand(weights[i - 1]))
        return grad_v, None, *filter_grads, *hidden_grads
