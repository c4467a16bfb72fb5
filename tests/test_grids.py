"""Grids: the invertible network and the field of configs/fast.txt."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from configs.options import parse
from loaders.checkpoint import Checkpoint
from models import grid_deformation
from models.factory import checkpoint_num_frames, model_from_state, new_model
from models.grid_deformation import GridMaps, GridNetwork, Grids, moment_counts, sample
from models.grid_field import DENSITY_SCALE, SIDES, GridField, contract_each
from models.invertible import invert_affine
from models.omnimotion import ModelConfig, OmniMotion

KINDS = pytest.mark.parametrize("kind,field", [("grid", "grid"), ("warp", "images")])


def random_network(num_frames: int, spread: float = 0.15, num_levels: int = 3, num_layers: int = 2) -> GridNetwork:
    """Displacements of neighboring vertices differ by about `spread` of a cell."""
    torch.manual_seed(0)
    network = GridNetwork(num_frames, num_levels=num_levels, num_layers=num_layers)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=spread / p.shape[-1])
    return network


def levels_one_by_one(grids: Grids, ids: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Reference version of `sample(grids(ids), a)`: each grid is interpolated separately."""
    num_frames, total = len(grids.before_0), 0
    for grid, scale in zip(grids.values, grids.scales, strict=True):
        moment = torch.linspace(0, len(grid) - 1, num_frames)
        share = (1 - (moment[:, None] - torch.arange(len(grid))).abs()).clamp(min=0)  # (num_frames, moments)
        total = total + sample(torch.einsum("tm,m...->t...", share, grid * scale)[ids], a)
    return total


def points(num_frames: int, count: int = 200) -> torch.Tensor:
    """Inside the grids and far outside."""
    return torch.rand(num_frames, count, 3) * 4 - torch.tensor([2.0, 2.0, 1.0])


@pytest.mark.parametrize("num_frames", [2, 3, 7, 24])
@pytest.mark.parametrize("num_levels", [1, 4])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_maps_invert_each_other(num_frames, num_levels, num_layers):
    maps = random_network(num_frames, num_levels=num_levels, num_layers=num_layers).bind(torch.arange(num_frames))
    x = points(num_frames)
    with torch.no_grad():
        u = maps.to_canonical(x)
        assert (u - x).abs().mean() > 0.02
        assert torch.allclose(maps.to_local(u), x, atol=2e-5)
        assert torch.allclose(maps.to_canonical(maps.to_local(x)), x, atol=2e-5)


def test_steep_maps_are_inverted_too():
    """Slopes beyond 1, for which the fixed-point iteration x = y - f(x) diverges; where nothing folds."""
    maps = random_network(6, 0.28).bind(torch.arange(6))
    x = torch.rand(6, 2_000, 3) * 2 - torch.tensor([1.0, 1.0, 0.0])
    J = maps.displacement_and_slope(x)[1]
    one_to_one = torch.linalg.det(J + torch.eye(2)) > grid_deformation.MIN_DETERMINANT
    steep = one_to_one & (J.abs().sum(-1).amax(-1) > 1)
    with torch.no_grad():
        error = (maps.to_local(maps.to_canonical(x)) - x).norm(dim=-1)
    assert steep.float().mean() > 0.01 and one_to_one.float().mean() > 0.98
    assert error[one_to_one].quantile(0.99) < 1e-5 and error[steep].median() < 1e-6


def test_the_inverse_of_training_is_near_enough():
    maps, x = random_network(6).bind(torch.arange(6)), points(6, 2_000)
    u = maps.to_canonical(x).detach()
    error = (maps.to_local(u.requires_grad_()) - x).norm(dim=-1)
    assert error.quantile(0.99) < 1e-4 and error.max() < 0.02  # of half a frame


