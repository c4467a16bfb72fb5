"""The Triton coupling stack against its PyTorch twin, on the CPU: Triton's interpreter runs the kernels in a process of
its own (this file as a script), because it must be asked for before triton is imported."""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from models.invertible import InvertibleNetwork
from models.kernels.backend import pick_backend
from models.kernels.constants import NEGATIVE_SLOPE, S_MAX
from models.kernels.triton_coupling import coupling_stack, unsupported

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[1]
OCTAVES = 4
CASES = {  # B, M, width, hidden layers, coordinates, first_slope, inverse, precision
    "one frame": (1, 37, 16, 2, (0, 1, 2, 0, 1, 2), 0.0, False, "fp32"),
    "one frame, inverse": (1, 20, 16, 2, (0, 1, 2, 0, 1, 2), 0.0, True, "fp32"),
    "frames, three hidden layers": (3, 9, 64, 3, (2, 0, 1), NEGATIVE_SLOPE, False, "fp32"),
    "frames, three hidden layers, inverse": (3, 9, 64, 3, (2, 0, 1), NEGATIVE_SLOPE, True, "fp32"),
    "one hidden layer": (2, 33, 32, 1, (1, 2), 0.0, False, "fp32"),
    "clamped log-scale": (1, 5, 16, 2, (1,), 0.0, False, "fp32"),
    "full width": (1, 20, 256, 2, (1, 0), 0.0, False, "fp32"),
    "bf16": (2, 40, 32, 2, (0, 1, 2), 0.0, False, "bf16"),
    "bf16, inverse": (2, 40, 32, 2, (0, 1, 2), 0.0, True, "bf16"),
}


def inputs(case):
    """Points, chains and a gradient for the result, all random."""
    B, M, width, hidden, coordinates, *_ = CASES[case]
    torch.manual_seed(list(CASES).index(case))

    def linear(n_in, n_out):
        layer = nn.Linear(n_in, n_out)
        return layer.weight.detach(), layer.bias.detach()

    chains = []
    for _ in coordinates:
        weight, bias = linear(width, width)
        chains.append([linear(2 + 4 * OCTAVES, width), (weight, bias + 0.3 * torch.randn(B, 1, width)),
                       *(linear(width, width) for _ in range(hidden - 1)), linear(width, 2)])
        if case == "clamped log-scale":
            chains[-1][-1][1][0] += 50
    x, grad = torch.rand(B, M, 3) * 2 - 1, torch.randn(B, M, 3)
    return x.requires_grad_(), [[tuple(t.requires_grad_() for t in pair) for pair in chain] for chain in chains], grad


def results(case, function):
    """The result and the gradients of points, weights and biases of `function(x, chains, *rest of the case)`."""
    x, chains, grad = inputs(case)
    coordinates, first_slope, inverse, precision = CASES[case][4:]
    y = function(x, chains, coordinates, OCTAVES, first_slope, inverse, precision)
    return [y.detach(), *torch.autograd.grad(y, [x, *(t for chain in chains for pair in chain for t in pair)], grad)]


def stack(x, chains, coordinates, layer, inverse):
    """`layer(changed, kept, chain)` on each coordinate in turn."""
    x = list(x.unbind(-1))
    order = list(enumerate(coordinates))
    for k, c in reversed(order) if inverse else order:
        x[c] = layer(x[c], torch.stack([x[d] for d in range(3) if d != c], dim=-1), chains[k])
    return torch.stack(x, dim=-1)


def truncated(v):
    """To bf16 as Triton's interpreter does it, toward zero (a GPU rounds to the nearest)."""
    return (v.contiguous().view(torch.int32) & -65536).view(torch.float32)


class RoundedProduct(torch.autograd.Function):
    """h W^T whose operands, and the backward pass's, are bf16 numbers."""

    @staticmethod
    def forward(ctx, h, weight):
        h, weight = truncated(h), weight.bfloat16().float()
        ctx.save_for_backward(h, weight)
        return h @ weight.T

    @staticmethod
    def backward(ctx, g):
        h, weight = ctx.saved_tensors
        g = truncated(g)
        return g @ weight, g.flatten(0, -2).T @ h.flatten(0, -2)


