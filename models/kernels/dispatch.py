"""Which code runs the coupling layers and the time latent: `--mlp_backend`."""

import torch

from common.errors import UserError
from models.kernels.triton_coupling import unsupported
from third_party.tcnn import require_tcnn


def pick_backend(name: str, device: torch.device, width: int) -> str:
    """"triton" or "tcnn" if asked for, else "torch", for coupling layers of this width on this device.

    `auto` is not triton until the kernels have been measured on a GPU. UserError where a backend that is asked
    for cannot run; its line says what to do."""
    if name == "triton":
        reason = unsupported(device, width)
        if reason:
            raise UserError(f"--mlp_backend triton: {reason}")
    if name == "tcnn":
        if device.type != "cuda":
            raise UserError("--mlp_backend tcnn needs a CUDA device: say --device cuda, or --mlp_backend torch")
        require_tcnn()
    return name if name in ("triton", "tcnn") else "torch"  # other names choose among PyTorch's products
