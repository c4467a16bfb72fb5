"""The time latent and the coupling layers' MLPs as fused CUDA networks of tiny-cuda-nn (Mueller, NVlabs, BSD-3).

Notation
    params   all parameters of a tiny-cuda-nn module as one float32 vector
    in, out  number of inputs and outputs
    W, D     width and number of the hidden layers

The conversion to PyTorch's state dicts depends on the layout of `params`. It was read from tiny-cuda-nn's sources at
commit 6ee3546 (April 2026) and has not been checked on a GPU:
    network_with_input_encoding.h      the network's parameters, then the encoding's
    fully_fused_mlp.cu, cutlass_mlp.cu  matrices W x in, (D - 1) times W x W, out x W, in row-major order, no biases;
                                       `in` and `out` are rounded up to multiples of 16
    grid.h                             levels in order, each with min(resolution^dims rounded up to a multiple of 8,
                                       2^log2_hashmap_size) entries; the features of an entry are adjacent
    identity.h                         a network without an encoding pads its inputs with ones
    modules.py (PyTorch bindings)      `params` is float32 and rounded to float16 in each call; results are float16
grid.h computes a level's scale in float32. Compared with the PyTorch implementation, points at the finest level move by
up to 0.003 of a cell.
"""

import importlib.util

import torch
from torch import Tensor, nn

from common.errors import UserError

INSTALL = "pip install git+https://github.com/NVlabs/tiny-cuda-nn/#subdirectory=bindings/torch"
FULLY_FUSED = (16, 32, 64, 128)  # layer widths that FullyFusedMLP supports; CutlassMLP supports all
WIDTH = 64         # of the time latent's MLP
HIDDEN_LAYERS = 2  # of the time latent's MLP
FEATURES = 32      # outputs of the time latent's hash grid
ENCODING = {"otype": "HashGrid", "n_levels": 16, "n_features_per_level": 2, "log2_hashmap_size": 15,
            "base_resolution": 16, "per_level_scale": 1.5, "interpolation": "Linear"}


def require_tcnn():
    """The module `tinycudann`. UserError if it or a CUDA device is missing; the message says how to install it."""
    if not torch.cuda.is_available():
        raise UserError("--mlp_backend tcnn needs a CUDA device, and PyTorch finds none here: use --mlp_backend torch")
    if importlib.util.find_spec("tinycudann") is None:
        raise UserError("--mlp_backend tcnn needs tinycudann, which is not installed: install the CUDA toolkit "
                        f"and a C++ compiler, then run {INSTALL}")
    import tinycudann

    return tinycudann


def network_config(width: int, hidden_layers: int, activation: str) -> dict:
    """tiny-cuda-nn's configuration of an MLP: fully fused if its width is supported, else CutlassMLP."""
    return {"otype": "FullyFusedMLP" if width in FULLY_FUSED else "CutlassMLP", "activation": activation,
            "output_activation": "None", "n_neurons": width, "n_hidden_layers": hidden_layers}