@pytest.mark.parametrize("spread", [2.0, 20.0])
def test_folds_and_nonfinite_points_give_finite_results(spread):
    """Where volumes overlap there is no inverse: what comes out is finite and in reach, as are its gradients."""
    network = random_network(4, spread)
    for p in network.thetas.parameters():
        torch.nn.init.zeros_(p)
    maps = network.bind(torch.arange(4))
    u = (torch.rand(4, 500, 3) * 2 - torch.tensor([1.0, 1.0, 0.0])).requires_grad_()
    x = maps.to_local(u)
    x.abs().sum().backward()
    assert (x - u).abs().max() <= maps.layers.abs().max() + 2 * grid_deformation.MAX_NEWTON_STEP + 1e-4  # two steps
    assert all(p.grad.isfinite().all() for p in network.parameters()) and u.grad.isfinite().all()
    broken = u.detach().clone()
    broken[0, 0, 0], broken[1, 1] = torch.inf, torch.nan
    with torch.no_grad():
        out = maps.to_local(broken)
    assert not out[1, 1].isfinite().any() and out[2:].isfinite().all()  # a step that NonfiniteGuard can see


def test_slopes_are_those_of_the_displacement():
    """Against autograd, point by point, inside and outside the grids."""
    maps, x = random_network(3).bind(torch.tensor([2, 0, 2])), points(3)
    f, J = maps.displacement_and_slope(x)
    assert torch.allclose(f, maps.displacement(x), atol=1e-6)
    x.requires_grad_()
    for d in range(2):
        (slope,) = torch.autograd.grad(maps.displacement(x)[..., d].sum(), x)
        assert torch.allclose(J[..., d, :], slope[..., :2], atol=1e-5)


def test_gradients_of_the_inverse_are_those_of_the_solution(monkeypatch):
    """Against autograd through so many fixed-point iterations that they have converged; parameters and points."""
    monkeypatch.setattr(grid_deformation, "NEWTON_STEPS_TRAINING", 6)  # one step is enough for training, not for this
    network, gradients = random_network(3, 0.1), []
    u = (torch.rand(2, 100, 3) * 2 - torch.tensor([1.0, 1.0, 0.0])).requires_grad_()
    weight = torch.randn(2, 100, 3)

    def iterated(maps, u):
        y = x = invert_affine(maps._theta(u[..., 2]), u)
        for _ in range(60):
            x = torch.cat([y[..., :2] - maps.displacement(x), y[..., 2:]], dim=-1)
        return x

    for inverse in (GridMaps.to_local, iterated):
        x = inverse(network.bind(torch.tensor([2, 0])), u)
        gradients.append((x, *torch.autograd.grad((x * weight).sum(), [u, *network.parameters()])))
    for fast, plain in zip(*gradients, strict=True):
        assert torch.allclose(fast, plain, atol=1e-4 * plain.abs().max().item())


def test_a_new_network_is_the_identity():
    x = torch.rand(5, 50, 3)
    assert torch.equal(GridNetwork(5).bind(torch.arange(5)).to_canonical(x), x)


