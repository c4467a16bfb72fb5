"""Grids: the invertible network and the field of configs/fast.txt."""

import pytest
import torch

from models.grid_field import SIDES, GridField, contract_each
from models.grids import GridNetwork, Grids, hats, sample
from models.omnimotion import ModelConfig, OmniMotion


def random_network(num_frames: int, spread: float = 0.05, **options) -> GridNetwork:
    torch.manual_seed(0)
    network = GridNetwork(num_frames, **options)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=spread)
    return network


@pytest.mark.parametrize("num_frames", [2, 3, 7, 24])
@pytest.mark.parametrize("coordinates", [(0, 1, 2, 0, 1, 2), (2, 0)])
@pytest.mark.parametrize("num_levels", [1, 4])
def test_maps_invert_each_other(num_frames, coordinates, num_levels):
    network = random_network(num_frames, coordinates=coordinates, num_levels=num_levels)
    maps = network.bind(torch.arange(num_frames))
    x = torch.rand(num_frames, 200, 3) * 4 - torch.tensor([2.0, 2.0, 1.0])  # inside the grids and far outside
    u = maps.to_canonical(x)
    assert (u - x).abs().mean() > 0.05
    assert torch.allclose(maps.to_local(u), x, atol=2e-5)
    assert torch.allclose(maps.to_canonical(maps.to_local(x)), x, atol=2e-5)


def test_a_new_network_is_the_identity():
    x = torch.rand(5, 50, 3)
    assert torch.equal(GridNetwork(5).bind(torch.arange(5)).to_canonical(x), x)


def test_rays_are_points():
    maps = random_network(4).bind(torch.tensor([3, 1]))
    x = torch.rand(2, 6, 5, 3)
    assert torch.equal(maps.rays_to_canonical(x), maps.to_canonical(x.flatten(1, 2)).view_as(x))


def test_selected_maps_are_those_of_their_frames():
    network, x = random_network(6), torch.rand(3, 40, 3)
    ids = torch.tensor([5, 0, 5])
    every = network.bind(torch.arange(6))
    assert torch.allclose(every.select(ids).to_canonical(x), network.bind(ids).to_canonical(x), atol=1e-6)
    assert torch.allclose(every.select(ids)._theta(x[..., 2]), network.thetas.plain(
        ids, (x[..., 2:] - network.centre[2]) / network.extent[2]).transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("num_frames", [2, 5, 24])
@pytest.mark.parametrize("sides", [[(3, 3)], [(3, 3), (5, 5), (9, 9)], [(2,), (5,)], [(2,), (5,), (9,)]])
def test_levels_added_up_are_levels_one_by_one(num_frames, sides):
    """Values and gradients of the sum of all levels against each level interpolated by itself."""
    if sides == [(2,), (5,), (9,)] and num_frames == 2:
        sides = sides[:1]
    torch.manual_seed(num_frames)
    grids = Grids(num_frames, 6, sides)
    for p in grids.parameters():
        torch.nn.init.normal_(p)
    ids = torch.randint(num_frames, (3,))
    a = (torch.rand(3, 50, len(sides[0])) * 2.6 - 1.3).requires_grad_()
    weight = torch.randn(3, 6, 50)
    results = []
    for values in (sample(grids(ids), a), grids.plain(ids, a)):
        results.append((values, *torch.autograd.grad((values * weight).sum(), [a, *grids.parameters()])))
    for fused, plain in zip(*results, strict=True):
        assert torch.allclose(fused, plain, atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize(("num_frames", "num_moments"), [(2, 2), (3, 2), (24, 6), (7, 7)])
def test_moments_are_shared_linearly(num_frames, num_moments):
    share = hats(num_frames, num_moments)
    assert torch.allclose(share.sum(-1), torch.ones(num_frames))
    assert (share >= 0).all() and ((share > 0).sum(-1) <= 2).all()
    assert torch.allclose(share @ torch.linspace(0, 1, num_moments), torch.linspace(0, 1, num_frames), atol=1e-6)


def test_the_field_at_a_vertex_is_the_sum_of_its_values():
    torch.manual_seed(0)
    field = GridField((0.0, 2.0))
    for p in field.parameters():
        torch.nn.init.normal_(p)
    rgb, sigma = field(torch.tensor([[0.0, 0.0, 1.0]]))  # the middle is a vertex of every level
    middle = sum(level[0, :, level.shape[2] // 2, R // 2, R // 2] for level, R in zip(field.levels, SIDES, strict=True))
    assert torch.allclose(rgb[0], middle[:3].sigmoid(), atol=1e-5)
    assert torch.allclose(sigma[0], torch.nn.functional.softplus(middle[3] - 1), atol=1e-5)


def test_points_of_the_field_do_not_depend_on_their_number():
    field, u = GridField(), torch.rand(7, 3) * 4 - 2
    for all_, some in zip(field(u), field(u[:4]), strict=True):
        assert torch.allclose(all_[:4], some, atol=1e-6)
    assert [out.shape for out in field(torch.zeros(2, 3, 5, 3))] == [(2, 3, 5, 3), (2, 3, 5)]


def test_the_field_holds_far_away():
    rgb, sigma = GridField()(torch.tensor([[1e6, -1e6, 1e6], [-1e9, 0.0, 0.0]]))
    assert rgb.isfinite().all() and sigma.isfinite().all()
    v = torch.linspace(-50, 50, 1001)
    inside = v.abs() <= 1
    assert torch.equal(contract_each(v)[inside], v[inside])
    assert (contract_each(v).diff() > 0).all() and contract_each(v).abs().max() < 2


def test_parameters_do_not_depend_on_the_options_that_grids_ignore():
    small, large = (OmniMotion(ModelConfig(5, 20, 30, deform="grid", field="grid", coupling_width=w)) for w in (8, 256))
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in large.parameters())
    assert small.time_latent.frozen.shape == (5, 0)
