"""tiny-cuda-nn (Mueller, NVlabs, BSD-3): the time latent and the coupling layers' MLPs as its fused CUDA networks.

Notation
    params   all parameters of a tiny-cuda-nn module as one float32 vector
    in, W, D, out   inputs, width of the hidden layers, number of them, outputs

Layout of `params` of NetworkWithInputEncoding, which the conversion relies on. Read from the sources at commit 6ee3546
(April 2026), not seen on a GPU:
    network_with_input_encoding.h      the network's parameters, then the encoding's
    fully_fused_mlp.cu, cutlass_mlp.cu  matrices W x in, (D - 1) times W x W, out x W, row by row, without biases; in
                                       and out rounded up to multiples of 16
    grid.h                             levels in order, of min(resolution^dims rounded up to 8, 2^log2_hashmap_size)
                                       entries; an entry's features side by side
    identity.h                         inputs of a network without an encoding; those that pad it are 1
    modules.py (PyTorch bindings)      float32; rounded to float16 for each call, and so are the results
grid.h computes a level's scale in single precision, which moves points by up to 0.003 of a cell at the finest level of
our grid against its PyTorch twin.
"""

import importlib.util

import torch
from torch import Tensor, nn

from common.errors import UserError

INSTALL = "pip install git+https://github.com/NVlabs/tiny-cuda-nn/#subdirectory=bindings/torch"
FULLY_FUSED = (16, 32, 64, 128)  # widths that its fully fused MLP takes; CutlassMLP takes all
WIDTH, HIDDEN_LAYERS, FEATURES = 64, 2, 32  # of the time latent's MLP, and features of its hash grid
ENCODING = {"otype": "HashGrid", "n_levels": 16, "n_features_per_level": 2, "log2_hashmap_size": 15,
            "base_resolution": 16, "per_level_scale": 1.5, "interpolation": "Linear"}


def require_tcnn():
    """The module `tinycudann`. UserError, which says how to install it, where it or a CUDA device is missing."""
    if not torch.cuda.is_available():
        raise UserError("--mlp_backend tcnn needs a CUDA device, and PyTorch finds none here: say --mlp_backend torch")
    if importlib.util.find_spec("tinycudann") is None:
        raise UserError("--mlp_backend tcnn needs tinycudann, which is not installed: with the CUDA toolkit and a C++ "
                        f"compiler at hand, {INSTALL}")
    import tinycudann

    return tinycudann


def network_config(width: int, hidden_layers: int, activation: str) -> dict:
    """Of a fully fused MLP where its width allows one."""
    return {"otype": "FullyFusedMLP" if width in FULLY_FUSED else "CutlassMLP", "activation": activation,
            "output_activation": "None", "n_neurons": width, "n_hidden_layers": hidden_layers}


def matrix_shapes(in_dim: int, width: int, hidden_layers: int, out_dim: int) -> list[tuple[int, int]]:
    """Shapes of a network's matrices in the order in which `params` has them."""
    first, last = (-(-n // 16) * 16 for n in (in_dim, out_dim))
    return [(width, first), *[(width, width)] * (hidden_layers - 1), (last, width)]


def split_params(params: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """The matrices at the start of `params`, and what follows them, as views."""
    sizes = [rows * columns for rows, columns in shapes]
    *matrices, rest = params.split([*sizes, len(params) - sum(sizes)])
    return [*(matrix.view(shape) for matrix, shape in zip(matrices, shapes, strict=True)), rest]


class _AsPyTorch(nn.Module):
    """A tiny-cuda-nn module whose state dict is its PyTorch twin's, names and values, so that a checkpoint of either
    loads into the other. Not so an optimizer's state: it has one vector here and an array a layer there."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.register_state_dict_post_hook(_save)
        self.register_load_state_dict_pre_hook(_load)

    def to_state(self, params: Tensor) -> dict[str, Tensor]:
        """The twin's state dict from `params`."""
        raise NotImplementedError

    def to_params(self, state: dict[str, Tensor]) -> Tensor:
        """The inverse of `to_state`."""
        raise NotImplementedError


def _save(module: _AsPyTorch, state: dict, prefix: str, metadata: dict) -> None:
    params = state.pop(f"{prefix}network.params")
    state.update({prefix + name: value for name, value in module.to_state(params.detach()).items()})


def _load(module: _AsPyTorch, state: dict, prefix: str, *_) -> None:
    names = module.to_state(module.network.params.detach()).keys()
    if all(prefix + name in state for name in names):  # else load_state_dict says what is missing
        state[f"{prefix}network.params"] = module.to_params({name: state.pop(prefix + name) for name in names})


class TcnnHashLatent(_AsPyTorch):
    """`models.time_latent.HashLatent` as `tcnn.NetworkWithInputEncoding`."""

    def __init__(self, dim: int = 128):
        super().__init__(require_tcnn().NetworkWithInputEncoding(
            2, dim, ENCODING, network_config(WIDTH, HIDDEN_LAYERS, "ReLU"), seed=_seed()))
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        """`(T, 1)` -> `(T, dim)` float32."""
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
    """MLP with LeakyReLUs, `(..., in_dim)` -> `(..., out_dim)` float32, as `tcnn.Network`: the twin of an
    `nn.Sequential` of Linear layers whose biases are 0, initialized like it.

    Products and results are float16, so that a result has 11 significant bits. Padding inputs are 1, so that a first
    layer whose inputs are no multiple of 16 does have a bias."""

    def __init__(self, in_dim: int, width: int, hidden_layers: int, out_dim: int):
        super().__init__(require_tcnn().Network(
            in_dim, out_dim, network_config(width, hidden_layers, "LeakyReLU"), seed=_seed()))
        self.in_dim, self.out_dim = in_dim, out_dim
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
        matrices[-1], biases[-1] = matrices[-1][:self.out_dim], biases[-1][:self.out_dim]
        return {f"{2 * i}.{name}": value.clone() for i, layer in enumerate(zip(matrices, biases, strict=True))
                for name, value in zip(("weight", "bias"), layer, strict=True)}

    def to_params(self, state: dict[str, Tensor]) -> Tensor:
        """UserError if there are biases, which have no place in `params`."""
        first, padded = state["0.weight"], self.shapes[0][1] > self.in_dim
        if any(state[f"{2 * i}.bias"].any() for i in range(padded, len(self.shapes))):
            raise UserError("--mlp_backend tcnn: this checkpoint's coupling layers have biases, which tiny-cuda-nn's "
                            "cannot have: say --mlp_backend torch, or train with tcnn from the start")
        parts = [first.new_zeros(shape) for shape in self.shapes]
        for i, part in enumerate(parts):
            weight = state[f"{2 * i}.weight"]
            part[:len(weight), :weight.shape[1]] = weight
        if padded:
            parts[0][:, self.in_dim] = state["0.bias"]
        return torch.cat([part.flatten() for part in parts])


def _seed() -> int:
    """A seed from PyTorch's generator: tiny-cuda-nn draws its first parameters with one of its own."""
    return int(torch.randint(2**31, ()))
