"""A chain of linear layers with LeakyReLUs between them as one autograd function, used by the fast versions.

Notation
    B, M     numbers of frames, of points per frame; n = B M rows
    e        input (n, D)                    x_k  input of layer k: e or an activation, in the precision of the products
    W_k, b_k weight (out, in) and bias of layer k; b_k is (out,), or (B, 1, out) for a bias per frame
    slope_k  negative slope of the LeakyReLU after layer k (0: ReLU); no activation after the last layer
    g        gradient of a layer's output

Separate autograd operations would store and traverse more than twice as many arrays with n rows. Here every activation
is stored once, after the LeakyReLU, which works in place; the backward pass reads the sign from the stored activation.

With bfloat16 products, operands are rounded to bfloat16 and sums are float32. Coordinates need their 24 bits of
precision, so e is split into two bfloat16 parts, its rounded value and the remainder; the last layer is float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import native
from models.kernels.backend import Products

Layers = list[tuple[Tensor, Tensor]]  # [(W_k, b_k)]


def chain(e: Tensor, layers: Layers, slopes: list[float], products: Products) -> Tensor:
    """Apply the chain, `(n, D)` -> `(n, out)`; `slopes` has one entry per layer but the last."""
    tensors = [tensor for layer in layers for tensor in layer]
    if products.native is not None and native.fits(layers):
        return _NativeChain.apply(e, slopes, products.native, *tensors)
    return _Chain.apply(e, slopes, products, *tensors)


class _NativeChain(torch.autograd.Function):
    """The C++ kernel. Stores only e and the weights; the backward pass recomputes the activations."""

    @staticmethod
    def forward(ctx, e, slopes, kernels, *tensors):
        e = e.contiguous()
        weights = [w.contiguous() for w in tensors[::2]]
        biases = [b.contiguous() for b in tensors[1::2]]
        num_frames = max(len(b) if b.dim() == 3 else 1 for b in biases)
        ctx.kernels = kernels
        ctx.arguments = (num_frames, slopes)
        ctx.save_for_backward(e, *weights, *biases)
        return kernels.chain_forward(e, *ctx.arguments, weights, biases)

    @staticmethod
    def backward(ctx, g):
        e, *tensors = ctx.saved_tensors
        half = len(tensors) // 2
        grad_e, *grads = ctx.kernels.chain_backward(g.contiguous(), e, *ctx.arguments, tensors[:half], tensors[half:])
        return grad_e, None, None, *grads


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, e, slopes, products, *tensors):
        weights, biases = tensors[::2], tensors[1::2]
        operands = [_halves(e, products)]
        for k, slope in enumerate(slopes):
            weight = products.operand(weights[k])
            weight = torch.cat([weight, weight], dim=1) if k == 0 and products.dtype else weight  # for `_halves`
            operands.append(products.operand(F.leaky_relu_(_affine(operands[-1], weight, biases[k]), slope)))
        ctx.save_for_backward(*operands, *weights)
        ctx.slopes = slopes
        ctx.products = products
        ctx.frames = [len(b) if b.dim() == 3 else 0 for b in biases]  # 0: one bias for all frames
        return _affine(operands[-1].to(e.dtype), weights[-1], biases[-1])

    @staticmethod
    def backward(ctx, g):
        layers = len(ctx.slopes) + 1
        operand = ctx.products.operand
        saved = ctx.saved_tensors
        operands, weights = saved[:layers], saved[layers:]
        in_dim = weights[0].shape[1]
        grads = []
        g_exact = g  # before rounding
        g = operand(g)
        for k in range(layers - 1, -1, -1):
            bias = (g_exact if k == layers - 1 else g).view(max(ctx.frames[k], 1), -1, g.shape[-1]).sum(1, keepdim=True)
            weight = g.T @ operands[k]
            if weight.shape[1] > in_dim and k == 0:  # both halves of e use the same weights
                weight = weight[:, :in_dim].float() + weight[:, in_dim:]
            grads[:0] = [weight.to(g_exact.dtype), (bias if ctx.frames[k] else bias[0, 0]).to(g_exact.dtype)]
            if k == 0 and not ctx.needs_input_grad[0]:
                return None, None, None, *grads
            g = g @ operand(weights[k])
            if k:
                torch.ops.aten.leaky_relu_backward.grad_input(g, operands[k], ctx.slopes[k - 1], True, grad_input=g)
                g = operand(g)
        return g.to(g_exact.dtype), None, None, *grads


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b, with one bias for all rows or a bias per frame."""
    if bias.dim() < 3:
        return torch.addmm(bias.to(x.dtype), x, weight.T)
    out = x @ weight.T
    out.view(len(bias), -1, out.shape[-1]).add_(bias.to(x.dtype))
    return out


def _halves(e: Tensor, products: Products) -> Tensor:
    """e `(n, D)` without rounding; otherwise its rounded value and the rounded remainder side by side, `(n, 2D)`."""
    if products.dtype is None:
        return e
    high = products.operand(e)
    return torch.cat([high, products.operand(e - high)], dim=-1)  # (n, 2D)