@pytest.mark.parametrize("jittered", [False, True])
@pytest.mark.parametrize(("num_rays", "num_samples", "num_layers"), [(1, 2, 2), (40, 16, 2), (7, 5, 3), (6, 4, 1)])
def test_rays_and_points_are_mapped_alike(num_rays, num_samples, num_layers, jittered):
    """Values and gradients of what is computed once a ray or a depth against those of points one by one."""
    torch.manual_seed(0)
    model = OmniMotion(ModelConfig(4, 20, 30, num_samples_ray=num_samples, deform="grid", field="grid", grid_levels=2,
                                   grid_layers=num_layers))
    for p in model.deform.parameters():
        torch.nn.init.normal_(p, std=0.05)
    jitter = torch.rand(2, 1, num_samples) if jittered else None
    x = model.lift(torch.rand(2, num_rays, 2) * 40 - 10, jitter)
    weight, results = torch.randn(x.shape), []
    for rays in (GridMaps.rays_to_canonical, lambda maps, x: maps.to_canonical(x.flatten(1, 2)).view_as(x)):
        u = rays(model.maps(torch.tensor([3, 1])), x)
        results.append((u, *torch.autograd.grad((u * weight).sum(), list(model.deform.parameters()))))
    for fast, plain in zip(*results, strict=True):
        assert torch.allclose(fast, plain, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_point_moves_with_its_layer(num_layers):
    """Against each layer interpolated by itself; at the edges of layers and of the frame, too."""
    network = random_network(5, num_layers=num_layers)
    ids, R = torch.tensor([4, 0]), network.layers.sides[-1][0]
    maps, x = network.bind(ids), points(2, 500)
    x[:, :100] = x[:, :100].round()
    layers = network.layers(ids).unflatten(1, (2, num_layers))  # (B, 2, S, R, R)
    places = x[..., :2] / grid_deformation.GRID_EXTENT
    each = torch.stack([sample(layers[:, :, s], places) for s in range(num_layers)])  # (S, B, 2, M)
    number = (x[..., 2] / 2 * num_layers).floor().clamp(0, num_layers - 1).long()  # (B, M)
    plain = each.gather(0, number[None, :, None].expand(1, -1, 2, -1))[0].transpose(1, 2)
    assert maps.layers.shape == (2, 2, num_layers * R, R)
    assert torch.allclose(maps.displacement(x), plain, atol=1e-5)


def test_depths_do_not_change():
    maps, x = random_network(4).bind(torch.arange(4)), points(4)
    assert torch.equal(maps.to_canonical(x)[..., 2], x[..., 2]) and torch.equal(maps.to_local(x)[..., 2], x[..., 2])


def test_selected_maps_are_those_of_their_frames():
    network, x = random_network(6), torch.rand(3, 40, 3)
    ids = torch.tensor([5, 0, 5])
    every = network.bind(torch.arange(6))
    assert torch.allclose(every.select(ids).to_canonical(x), network.bind(ids).to_canonical(x), atol=1e-6)
    assert torch.allclose(every.select(ids)._theta(x[..., 2]), levels_one_by_one(
        network.thetas, ids, (x[..., 2:] - 1) / grid_deformation.THETA_EXTENT).transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("num_frames", [2, 5, 24])
@pytest.mark.parametrize("sides", [[(3, 3)], [(3, 3), (5, 5), (9, 9)], [(2,), (5,)], [(2,), (5,), (9,)]])
@pytest.mark.parametrize("visits", [8_192, 20])
def test_levels_added_up_are_levels_one_by_one(num_frames, sides, visits, monkeypatch):
    """Values and gradients of the sum of all levels against each level interpolated by itself."""
    monkeypatch.setattr(grid_deformation, "VERTICES_PER_STEP", visits)
    if sides == [(2,), (5,), (9,)] and num_frames == 2:
        sides = sides[:1]
    torch.manual_seed(num_frames)
    module = Grids(num_frames, 6, sides)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    ids = torch.randint(num_frames, (3,))
    a = (torch.rand(3, 50, len(sides[0])) * 2.6 - 1.3).requires_grad_()
    weight = torch.randn(3, 6, 50)
    results = []
    for values in (sample(module(ids), a), levels_one_by_one(module, ids, a)):
        results.append((values, *torch.autograd.grad((values * weight).sum(), [a, *module.parameters()])))
    for fused, plain in zip(*results, strict=True):
        assert torch.allclose(fused, plain, atol=1e-4 * plain.abs().max().item())


def test_the_field_at_a_vertex_is_the_sum_of_its_values():
    torch.manual_seed(0)
    field = GridField((0.0, 2.0))
    for p in field.parameters():
        torch.nn.init.normal_(p)
    rgb, sigma = field(torch.tensor([[0.0, 0.0, 1.0]]))  # the middle is a vertex of every level
    middle = sum(level[0, :, level.shape[2] // 2, R // 2, R // 2] for level, R in zip(field.levels, SIDES, strict=True))
    assert torch.allclose(rgb[0], middle[:3].sigmoid(), atol=1e-5)
    assert torch.allclose(sigma[0], DENSITY_SCALE * torch.nn.functional.softplus(middle[3] - 1), atol=1e-5)


def test_points_of_the_field_do_not_depend_on_their_number():
    field, u = GridField(), torch.rand(7, 3) * 4 - 2
    for all_, some in zip(field(u), field(u[:4]), strict=True):
        assert torch.allclose(all_[:4], some, atol=1e-6)
    assert [out.shape for out in field(torch.zeros(2, 3, 5, 3))] == [(2, 3, 5, 3), (2, 3, 5)]


def test_the_field_is_defined_far_outside_its_grid():
    rgb, sigma = GridField()(torch.tensor([[1e6, -1e6, 1e6], [-1e9, 0.0, 0.0]]))
    assert rgb.isfinite().all() and sigma.isfinite().all()
    v = torch.linspace(-50, 50, 1001)
    inside = v.abs() <= 1
    assert torch.equal(contract_each(v)[inside], v[inside])
    assert (contract_each(v).diff() > 0).all() and contract_each(v).abs().max() < 2


@KINDS
def test_parameters_do_not_depend_on_the_options_that_grids_ignore(kind, field):
    small, large = (OmniMotion(ModelConfig(5, 20, 30, deform=kind, field=field, coupling_width=w)) for w in (8, 256))
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in large.parameters())
    assert small.time_latent.frozen.shape == (5, 0)


@pytest.mark.parametrize("num_frames,counts", [(2, [2, 2]), (5, [2, 5]), (24, [6, 24]), (82, [6, 21, 82])])
def test_long_clips_have_slower_grids_too(num_frames, counts):
    assert moment_counts(num_frames) == counts


@pytest.mark.parametrize("wrong", [["--optimizer", "muon"], ["--no-use_affine"], ["--mlp_backend", "triton"]])
@KINDS
def test_options_of_mlps_are_refused(wrong, kind, field):
    options = parse("train", ["--config", "configs/fast.txt", "--deform", kind, "--field", field, *wrong])
    with pytest.raises(UserError, match=f"--deform {kind} has no MLPs for " + " ".join(wrong)):
        new_model(options, 5, (20, 30), torch.device("cpu"))


@pytest.mark.parametrize("changes", [
    {"num_frames": 0}, {"num_frames": 0.001}, {"grid_levels": 12}, {"num_frames": 90_000}, {"grid_layers": 0},
    {"grid_layers": 90_000}])
@KINDS
def test_a_checkpoint_cannot_claim_grids_that_it_does_not_have(changes, kind, field):
    config = ModelConfig(5, 20, 30, deform=kind, field=field)
    state = OmniMotion(config).state_dict()
    assert checkpoint_num_frames(Checkpoint(asdict(config), state), Path("good.pth")) == 5
    with pytest.raises(UserError, match=r"bad\.pth is damaged"):
        checkpoint_num_frames(Checkpoint(asdict(config) | changes, state), Path("bad.pth"))


@pytest.mark.parametrize("deform", ["grid", "mlp"])
def test_a_checkpoint_of_unsupported_grids_is_refused(deform):
    config = ModelConfig(5, 20, 30, deform=deform, field="grid", grid_levels=2)
    state, config = OmniMotion(config).state_dict(), asdict(config)
    del config["grid_layers"]
    with pytest.raises(UserError, match="of an early version"):
        checkpoint_num_frames(Checkpoint(config, state), Path("old.pth"))


def test_a_checkpoint_without_grid_settings_is_read():
    config = ModelConfig(5, 20, 30, coupling_width=16, affine_width=16, affine_layers=2, field_width=16)
    old = {k: v for k, v in asdict(config).items() if k not in ("deform", "grid_levels", "grid_layers", "field")}
    model = OmniMotion(config)
    again = model_from_state(old, model.state_dict())
    assert again.config == config
    assert torch.equal(again.deform.layers[0].mlp[0].weight, model.deform.layers[0].mlp[0].weight)


@pytest.mark.parametrize("pieces", [0, 64])
@KINDS
def test_recomputed_activations_give_the_same_gradients(pieces, kind, field):
    torch.manual_seed(0)
    model = OmniMotion(ModelConfig(4, 20, 30, num_samples_ray=4, deform=kind, field=field, grid_levels=2))
    p, ids = torch.rand(2, 40, 2) * 19, torch.tensor([0, 2])
    gradients = []
    for above in (1 << 30, 0):
        model.recompute_above, model.piece = above, pieces
        model.zero_grad()
        model.predict_pairs(p, ids, ids + 1).pixels.square().sum().backward()
        gradients.append([q.grad.clone() for q in model.parameters() if q.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3 * b.abs().max().item() + 1e-6)
