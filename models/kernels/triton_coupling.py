"""The whole stack of coupling layers as one Triton kernel. The PyTorch version is in `models.invertible.FrameMaps`.

Notation
    B, M     numbers of frames, of points per frame                             x, y: (B, M, 3)
    L        number of coupling layers; W their width; D their number of W x W matrices, one per hidden layer of the MLP
    chain    [(weight, bias)] of `CouplingLayer.fuse`, D + 2 entries; entry 1 has a bias per frame, (B, 1, W)
    h_j, g_j hidden activations, and gradients before the activation, as in `models.kernels.triton_kernels`
"""

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Chain = list[tuple[Tensor, Tensor]]
SHARES = 32  # largest number of groups of points whose weight gradients are summed separately, then together


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of a Triton program."""
    points: int      # points of one frame per program
    columns: int     # columns of a W x W matrix that are loaded at a time
    warps: int = 8   # warps per program
    stages: int = 2  # pipeline stages: matrix pieces that are loaded in advance

    def launch(self) -> dict:
        """Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# Chosen at W = 256, D = 2 from the output of ptxas (python -m benchmarks.kernels): almost no register spills and at
# most 99 KiB of shared memory, which fits an A100 (163 KiB per block), an H100 (227 KiB) and a consumer card (99 KiB).
# The largest value in a program is a (points, W) float32 sum: 64 points take 64 of the 255 registers of each of the 256
# threads. Hopper's tensor cores need 64 rows; with 64 rows the backward kernel spills 19 registers at D = 2 and many at
# D = 3. On other GPUs, and for D > 2, the backward kernel uses 32 rows.
FORWARD = {"bf16": Tiles(64, 32, stages=3), "fp32": Tiles(32, 32)}
BACKWARD = {"bf16": Tiles(32, 32), "fp32": Tiles(32, 16)}
BACKWARD_HOPPER = {**BACKWARD, "bf16": Tiles(64, 32)}
GRADIENT = {"bf16": Tiles(64, 128, stages=3), "fp32": Tiles(32, 64, stages=3)}


def backward_tiles(precision: str, depth: int, capability: tuple[int, int]) -> Tiles:
    """Tile sizes of the backward kernel for D = `depth` on a GPU with the given compute capability."""
    return (BACKWARD_HOPPER if capability[0] == 9 and depth <= 2 else BACKWARD)[precision]


def coupling_stack(x: Tensor, chains: list[Chain], coordinates: tuple[int, ...], octaves: int, first_slope: float,
                   inverse: bool, precision: str = "fp32") -> Tensor:
    """Apply all coupling layers to x `(B, M, 3)` float32, or their inverses in reverse order if `inverse`.

    Differentiable once, with respect to x and every weight and bias of `chains` (one chain per layer).
    `precision`: "bf16" rounds the operands of the W x W products to bfloat16 and sums in float32. "fp32" keeps float32
    operands; it uses no tensor cores and is many times slower. Coordinates, their code and (s, o) are float32 in both;
    with "bf16", the gradient with respect to the code is computed in TF32.
    Raises ValueError if `unsupported` returns a reason."""
    reason = unsupported(x.device, chains[0][0][0].shape[0])
    if reason:
        raise ValueError(reason)
    stack = Stack(tuple(coordinates), octaves, first_slope, inverse, precision)
    return _CouplingStack.apply(x, stack, *(tensor for chain in chains for layer in chain for tensor in layer))


