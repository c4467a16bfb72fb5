"""The adapter to tiny-cuda-nn, on a machine without it: a stand-in evaluates `params` as tiny-cuda-nn's sources say."""

import math
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import UserError
from models.factory import model_from_state
from models.invertible import mlp
from models.omnimotion import ModelConfig, OmniMotion
from models.time_latent import HashLatent, frame_times
from third_party import tcnn


def error(found, expected):
    """Largest difference relative to the largest value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def up16(n):
    return (n + 15) // 16 * 16


def network(params, x, config, n_in, n_out):
    """Evaluate the matrices at the start of `params`, by offsets; returns the result and where they end."""
    act = {"ReLU": torch.relu, "LeakyReLU": lambda v: nn.functional.leaky_relu(v, 0.01)}[config["activation"]]
    width, offset = config["n_neurons"], 0
    columns = up16(n_in)
    x = torch.cat([x, x.new_ones(*x.shape[:-1], columns - n_in)], dim=-1)
    n_in = columns
    for _ in range(config["n_hidden_layers"]):
        rows = [params[offset + r * columns:offset + r * columns + n_in] for r in range(width)]
        x = act(torch.stack([x @ row for row in rows], dim=-1))
        offset += width * columns
        n_in = columns = width
    rows = [params[offset + r * width:offset + (r + 1) * width] for r in range(n_out)]
    return torch.stack([x @ row for row in rows], dim=-1), offset + up16(n_out) * width


def grid_levels(config, dims):
    """(scale, resolution, entries) a level, in single precision."""
    log2_growth = np.log2(np.float32(config["per_level_scale"]))
    for level in range(config["n_levels"]):
        scale = np.exp2(np.float32(level) * log2_growth) * np.float32(config["base_resolution"]) - np.float32(1)
        resolution = math.ceil(scale) + 1
        yield float(scale), resolution, min((resolution**dims + 7) // 8 * 8, 2 ** config["log2_hashmap_size"])


def encode(params, x, config):
    """Features `(n, levels * features)` of points `(n, 2)`, corner by corner."""
    F, rows = config["n_features_per_level"], []
    for point in x.tolist():
        row, first = [], 0
        for scale, resolution, entries in grid_levels(config, 2):
            position = [scale * p + 0.5 for p in point]
            value = torch.zeros(F)
            for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
                cell = [math.floor(p) + c for p, c in zip(position, corner, strict=True)]
                weight = math.prod(p % 1 if c else 1 - p % 1 for p, c in zip(position, corner, strict=True))
                index = cell[0] + cell[1] * resolution
                if resolution**2 > entries:
                    index = (cell[0] ^ (cell[1] * 2654435761)) & 0xFFFFFFFF
                at = (first + index % entries) * F
                value = value + weight * params[at:at + F]
            row.append(value)
            first += entries
        rows.append(torch.cat(row))
    return torch.stack(rows)


class Network(nn.Module):
    def __init__(self, n_in, n_out, config, seed):
        super().__init__()
        self.sizes, self.config = (n_in, n_out), config
        width, hidden = config["n_neurons"], config["n_hidden_layers"]
        self.params = nn.Parameter(torch.zeros(width * (up16(n_in) + (hidden - 1) * width + up16(n_out))))

    def forward(self, x):
        return network(self.params, x, self.config, *self.sizes)[0].half()


class NetworkWithInputEncoding(nn.Module):
    def __init__(self, n_in, n_out, encoding, config, seed):
        super().__init__()
        self.encoding, self.config, self.n_out = encoding, config, n_out
        features = encoding["n_levels"] * encoding["n_features_per_level"]
        width, entries = config["n_neurons"], sum(entries for *_, entries in grid_levels(encoding, n_in))
        count = width * (features + (config["n_hidden_layers"] - 1) * width + up16(n_out))
        generator = torch.Generator().manual_seed(seed)
        count += entries * encoding["n_features_per_level"]
        self.params = nn.Parameter(0.1 * torch.randn(count, generator=generator))

    def forward(self, x):
        n_in = self.encoding["n_levels"] * self.encoding["n_features_per_level"]
        end = network(self.params, torch.zeros(1, n_in), self.config, n_in, self.n_out)[1]
        return network(self.params, encode(self.params[end:], x, self.encoding), self.config, n_in, self.n_out)[0]


@pytest.fixture
def stand_in(monkeypatch):
    """`tinycudann` as far as the adapter uses it."""
    module = SimpleNamespace(Network=Network, NetworkWithInputEncoding=NetworkWithInputEncoding)
    monkeypatch.setattr(tcnn, "require_tcnn", lambda: module)


@pytest.mark.parametrize("dim", [128, 24])
def test_time_latents_load_each_others_checkpoints(stand_in, dim):
    """A state dict of either gives the other the same function, and comes back as it was."""
    torch.manual_seed(0)
    ours, theirs, t = HashLatent(dim), tcnn.TcnnHashLatent(dim), frame_times(5)
    state = {name: torch.randn_like(value) * 0.1 for name, value in ours.state_dict().items()}
    assert ours.load_state_dict(state) and theirs.load_state_dict(state)
    assert error(theirs(t), ours(t)) < 1e-2  # single precision at the finest level; a wrong layout gives 1
    back = theirs.state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)

    fresh = HashLatent(dim)
    other = tcnn.TcnnHashLatent(dim)
    fresh.load_state_dict(other.state_dict())
    assert error(fresh(t), other(t)) < 1e-2


@pytest.mark.parametrize("in_dim,width,hidden", [(48, 32, 2), (37, 48, 1), (384, 256, 3)])
def test_coupling_mlps_are_read_without_tcnn(stand_in, in_dim, width, hidden):
    """A checkpoint that was trained with tiny-cuda-nn works on a machine without it."""
    torch.manual_seed(1)
    theirs, x = tcnn.TcnnMlp(in_dim, width, hidden, 2), torch.randn(3, 4, in_dim)
    ours = mlp([in_dim] + [width] * hidden + [2], nn.LeakyReLU)
    ours.load_state_dict(theirs.state_dict())
    assert theirs(x).shape == (3, 4, 2) and theirs(x).dtype == torch.float32
    assert error(theirs(x), ours(x)) < 2e-3  # results are half precision
    other = tcnn.TcnnMlp(in_dim, width, hidden, 2)
    other.load_state_dict(theirs.state_dict())
    assert error(other(x), theirs(x)) < 2e-3


def test_biases_have_no_place_in_tcnn(stand_in):
    with pytest.raises(UserError, match="biases"):
        tcnn.TcnnMlp(48, 32, 2, 2).load_state_dict(mlp([48, 32, 32, 2], nn.LeakyReLU).state_dict())


def test_whole_model_on_tcnn(stand_in):
    """It maps there and back, all of it learns, and its checkpoint is an ordinary one, before and after freezing."""
    torch.manual_seed(0)
    config = ModelConfig(num_frames=3, height=12, width=16, num_samples_ray=4, coupling_width=16, affine_width=16,
                         affine_layers=2, field_width=16, latent_dim=16)
    model, p, ids = OmniMotion(config, "tcnn"), torch.rand(2, 3, 2) * 10, torch.tensor([0, 2])
    out = model.predict_pairs(p, ids, ids.flip(0))
    (out.pixels.sum() + out.rgb.sum()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in (*model.deform.layers[0].parameters(),
                                                                *model.time_latent.parameters()))
    maps = model.maps(ids)
    assert (maps.to_local(maps.to_canonical(out.local.flatten(1, 2))) - out.local.flatten(1, 2)).abs().max() < 1e-4
    for _ in range(2):
        plain = model_from_state(asdict(config), model.state_dict())
        ours, theirs = (m.predict_pairs(p, ids, ids.flip(0)).target for m in (plain, model))
        assert error(theirs, ours) < 1e-2
        assert model_from_state(asdict(config), model.state_dict(), "tcnn").deform.backend == "tcnn"
        model.time_latent.freeze()


def test_missing_parameters_are_named(stand_in):
    state = HashLatent(16).state_dict()
    del state["mlp.2.weight"]
    with pytest.raises(RuntimeError, match=r"network\.params"):
        tcnn.TcnnHashLatent(16).load_state_dict(state)


@pytest.mark.parametrize("width,kind", [(32, "FullyFusedMLP"), (48, "CutlassMLP"), (256, "CutlassMLP")])
def test_kind_and_initialization_of_coupling_mlps(stand_in, width, kind):
    """Fully fused where it can be; initialized as nn.Linear, from PyTorch's seed."""
    torch.manual_seed(1)
    net = tcnn.TcnnMlp(width, width, 2, 2)
    assert net.network.config["otype"] == kind
    hidden = net.state_dict()["2.weight"]
    assert hidden.abs().max() <= width**-0.5 and hidden.std() > 0.5 * width**-0.5
    torch.manual_seed(1)
    assert torch.equal(tcnn.TcnnMlp(width, width, 2, 2).network.params, net.network.params)


def test_a_missing_tinycudann_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA device"):
        tcnn.require_tcnn()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "tinycudann", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install git") as caught:
        tcnn.require_tcnn()
    assert "\n" not in str(caught.value)


def test_on_a_gpu():
    """The same function from the real tinycudann."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: tinycudann itself was not run")
    pytest.importorskip("tinycudann")
    ours, theirs, t = HashLatent(128).cuda(), tcnn.TcnnHashLatent(128), frame_times(40).cuda()
    with torch.no_grad():
        ours.grid.table.uniform_(-1, 1)
    theirs.load_state_dict(ours.state_dict())
    assert error(theirs(t), ours(t)) < 2e-2