def twin(x, chains, coordinates, octaves, first_slope, inverse, precision, rounded=True):
    """By the definition; bf16 operands where the kernels have them if `rounded`."""
    rounded = rounded and precision == "bf16"

    def layer(changed, kept, chain):
        angles = kept[..., None] * torch.pi * 2.0 ** torch.arange(octaves)
        code = torch.cat([kept, torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)], dim=-1)
        h = F.leaky_relu(F.linear(code, *chain[0]), first_slope)
        for weight, bias in chain[1:-1]:
            h = F.leaky_relu((RoundedProduct.apply(h, weight) if rounded else h @ weight.T) + bias, NEGATIVE_SLOPE)
        weight, bias = chain[-1]
        if rounded:  # the last weight's gradient is made of rounded activations
            bias = bias + truncated(h.detach()) @ (weight - weight.detach()).T
            weight = weight.detach()
        s, o = (h @ weight.T + bias).unbind(-1)
        s = s.clamp(-S_MAX, S_MAX)
        return changed * s.exp() + o if inverse else (changed - o) * (-s).exp()

    return stack(x, chains, coordinates, layer, inverse)


def error(found, expected):
    """Largest difference relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Results of the kernels for each case."""
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    command = [sys.executable, "-W", "ignore", __file__, str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return torch.load(path, weights_only=True)


@needs_triton
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[-1] == "fp32"])
def test_float32_stack_equals_the_layers(interpreted, case):
    for i, (found, expected) in enumerate(zip(interpreted[case], results(case, twin), strict=True)):
        assert found.shape == expected.shape
        assert error(found, expected) < 1e-5, f"tensor {i}"


@needs_triton
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[-1] == "bf16"])
def test_bf16_stack_is_the_float32_one_with_rounded_operands(interpreted, case):
    assert error(interpreted[case][0], results(case, partial(twin, rounded=False))[0]) < 1e-2  # the rounding's cost
    for i, (found, expected) in enumerate(zip(interpreted[case], results(case, twin), strict=True)):
        assert error(found, expected) < 1e-2, f"tensor {i}"


@needs_triton
def test_kernels_fit_an_a100():
    """They compile to machine code without a GPU, and few registers are spilled to memory: none with Triton 3.9, 84
    bytes with 3.6."""
    code = ("from benchmarks.kernels import SHARED_LIMIT, usages\n"
            "for name, use in usages('bf16', 80).items():\n"
            "    assert use.shared <= SHARED_LIMIT[80] and use.spilled <= 100, (name, use)\n")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=environment, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr


def test_when_the_kernels_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "--mlp_backend torch" in unsupported(torch.device("cpu"), 256)
    with pytest.raises(ValueError, match="--mlp_backend torch"):
        results("one frame", coupling_stack)
    if importlib.util.find_spec("triton") is not None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert unsupported(torch.device("cpu"), 256) is None
        assert "--coupling_width" in unsupported(torch.device("cpu"), 48)


def test_backends_that_cannot_run_say_so_in_one_line(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    assert pick_backend("auto", cpu, 256) == pick_backend("torch", cpu, 256) == "torch"
    for name in ("triton", "tcnn"):
        with pytest.raises(UserError, match="--mlp_backend torch") as caught:
            pick_backend(name, cpu, 256)
        assert "\n" not in str(caught.value)


def through_network(backend):
    """Points through a whole network and back in other frames, and all its gradients."""
    torch.manual_seed(3)
    network = InvertibleNetwork(width=16, latent_dim=8, affine_width=16, affine_layers=2, coordinates=(0, 1, 2),
                                backend=backend)
    f, x = torch.randn(3, 8, requires_grad=True), (torch.rand(2, 9, 3) * 2 - 1).requires_grad_()
    maps = network.bind(f, torch.rand(3, 1))
    u = maps.select(torch.tensor([0, 2])).to_canonical(x)
    back = maps.select(torch.tensor([1, 1])).to_local(u)
    inputs = [x, f, *network.parameters()]
    return [u.detach(), back.detach(), *torch.autograd.grad(back.square().sum() + u.sum(), inputs)]


@needs_triton
def test_network_with_the_kernels(interpreted):
    for found, expected in zip(interpreted["network"], through_network("torch"), strict=True):
        assert error(found, expected) < 1e-5


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save({"network": through_network("triton"), **{case: results(case, coupling_stack) for case in CASES}},
               sys.argv[1])
