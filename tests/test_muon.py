"""Muon against PyTorch's, which iterates in bfloat16."""

import pytest
import torch

from training import muon
from training.muon import Muon, orthogonalize


def matrices():
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in ((24, 24), (8, 30), (24, 24), (30, 8))]


@pytest.mark.parametrize("fast", [False, True])
def test_steps_like_pytorchs(fast, monkeypatch):
    monkeypatch.setattr(muon, "bf16_units", lambda: fast)
    ours, theirs = matrices(), matrices()
    start = [p.detach().clone() for p in ours]
    one = Muon(ours, lr=0.01)
    two = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for params, optimizer in ((ours, one), (theirs, two)):
            torch.manual_seed(step)
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
    for a, b, s in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - s).norm()  # bfloat16
    one.load_state_dict(two.state_dict() | {"param_groups": one.state_dict()["param_groups"]})  # the same states
    torch.testing.assert_close(one.state[ours[0]]["momentum_buffer"], two.state[theirs[0]]["momentum_buffer"])


def test_singular_values_come_near_one_and_directions_stay():
    u = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    x = orthogonalize(u)
    values = torch.linalg.svdvals(x)
    assert 0.6 < values.min() and values.max() < 1.3
    left, _, right = torch.linalg.svd(u, full_matrices=False)
    inner = left.mT @ x @ right.mT  # diagonal if the singular directions are the same
    off = inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))
    assert off.norm() < 0.05 * inner.norm()
    torch.testing.assert_close(orthogonalize(u[1:2])[0], x[1], rtol=0, atol=1e-2)


def test_without_a_gradient_nothing_moves():
    params = matrices()
    before = [p.detach().clone() for p in params]
    Muon(params, lr=0.1).step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
