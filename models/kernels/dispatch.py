"""Select the implementation of the coupling layers and the time latent (`--mlp_backend`)."""

import torch

from common.errors import UserError
from models.kernels.triton_coupling import unsupported
from third_party.tcnn import require_tcnn


def pick_backend(name: str, device: torch.device, width: int) -> str:
    """Backend for coupling layers of this width on this device: "triton" or "tcnn" if `name` is that, else "torch".

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
    return name if name in ("triton", "tcnn") else "torch"  # for other names see backend.choose_products
