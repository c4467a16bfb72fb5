"""How the matrix products of the networks are made: in which precision, by which kernels.

Coordinates, depths, the application of a coupling's (s, o), compositing and losses are float32 always.
"""

from dataclasses import dataclass

import torch
from torch import nn

from errors import UserError
from models import native


@dataclass(frozen=True)
class Products:
    """`dtype` of the products' operands, None for the parameters' own; `native`: the C++ kernels, None for PyTorch."""
    dtype: torch.dtype | None = None
    native: object | None = None


def choose_products(precision: str, backend: str, device: torch.device) -> Products:
    """The products for `--precision` and `--mlp_backend` on `device`; sets PyTorch's tf32 switch.

    `auto` is bfloat16 where the hardware has it (CUDA from Ampere on; CPUs with AMX), else float32. UserError for what
    the device cannot do."""
    cuda = device.type == "cuda"
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if cuda else native.matrix_unit()
        precision = "bf16" if fast and backend != "tcnn" else "fp32"
    if precision == "tf32" and not cuda:
        raise UserError("--precision tf32 is for CUDA devices: say fp32 or bf16")
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    if backend == "native":
        if cuda or precision != "bf16":
            raise UserError("--mlp_backend native computes bf16 on the CPU: add --device cpu --precision bf16, or say "
                            "--mlp_backend auto")
        if native.kernels() is None:
            raise UserError("--mlp_backend native needs a CPU with AMX, g++ and ninja: say --mlp_backend auto")
    if precision != "bf16":
        return Products()
    use_native = not cuda and backend in ("auto", "native")
    return Products(torch.bfloat16, native.kernels() if use_native else None)


def set_products(model: nn.Module, products: Products) -> None:
    """Let all networks of an `OmniMotion` that have a fast path use `products`."""
    model.deform.products = model.field.net.products = products
