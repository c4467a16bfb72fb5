"""The Gabor network as one autograd function: the fast version of `models.gabor.GaborNet`.

Notation (in addition to that of models.gabor)
    n        number of points
    v        input and its squared norm, (v, |v|^2)                              (n, D + 1)
    P, b     weight and bias of a filter layer: v -> phases and exponents        (2F, D + 1), (2F,)
    s, c     exp(exponent) sin(phase) and exp(exponent) cos(phase)               (n, F)
    z, h     hidden layer i: z_i = W_i h_{i-1} + c_i, h_i = s_i z_i              (n, F)
             the output layer's weight and bias are the last W and c
    L        number of filter layers, and of linear layers
    g*       gradient, for example gh of h; gp of phases and exponents           (n, 2F)

The exponent -gamma |v - mu|^2 / 2 of a filter is linear in (v, |v|^2), so a filter layer is one matrix product. This
product is computed in float32, because phases and exponents need full precision. With bfloat16 products, s, c, z and h
are bfloat16, and so are the operands of the hidden layers' products and of all products in the backward pass.
"""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from models.kernels import native
from models.kernels.backend import Products


def gabor(net: nn.Module, v: Tensor, products: Products) -> Tensor:
    """`net(v)` for a `GaborNet`, `(n, D)` -> `(n, out)`, with the C++ kernel if `products` has one that fits."""
    v = torch.cat([v, v.square().sum(-1, keepdim=True)], dim=-1)
    filters = [_as_linear(filter_) for filter_ in net.filters]
    linear = [*net.linear, net.output_linear]
    tensors = [*(P for P, _ in filters), *(b for _, b in filters),
               *(layer.weight for layer in linear), *(layer.bias for layer in linear)]
    if products.native is not None and native.fits([(layer.weight, layer.bias) for layer in linear]):
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


def _groups(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """All P, all b, all W and all c, L each: the order of the arguments and gradients of the functions below."""
    L = len(tensors) // 4
    return [tensors[k:k + L] for k in range(0, 4 * L, L)]


class _NativeGabor(torch.autograd.Function):
    """The C++ kernel. Stores only v and the weights; the backward pass recomputes the activations."""

    @staticmethod
    def forward(ctx, v, kernels, *tensors):
        tensors = [tensor.contiguous() for tensor in tensors]
        ctx.kernels = kernels
        ctx.save_for_backward(v, *tensors)
        return kernels.gabor_forward(v, *_groups(tensors))

    @staticmethod
    def backward(ctx, g):
        v, *tensors = ctx.saved_tensors
        grad_v, *grads = ctx.kernels.gabor_backward(g.contiguous(), v, *_groups(tensors))
        return grad_v, None, *grads


class _Gabor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, operand, *tensors):
        P, b, W, c = _groups(tensors)
        sines, cosines, z, h = [], [], [], []
        for i in range(len(P)):
            phase, exponent = torch.addmm(b[i], v, P[i].T).chunk(2, dim=-1)
            amplitude = exponent.exp_()
            sines.append(operand(phase.sin() * amplitude))
            cosines.append(operand(phase.cos_().mul_(amplitude)))
            if i:
                z.append(torch.addmm(c[i - 1].to(h[-1].dtype), h[-1], operand(W[i - 1]).T))
            h.append(operand(sines[i] * z[-1]) if i else sines[0])
        ctx.save_for_backward(v, *sines, *cosines, *z, *h[1:], *P, *W)
        ctx.operand = operand
        return torch.addmm(c[-1], h[-1].to(v.dtype), W[-1].T)

    @staticmethod
    def backward(ctx, g):
        v, *saved = ctx.saved_tensors
        L = (len(saved) + 2) // 6  # four lists of L tensors and two of L - 1
        rest = iter(saved)
        sines, cosines, z, h, P, W = (list(islice(rest, k)) for k in (L, L, L - 1, L - 1, L, L))
        h = [sines[0], *h]
        operand = ctx.operand
        rounded_v = operand(v)
        grad_v = torch.zeros_like(v)
        grad_P, grad_b, grad_W, grad_c = ([None] * L for _ in range(4))
        grad_W[-1] = (operand(g).T @ h[-1]).to(g.dtype)
        grad_c[-1] = g.sum(0)
        gh = operand(operand(g) @ operand(W[-1]))  # (n, F)
        for i in range(L - 1, -1, -1):
            gs = gh * z[i - 1] if i else gh
            gp = operand(torch.cat([gs * cosines[i], gs * sines[i]], dim=-1))  # (n, 2F): phases, exponents
            grad_P[i] = (gp.T @ rounded_v).to(g.dtype)
            grad_b[i] = gp.sum(0).to(g.dtype)
            grad_v += gp @ operand(P[i])
            if i:
                gz = operand(gh.mul_(sines[i]))
                grad_W[i - 1] = (gz.T @ h[i - 1]).to(g.dtype)
                grad_c[i - 1] = gz.sum(0).to(g.dtype)
                gh = operand(gz @ operand(W[i - 1]))
        return grad_v, None, *grad_P, *grad_b, *grad_W, *grad_c