def matrix_shapes(in_dim: int, width: int, hidden_layers: int, out_dim: int) -> list[tuple[int, int]]:
    """Shapes (rows, columns) of a network's matrices in the order of `params`."""
    first, last = (-(-n // 16) * 16 for n in (in_dim, out_dim))
    return [(width, first), *[(width, width)] * (hidden_layers - 1), (last, width)]


def split_params(params: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """Views of the matrices at the start of `params`, and as the last item of everything after them."""
    sizes = [rows * columns for rows, columns in shapes]
    *matrices, rest = params.split([*sizes, len(params) - sum(sizes)])
    return [*(matrix.view(shape) for matrix, shape in zip(matrices, shapes, strict=True)), rest]


class _AsPyTorch(nn.Module):
    """A tiny-cuda-nn module with the state dict (names and values) of the equivalent PyTorch module.

    Model weights can be loaded in both directions. Optimizer states cannot: they have one vector for `params` here and
    an array per layer in PyTorch."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.register_state_dict_post_hook(_save)
        self.register_load_state_dict_pre_hook(_load)

    def to_state(self, params: Tensor) -> dict[str, Tensor]:
        """The PyTorch module's state dict from `params`."""
        raise NotImplementedError

    def to_params(self, state: dict[str, Tensor]) -> Tensor:
        """The inverse of `to_state`."""
        raise NotImplementedError


def _save(module: _AsPyTorch, state: dict, prefix: str, metadata: dict) -> None:
    params = state.pop(f"{prefix}network.params")
    state.update({prefix + name: value for name, value in module.to_state(params.detach()).items()})


def _load(module: _AsPyTorch, state: dict, prefix: str, *_) -> None:
    names = module.to_state(module.network.params.detach()).keys()
    if all(prefix + name in state for name in names):  # otherwise load_state_dict reports the missing names
        state[f"{prefix}network.params"] = module.to_params({name: state.pop(prefix + name) for name in names})


class TcnnHashLatent(_AsPyTorch):
    """`models.time_latent.HashLatent` as a `tinycudann.NetworkWithInputEncoding`."""

    def __init__(self, dim: int = 128):
        super().__init__(require_tcnn().NetworkWithInputEncoding(
            2, dim, ENCODING, network_config(WIDTH, HIDDEN_LAYERS, "ReLU"), seed=_seed()))
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        """Times `(T, 1)` -> latents `(T, dim)` float32."""
        return self.network(torch.cat([t, torch.log(t + 1)], dim=-1)).float()

    def to_state(self, params: Tensor) -> dict[str, Tensor]:
        *matrices, table = split_params(params, matrix_shapes(FEATURES, WIDTH, HIDDEN_LAYERS, self.dim))
        matrices[-1] = matrices[-1][:self.dim]
        state = {f"mlp.{2 * i}.weight": matrix.clone() for i, matrix in enumerate(matrices)}
        return {"grid.table": table.view(-1, ENCODING["n_features_per_level"]).clone(), **state}

    def to_params(self, state: dict[str, Tensor]) -> Tensor:
        matrices = [state[f"mlp.{2 * i}.weight"] for i in range(HIDDEN_LAYERS + 1)]
        padding = matrices[-1].new_zeros(-self.dim % 16, WIDTH)
        return torch.cat([part.flatten() for part in (*matrices, padding, state["grid.table"])])


class TcnnMlp(_AsPyTorch):
    """MLP with LeakyReLUs, `(..., in_dim)` -> `(..., out_dim)` float32, as a `tinycudann.Network`.

    It is equivalent to an `nn.Sequential` of Linear layers without biases, and initialized like them. It computes in
    float16, so results have 11 significant bits. tiny-cuda-nn pads the inputs to a multiple of 16 with ones: if
    `in_dim` is not a multiple of 16, the weights of the padding act as the bias of the first layer."""

    def __init__(self, in_dim: int, width: int, hidden_layers: int, out_dim: int):
        super().__init__(require_tcnn().Network(
            in_dim, out_dim, network_config(width, hidden_layers, "LeakyReLU"), seed=_seed()))
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.shapes = matrix_shapes(in_dim, width, hidden_layers, out_dim)
        with torch.no_grad():
            for matrix in split_params(self.network.params, self.shapes)[:-1]:
                matrix.uniform_(-1, 1).mul_(matrix.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.flatten(0, -2)).float().unflatten(0, x.shape[:-1])

    def to_state(self, params: Tensor) -> dict[str, Tensor]:
        matrices = split_params(params, self.shapes)[:-1]
        biases = [matrix.new_zeros(len(matrix)) for matrix in matrices]
        biases[0] = matrices[0][:, self.in_dim:].sum(1)
        matrices[0] = matrices[0][:, :self.in_dim]
        matrices[-1] = matrices[-1][:self.out_dim]
        biases[-1] = biases[-1][:self.out_dim]
        state = {}
        for i, (weight, bias) in enumerate(zip(matrices, biases, strict=True)):
            state[f"{2 * i}.weight"] = weight.clone()
            state[f"{2 * i}.bias"] = bias.clone()
        return state

    def to_params(self, state: dict[str, Tensor]) -> Tensor:
        """UserError if a layer has biases that `params` cannot represent."""
        padded = self.shapes[0][1] > self.in_dim
        if any(state[f"{2 * i}.bias"].any() for i in range(padded, len(self.shapes))):
            raise UserError("--mlp_backend tcnn: the coupling layers of this checkpoint have biases, which "
                            "tiny-cuda-nn does not support: use --mlp_backend torch, or train with tcnn from the start")
        parts = [state["0.weight"].new_zeros(shape) for shape in self.shapes]
        for i, part in enumerate(parts):
            weight = state[f"{2 * i}.weight"]
            part[:len(weight), :weight.shape[1]] = weight
        if padded:
            parts[0][:, self.in_dim] = state["0.bias"]
        return torch.cat([part.flatten() for part in parts])


def _seed() -> int:
    """A seed for tiny-cuda-nn's own random generator, drawn from PyTorch's."""
    return int(torch.randint(2**31, ()))