def unsupported(device: torch.device, width: int) -> str | None:
    """Reason why the kernels cannot run layers of this width on this device, or None if they can."""
    if not _has_triton():
        return "triton is not installed: pip install triton (Linux), or --mlp_backend torch"
    if device.type != "cuda" and not interpreted():
        return "the Triton kernels need a CUDA device: --mlp_backend torch"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need a GPU with bf16 tensor cores (compute capability 8.0): --mlp_backend torch"
    if not 16 <= width <= 256 or width & (width - 1):
        return f"the Triton kernels take a power of two from 16 to 256 as --coupling_width, not {width}"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Stack:
    """Arguments of a call other than tensors; see `coupling_stack`."""
    coordinates: tuple[int, ...]
    octaves: int
    first_slope: float
    inverse: bool
    precision: str

    @property
    def code(self) -> int:
        """Columns of the code, including the column of ones, padded to a power of two >= 16 for the tensor cores."""
        return max(16, 1 << (2 + 4 * self.octaves).bit_length())

    @property
    def operand(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def constants(self, width: int, depth: int, tiles: Tiles) -> dict:
        """Compile-time constants of the kernels, except COORDINATE and INVERSE."""
        return {"D": depth, "OCTAVES": self.octaves, "CODE": self.code, "W": width, "BM": tiles.points,
                "BN": min(tiles.columns, width), "PRODUCT": product(self.precision)}


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU (environment variable TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def product(precision: str) -> str:
    """Constant PRODUCT of the kernels: Triton's `input_precision` for products of float32 operands.

    "tf32" with bf16 (used for the gradient with respect to the code), else "ieee". The interpreter computes in float32
    only, so it gets "ieee"; bf16 operands are rounded there too."""
    return "tf32" if precision == "bf16" and not interpreted() else "ieee"


@dataclass
class _Packed:
    """Weights of all layers in the memory layout of the kernels."""
    first: Tensor      # (L, W, CODE); column 2 + 4 octaves is the bias
    hidden: Tensor     # (L, D, W, W), dtype of the operands
    bias: Tensor       # (L, B, D, W)
    last: Tensor       # (L, 2, W)
    last_bias: Tensor  # (L, 2)

    def of_layer(self, k: int) -> tuple[Tensor, ...]:
        return self.first[k], self.hidden[k], self.bias[k], self.last[k], self.last_bias[k]


def _pack(chains: list[Chain], B: int, stack: Stack) -> _Packed:
    W, columns = chains[0][0][0].shape  # columns of the code without ones and padding
    first = chains[0][0][0].new_zeros(len(chains), W, stack.code)
    first[:, :, :columns] = torch.stack([chain[0][0] for chain in chains])
    first[:, :, columns] = torch.stack([chain[0][1] for chain in chains])
    hidden = torch.stack([torch.stack([weight for weight, _ in chain[1:-1]]) for chain in chains])
    bias = torch.stack([torch.stack([bias.reshape(-1, W).expand(B, W) for _, bias in chain[1:-1]], 1)
                        for chain in chains])
    last = torch.stack([chain[-1][0] for chain in chains])
    last_bias = torch.stack([chain[-1][1] for chain in chains])
    return _Packed(first, hidden.to(stack.operand), bias, last, last_bias)


@functools.cache
def _kernels():
    from models.kernels import triton_kernels  # requires triton

    return triton_kernels


def _forward(x: Tensor, packed: _Packed, stack: Stack) -> Tensor:
    (B, M, _), (L, D, W) = x.shape, packed.hidden.shape[:3]
    tiles = FORWARD[stack.precision]
    programs = -(-M // tiles.points)
    scratch = packed.hidden.new_empty(B * programs * tiles.points if D > 2 else 0, W)
    y = torch.empty_like(x)
    coordinates = sum(c << 2 * k for k, c in enumerate(stack.coordinates))
    _kernels().stack_kernel[programs, B](
        x, y, coordinates, packed.first, packed.hidden, packed.bias, packed.last, packed.last_bias, scratch, M, L, B,
        stack.first_slope, INVERSE=stack.inverse, **stack.constants(W, D, tiles), **tiles.launch())
    return y


def _layer_backward(y: Tensor, grad: Tensor, k: int, packed: _Packed, stack: Stack) -> list[Tensor]:
    """Backward pass of layer k. Replaces the layer's output `y` by its input, and `grad` by the gradient of the input,
    in place. Returns the gradients of the layer's chain: weight, bias, weight, bias, ...

    The activations for the weight gradients exist only during this call."""
    (B, M, _), (D, W) = y.shape, packed.hidden.shape[1:3]
    N = B * M
    capability = torch.cuda.get_device_capability(y.device) if y.is_cuda else (0, 0)
    tiles = backward_tiles(stack.precision, D, capability)
    programs = -(-M // tiles.points)
    h = packed.hidden.new_empty(D + 1, N, W)
    g = packed.hidden.new_empty(D, N, W)
    sums = y.new_empty(B, programs, D + 2, W)
    first_sums = y.new_empty(B * programs, W, stack.code)
    last_bias_sums = y.new_empty(B * programs, 2)
    _kernels().layer_backward_kernel[programs, B](
        y, grad, *packed.of_layer(k), h, g, sums, first_sums, last_bias_sums, M, N * W, stack.first_slope,
        COORDINATE=stack.coordinates[k], INVERSE=stack.inverse, **stack.constants(W, D, tiles), **tiles.launch())

    tiles = GRADIENT[stack.precision]
    side = min(tiles.columns, W)
    shares = min(SHARES, -(-N // tiles.points))
    hidden_sums = y.new_empty(shares, D, W, W)
    _kernels().weight_gradient_kernel[(W // side) ** 2, D, shares](
        g, h, hidden_sums, N, N * W, D=D, W=W, BW=side, BK=tiles.points, PRODUCT=product(stack.precision),
        **tiles.launch())
    hidden = hidden_sums.sum(0)  # (D, W, W)
    first = first_sums.sum(0)  # (W, CODE)
    of_frames = sums.sum(1)  # (B, D + 2, W)
    shared = of_frames.sum(0)  # (D + 2, W)
    columns = 2 + 4 * stack.octaves
    out = [first[:, :columns], first[:, columns], hidden[0], of_frames[:, :1]]
    for j in range(1, D):
        out += [hidden[j], shared[j]]
    return [*out, shared[D:], last_bias_sums.sum(0)]


class _CouplingStack(torch.autograd.Function):
    """Stores its output and no activations: the stack is invertible, so the backward pass computes the input of each
    layer from its output."""

    @staticmethod
    def forward(ctx, x, stack, *tensors):
        entries = len(tensors) // len(stack.coordinates)
        pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
        chains = [pairs[i:i + entries // 2] for i in range(0, len(pairs), entries // 2)]
        packed = _pack(chains, len(x), stack)
        y = _forward(x.contiguous(), packed, stack)
        ctx.save_for_backward(y, *vars(packed).values())
        ctx.stack = stack
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, *packed = ctx.saved_tensors
        packed = _Packed(*packed)
        stack = ctx.stack
        y = y.clone()
        grad = grad.clone(memory_format=torch.contiguous_format)
        order = range(len(stack.coordinates))
        grads = {k: _layer_backward(y, grad, k, packed, stack) for k in (order if stack.inverse else reversed(order))}
        return grad, None, *(tensor for k in order for tensor in grads[k])
