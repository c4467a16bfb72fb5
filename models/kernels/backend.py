"""Implementation of the networks (`--mlp_backend`), and precision and kernels of their matrix products (`--precision`).

Coordinates, depths, the coupling transform with (s, o), compositing and losses are always float32.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import UserError
from models.kernels import native
from models.kernels.triton_coupling import unsupported
from third_party.tcnn import require_tcnn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Products:
    """How matrix products are computed."""
    dtype: torch.dtype | None = None  # dtype to which operands are rounded; None: no rounding
    native: object | None = None      # namespace of the C++ kernels; None: PyTorch
    emulated: bool = False            # multiply the rounded operands as float32 (hardware without products in `dtype`)

    def operand(self, x: Tensor) -> Tensor:
        """`x` as an operand of a product: rounded to `dtype`, in float32 if `emulated`."""
        if self.dtype is None:
            return x
        rounded = x.to(self.dtype)
        return rounded.float() if self.emulated else rounded


def pick_backend(name: str, device: torch.device, width: int) -> str:
    """Implementation of coupling layers of this width and of the time latent on this device: "triton" or "tcnn" if
    `name` is that, else "torch" (for which `choose_products` tells `auto`, `torch` and `native` apart).

    `auto` selects "torch" and does not use triton, because the kernels have not been measured on a GPU yet. Raises
    UserError, with the remedy, if the requested backend cannot run."""
    if name == "triton":
        reason = unsupported(device, width)
        if reason:
            raise UserError(f"--mlp_backend triton: {reason}")
    if name == "tcnn":
        if device.type != "cuda":
            raise UserError("--mlp_backend tcnn needs a CUDA device: say --device cuda, or --mlp_backend torch")
        require_tcnn()
    return name if name in ("triton", "tcnn") else "torch"


def choose_products(precision: str, backend: str, device: torch.device) -> Products:
    """Select the products for `--precision` and `--mlp_backend` on `device`; sets PyTorch's global TF32 flag.

    `--precision auto` is bfloat16 on hardware that supports it (CUDA from Ampere on, CPUs with AMX), else float32.
    Raises UserError if the device does not support the options."""
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
    if cuda:
        return Products(torch.bfloat16)
    kernels = native.kernels() if backend in ("auto", "native") else None
    if not bf16_units():
        log.warning("--precision bf16: this CPU has no bf16 products; rounded operands are multiplied as float32, "
                    "which is slower than --precision fp32")
    return Products(torch.bfloat16, kernels, emulated=kernels is None and not bf16_units())


def bf16_units() -> bool:
    """Whether this CPU has instructions for bfloat16 products (AVX512-BF16 or AMX). On other CPUs, PyTorch's bfloat16
    products are 20 times slower than its float32 products."""
    return native.matrix_unit() or torch.cpu.get_capabilities().get("avx512_bf16", False)


def set_products(model: nn.Module, products: Products) -> None:
    """Set `products` on the networks of an `OmniMotion` model that have a fast version."""
    for network in (model.deform, getattr(model.field, "net", None)):
        if hasattr(network, "products"):
            network.products = products
