"""Layer warps, the maps of configs/fast.txt: one-to-one whatever their parameters, and C++ kernels equal to PyTorch."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configs.options import parse
from models import activation_checkpoint, layer_warps
from models.coords import denormalize_pixels, normalize_pixels
from models.factory import new_model
from models.grid_deformation import layer_index
from models.kernels import native
from models.kernels.warp import (
    bounded_sum,
    bounded_sum_plain,
    transfer,
    unwarp,
    unwarp_plain,
    warp,
    warp_plain,
)
from models.layer_warps import GRID_EXTENT, MAX_CELL_SHARE, LayerWarps
from models.omnimotion import ModelConfig, OmniMotion
from training.initialization import affine_parameters

PIXEL = 2 / 255     # of a frame 256 pixels wide, in normalized units
ROUNDING = 2e-6     # share of b by which rounded displacements may exceed it


@pytest.fixture
def kernels():
    """The compiled kernels; tests that need them skip without a compiler."""
    if native.warp_kernels() is None:
        pytest.skip("the C++ kernels cannot be built on this machine: no g++ or ninja")
    return native.warp_kernels()


@pytest.fixture(params=["C++", "PyTorch"])
def either(request, monkeypatch):
    """Runs a test with the kernels and without them."""
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "warp_kernels", lambda: None)
    else:
        request.getfixturevalue("kernels")


def random_network(num_frames, std=0.05, num_levels=6, num_layers=2, size=(192, 256), theta_std=0.3):
    torch.manual_seed(0)
    network = LayerWarps(num_frames, size, num_levels=num_levels, num_layers=num_layers)
    for p in network.layers.parameters():
        torch.nn.init.normal_(p, std=std)
    for p in network.thetas.parameters():
        torch.nn.init.normal_(p, std=theta_std)
    return network


def random_tables(B, S, sides, extent=GRID_EXTENT, dtype=torch.float32):
    """Displacements of up to MAX_CELL_SHARE of each level's cells."""
    return [((torch.rand(B, S, 2, R, R, dtype=dtype) * 2 - 1) * MAX_CELL_SHARE * 2 * extent / (R - 1)).requires_grad_()
            for R in sides]


def points(num_frames, count=300):
    """In the frame, outside the grids, and the last tenth far outside; depths inside and outside the volume."""
    x = torch.rand(num_frames, count, 3) * 3 - torch.tensor([1.5, 1.5, 0.5])
    x[:, -count // 10:, :2] *= 100
    return x


def with_gradients(function, inputs, weight):
    """Values and gradients of a function without arguments."""
    out = function()
    return out, torch.autograd.grad((out * weight).sum(), inputs)


def assert_twins(fast, plain):
    """Values to 1e-5, gradients to 1e-4 of the largest."""
    assert torch.allclose(fast[0], plain[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(fast[1], plain[1], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


# The kernels

@pytest.mark.parametrize("B,M,S,sides", [(1, 1, 1, [2]), (2, 100, 2, [3, 5, 9]), (3, 257, 3, [3, 5, 9, 17, 33, 65]),
                                         (5, 40, 4, [7, 4])])
@pytest.mark.parametrize("fast,plain", [(warp, warp_plain), (unwarp, unwarp_plain)], ids=["warp", "unwarp"])
def test_warps_of_kernels_and_pytorch_agree(kernels, fast, plain, B, M, S, sides):
    """Points inside and outside of the grids."""
    torch.manual_seed(B)
    tables = random_tables(B, S, sides)
    p = (torch.rand(B, M, 2) * 4 - 2).requires_grad_()
    layer = torch.randint(S, (B, M))
    weight = torch.randn(B, M, 2)
    assert_twins(*(with_gradients(lambda f=f: f(p, layer, tables, GRID_EXTENT), [p, *tables], weight)
                   for f in (fast, plain)))


@pytest.mark.parametrize("fast,plain", [(warp, warp_plain), (unwarp, unwarp_plain)], ids=["warp", "unwarp"])
def test_kernels_and_pytorch_take_the_same_side_of_an_edge(kernels, fast, plain):
    """One level whose vertices are exact numbers: slopes differ from cell to cell and end at the border."""
    torch.manual_seed(0)
    tables = random_tables(1, 2, [5], extent=1.0)
    place = torch.linspace(-1.5, 1.5, 13)  # vertices, the middle of edges, and the outside
    x = torch.cartesian_prod(place, place)[None]
    layer = torch.randint(2, x.shape[:2])
    p = (x if fast is warp else warp_plain(x, layer, tables, 1.0)).detach()
    if fast is unwarp:  # only points that come back to the edge without rounding are on it
        exact = (unwarp(p, layer, tables, 1.0) == x).all(-1) & (unwarp_plain(p, layer, tables, 1.0) == x).all(-1)
        assert exact.sum() > 30
        p, layer = p[exact][None], layer[exact][None]
    p.requires_grad_()
    weight = torch.randn(p.shape)
    assert_twins(*(with_gradients(lambda f=f: f(p, layer, tables, 1.0), [p, *tables], weight) for f in (fast, plain)))


@pytest.mark.parametrize("function", [warp, unwarp], ids=["warp", "unwarp"])
def test_points_that_are_not_finite_stay_so_and_do_not_change_others(either, function):
    torch.manual_seed(0)
    tables = random_tables(2, 2, [3, 5, 9])
    p = torch.rand(2, 6, 2) * 2 - 1
    layer = torch.randint(2, (2, 6))
    expected = function(p, layer, tables, GRID_EXTENT)
    broken = p.clone()
    broken[0, 0] = torch.nan
    broken[0, 1, 0] = torch.inf
    broken[1, 2, 1] = -torch.inf
    whole = p == broken
    whole = whole.all(-1)
    out = function(broken.requires_grad_(), layer, tables, GRID_EXTENT)
    assert torch.equal(out[whole], expected[whole])
    assert not out[~whole].isfinite().all(-1).any()
    gradients = torch.autograd.grad(out[whole].sum(), [broken, *tables])
    assert all(g.isfinite().all() for g in gradients)


def transfer_plain(p, layer, affine, tables, extent):
    """The maps one after the other, in PyTorch."""
    B = len(p)
    frame = torch.arange(B)[:, None]
    matrix, shift = affine[..., :4].unflatten(-1, (2, 2)), affine[..., 4:]
    warped = warp_plain(p, layer, [table[:B] for table in tables], extent)
    u = (matrix[frame, layer] @ warped[..., None])[..., 0] + shift[frame, layer]
    y = torch.linalg.solve(matrix[frame + B, layer], u - shift[frame + B, layer])
    return u, unwarp_plain(y, layer, [table[B:] for table in tables], extent)


@pytest.mark.parametrize("B,M,S,num_levels,num_frames", [(1, 1, 1, 1, 2), (2, 100, 2, 3, 24), (3, 64, 3, 6, 9)])
def test_transfers_of_kernels_and_pytorch_agree(kernels, B, M, S, num_levels, num_frames, monkeypatch):
    """Both results, and the gradients of points, affine maps and grids."""
    network = random_network(num_frames, num_levels=num_levels, num_layers=S)
    levels = network.bind(torch.randint(num_frames, (2 * B,))).levels
    affine = (torch.tensor([1.0, 0, 0, 1, 0, 0]) + 0.2 * torch.randn(2 * B, S, 6)).requires_grad_()
    p = (torch.rand(B, M, 2) * 3 - 1.5).requires_grad_()
    layer = torch.randint(S, (B, M))
    weight = torch.randn(2, B, M, 2)
    inputs = [p, affine, *levels.grids]
    fast = with_gradients(lambda: torch.stack(transfer(p, layer, affine, levels, GRID_EXTENT)), inputs, weight)
    monkeypatch.setattr(native, "warp_kernels", lambda: None)
    plain = with_gradients(lambda: torch.stack(transfer_plain(p, layer, affine, levels.tables(), GRID_EXTENT)), inputs,
                           weight)
    assert all(g.abs().max() > 0 for g in fast[1])
    assert_twins(fast, plain)


@pytest.mark.parametrize("change", [
    {"points": (2, 5, 3)}, {"points": (2, 6, 2)}, {"layer": (2, 4)}, {"layer": (1, 5)}, {"layer": (10,)}, {"ids": (2,)},
    {"ids": (3,)}, {"affine": (2, 2, 6)}, {"affine": (4, 3, 6)}, {"affine": (4, 2, 5)}], ids=str)
def test_transfers_refuse_wrong_shapes(kernels, change):
    shape = {"points": (2, 5, 2), "layer": (2, 5), "affine": (4, 2, 6), "ids": (4,)} | change
    levels = random_network(6, num_levels=2).bind(torch.zeros(shape["ids"], dtype=torch.long))
    with pytest.raises(RuntimeError, match="must be"):
        transfer(torch.zeros(shape["points"]), torch.zeros(shape["layer"], dtype=torch.long),
                 torch.zeros(shape["affine"]), levels.levels, GRID_EXTENT)


@pytest.mark.parametrize("function", [warp, unwarp])
@pytest.mark.parametrize("points,layer", [((2, 5, 3), (2, 5)), ((10, 2), (10,)), ((2, 5, 2), (2, 4)),
                                          ((3, 5, 2), (3, 5))], ids=str)
def test_warps_refuse_wrong_shapes(kernels, function, points, layer):
    with pytest.raises(RuntimeError, match="must be"):
        function(torch.zeros(points), torch.zeros(layer, dtype=torch.long), random_tables(2, 1, [3]), GRID_EXTENT)


@pytest.mark.parametrize("num_frames,C,R", [(2, 2, 3), (24, 4, 9), (82, 6, 5)])
@pytest.mark.parametrize("std,largest", [(0.01, 0.1), (10.0, 0.1), (1.0, math.inf)])
def test_bounded_sums_of_kernels_and_pytorch_agree(kernels, num_frames, C, R, std, largest):
    """Frames more than once, also the last one, after which there is no moment; frames that are a column of a table.
    Without a bound, of another shape."""
    side = (R, R) if math.isfinite(largest) else (R,)
    torch.manual_seed(num_frames)
    network = LayerWarps(num_frames, (20, 30), num_levels=1)
    n = network.layers.num_grids
    before, share = ([getattr(network.layers, f"{name}_{k}") for k in range(n)] for name in ("before", "share"))
    counts = [len(grid) for grid in network.layers.values]
    grids = [(torch.randn(count, C, *side) * std).requires_grad_() for count in counts]
    scales = [0.5 + k for k in range(n)]
    ids = torch.tensor([num_frames - 1, 0, *torch.randint(num_frames, (7,)).tolist(), 0])
    ids = torch.stack([ids, ids.flip(0)], dim=1)[:, 0]
    weight = torch.randn(len(ids), C, *side)
    arguments = (ids, grids, before, share, scales, largest)
    fast, plain = (with_gradients(lambda f=f: f(*arguments), grids, weight) for f in (bounded_sum, bounded_sum_plain))
    assert fast[0].abs().max() <= largest * (1 + ROUNDING)
    assert_twins(fast, plain)


def test_without_kernels_maps_are_the_same(kernels, monkeypatch):
    network = random_network(5)
    x = points(3)[:, :-30]
    weight = torch.randn(x.shape)
    results = []
    for available in (kernels, None):
        monkeypatch.setattr(native, "warp_kernels", lambda available=available: available)
        for name in ("to_canonical", "to_local"):
            maps = network.bind(torch.tensor([4, 0, 4]))
            results.append(with_gradients(lambda m=maps, n=name: getattr(m, n)(x), list(network.parameters()), weight))
    for fast, plain in zip(results[:2], results[2:], strict=True):
        assert_twins(fast, plain)


def test_a_machine_without_a_compiler_is_told_once(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no g++")
    monkeypatch.setattr(native, "_library", fail)
    native.warp_kernels.cache_clear()
    try:
        for _ in range(2):
            warp(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long), [torch.zeros(1, 1, 2, 3, 3)], 1.0)
        assert [r.getMessage() for r in caplog.records] == [
            "C++ kernels cannot be built (no g++): PyTorch is used, a step of configs/fast.txt takes about 3 times "
            "as long. They need g++ and ninja"]
    finally:
        native.warp_kernels.cache_clear()


# One-to-one

@pytest.mark.parametrize("std", [0.01, 0.3, 1e3])
@pytest.mark.parametrize("num_frames,num_layers,num_levels", [(2, 1, 6), (7, 3, 6), (24, 2, 6), (3, 2, 1)])
def test_points_come_back_whatever_the_parameters(either, std, num_frames, num_layers, num_levels):
    """To 1e-3 pixels; farther away than a frame, to the precision of the coordinates. In both directions."""
    network = random_network(num_frames, std, num_levels, num_layers)
    maps = network.bind(torch.arange(num_frames))
    for table, largest in zip(maps.tables, network.largest, strict=True):
        assert table.abs().max() <= largest * (1 + ROUNDING) < GRID_EXTENT / 2 / (table.shape[-1] - 1)  # 1/4 of a cell
    x = points(num_frames, 600)
    with torch.no_grad():
        u = maps.to_canonical(x)
        assert (u - x).abs().max() > PIXEL
        for end in (maps.to_local(u), maps.to_canonical(maps.to_local(x))):
            assert torch.equal(end[..., 2], x[..., 2])
            error = (end - x).norm(dim=-1) / x[..., :2].norm(dim=-1).clamp(min=1) / PIXEL
            assert error.quantile(0.999) < 1e-3 and error.max() < 1e-2  # steep compositions amplify rounding


def test_cells_of_any_level_keep_their_orientation():
    """Densely sampled: each small square has a positive area after the warp; displacements are as large as they get."""
    network = random_network(2, 1e3)
    side = torch.linspace(-1.3, 1.3, 300)
    y, x = torch.meshgrid(side, side, indexing="ij")
    grid = torch.stack([x, y], -1).view(1, -1, 2).double()
    tables = [table[:1].double() for table in network.bind(torch.arange(2)).tables]
    for table in tables:  # a level alone: what the composition is made of
        u = warp_plain(grid, torch.zeros(1, len(grid[0]), dtype=torch.long), [table], GRID_EXTENT).view(300, 300, 2)
        right, down = u[:-1, 1:] - u[:-1, :-1], u[1:, :-1] - u[:-1, :-1]
        assert (right[..., 0] * down[..., 1] - right[..., 1] * down[..., 0]).min() > 0


def test_gradients_of_the_inverse_are_those_of_the_solution():
    """Against autograd through so many fixed-point iterations that they have converged; tables and points, float64."""
    torch.manual_seed(0)
    tables = random_tables(2, 2, [3, 5, 9], dtype=torch.float64)
    p = (torch.rand(2, 80, 2, dtype=torch.float64) * 3 - 1.5).requires_grad_()
    layer = torch.randint(2, (2, 80))
    weight = torch.randn(2, 80, 2, dtype=torch.float64)

    def iterated():
        y = p
        for table in reversed(tables):
            x = y
            for _ in range(150):
                x = y - (warp_plain(x, layer, [table], GRID_EXTENT) - x)
            y = x
        return y

    assert_twins(with_gradients(lambda: unwarp(p, layer, tables, GRID_EXTENT), [p, *tables], weight),
                 with_gradients(iterated, [p, *tables], weight))


# The network

def test_a_new_network_is_the_identity():
    maps, x = LayerWarps(5, (20, 30)).bind(torch.arange(5)), points(5)
    assert torch.equal(maps.to_canonical(x), x) and torch.equal(maps.to_local(x), x)


@pytest.mark.parametrize("num_frames", [2, 24])
@pytest.mark.parametrize("num_levels", [1, 4])
def test_a_network_starts_at_a_smooth_map(either, num_frames, num_levels):
    """An affine map with a wave on it that the displacements can hold; each frame and layer its own."""
    torch.manual_seed(0)
    network = LayerWarps(num_frames, (90, 160), num_levels=num_levels, num_layers=2)
    thetas = torch.randn(num_frames, 2, 5) * 0.4
    at = network.vertices()
    R = len(at)
    phase = torch.rand(num_frames, 2, 1, 1, 2) * 6
    waved = at + 0.03 * torch.sin(2 * at.flip(-1) + phase)  # (T, S, R, R, 2)
    a, b, c, d, tx, ty = (x[..., None, None] for x in network.affine(
        torch.arange(2).expand(num_frames, 2), thetas))
    target = torch.stack([a * waved[..., 0] + b * waved[..., 1] + tx, c * waved[..., 0] + d * waved[..., 1] + ty], -1)
    network.start_at(thetas, target)
    maps = network.bind(torch.arange(num_frames))
    inside = (at.abs() <= 1).all(-1).flatten()
    for layer in range(2):
        u = torch.cat([target[:, layer].flatten(1, 2), torch.full((num_frames, R * R, 1), layer + 0.5)], -1)
        error = (maps.to_local(u)[..., :2] - at.flatten(0, 1)).norm(dim=-1)
        assert error[:, inside].max() < 0.4 * PIXEL and error.max() < PIXEL


def test_what_the_displacements_cannot_hold_is_cut_off(either):
    """A target that folds: the result is the nearest that a one-to-one map gives, and it is one-to-one."""
    network = LayerWarps(3, (64, 64), num_levels=3)
    at = network.vertices()
    network.start_at(torch.zeros(3, 2, 5), (at * torch.tensor([-1.0, 1.0])).expand(3, 2, -1, -1, -1))
    maps, x = network.bind(torch.arange(3)), points(3)[:, :-30]
    assert all(p.isfinite().all() for p in network.parameters())
    assert torch.allclose(maps.to_local(maps.to_canonical(x)), x, atol=1e-3 * PIXEL)


@pytest.mark.parametrize("size", [(90, 160), (160, 90), (64, 64)])
def test_similarities_in_pixels_are_exact(size):
    """Also in frames that are not square, with any rotation and zoom."""
    rng = np.random.default_rng(0)
    angle, zoom = rng.uniform(-np.pi, np.pi, (4, 2)), np.exp(rng.normal(0, 1, (4, 2)))
    linear = zoom[..., None, None] * np.stack([np.stack([np.cos(angle), -np.sin(angle)], -1),
                                               np.stack([np.sin(angle), np.cos(angle)], -1)], -2)
    similarity = np.concatenate([linear, rng.normal(0, 200, (4, 2, 2, 1))], -1)  # (T, S, 2, 3)
    network = LayerWarps(4, size, num_levels=3)
    thetas = affine_parameters(similarity, size)
    vertices = denormalize_pixels(network.vertices(), size).double().numpy()
    target = np.einsum("tsij,abj->tsabi", linear, vertices) + similarity[:, :, None, None, :, 2]
    network.start_at(thetas, normalize_pixels(torch.from_numpy(target).float(), size))
    p = rng.uniform(-100, 250, (4, 50, 2))
    maps = network.bind(torch.arange(4))
    for layer in range(2):
        expected = np.einsum("tij,tnj->tni", linear[:, layer], p) + similarity[:, layer, None, :, 2]
        x = torch.cat([normalize_pixels(torch.from_numpy(p).float(), size), torch.full((4, 50, 1), 0.5 + layer)], -1)
        u = maps.to_canonical(x)
        assert np.abs(denormalize_pixels(u[..., :2], size).detach().numpy() - expected).max() < 0.01
        assert torch.allclose(maps.to_local(u), x, atol=1e-5)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_point_moves_with_its_layer(num_layers):
    """Against the maps of networks that have only this layer; depths at the edges of layers are of the farther one."""
    network = random_network(5, num_layers=num_layers)
    ids, x = torch.tensor([4, 0]), points(2)
    maps = network.bind(ids)
    u = maps.to_canonical(x)
    layer = (x[..., 2] / 2 * num_layers + 1e-4).floor().clamp(0, num_layers - 1)
    for s in range(num_layers):
        alone = layer_warps.WarpMaps(LayerWarps(5, (192, 256), num_layers=1),
                                     [table[:, s:s + 1] for table in maps.tables], maps.thetas[:, s:s + 1])
        assert torch.allclose(u[layer == s], alone.to_canonical(x)[layer == s], atol=1e-6)


@pytest.mark.parametrize("S", [1, 2, 3, 4])
def test_edges_of_layers_belong_to_the_farther_one(S):
    edges = torch.linspace(0, 2, S + 1)
    assert layer_index(edges, 0.0, 2.0, S).tolist() == [*range(S), S - 1]
    assert layer_index(torch.tensor([-5.0, 9.0]), 0.0, 2.0, S).tolist() == [0, S - 1]
    assert 0 <= layer_index(torch.tensor([torch.nan]), 0.0, 2.0, S).item() < S


def test_reading_tables_does_not_change_how_maps_are_computed():
    maps = random_network(5).bind(torch.tensor([4, 0]))
    levels = maps.levels
    assert maps.tables is maps.tables and maps.levels is levels


def test_selected_and_bound_maps_are_those_of_their_frames():
    model = OmniMotion(ModelConfig(6, 20, 30, num_samples_ray=2, deform="warp", field="images", grid_levels=3))
    model.deform = random_network(6, num_levels=3, size=(20, 30))
    ids, x = torch.tensor([5, 0, 5]), points(3)[:, :-30]
    expected = model.deform.bind(ids).to_canonical(x)
    assert torch.equal(model.deform.bind(torch.arange(6)).select(ids).to_canonical(x), expected)
    assert torch.equal(model.deform.bind(torch.arange(6)).select(slice(2, 5)).to_local(x),
                       model.deform.bind(torch.arange(2, 5)).to_local(x))
    with model.bound(), torch.no_grad():
        assert torch.equal(model.maps(ids).to_canonical(x), expected)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_rays_and_points_are_mapped_alike(num_layers):
    """A ray has one sample in each layer, with jitter too."""
    options = SimpleNamespace(**vars(parse("train", ["--config", "configs/fast.txt"])) | {"grid_layers": num_layers,
                                                                                         "init_layers": False})
    model = new_model(options, 4, (20, 30), torch.device("cpu"))
    model.deform = random_network(4, num_layers=num_layers, size=(20, 30))
    p = torch.rand(2, 7, 2) * 30 - 5
    x = model.lift(p, torch.rand(2, 1, num_layers))
    assert x.shape == (2, 7, num_layers, 3) and torch.equal(x, model.lift(p))
    assert model.maps(torch.arange(2)).layer_of(x[0, 0, :, 2]).tolist() == list(range(num_layers))
    maps = model.maps(torch.tensor([3, 1]))
    rays = maps.rays_to_canonical(x)
    for k in range(num_layers):
        assert torch.allclose(rays[:, :, k], maps.to_canonical(x[:, :, k]), atol=1e-6)


@pytest.mark.parametrize("call", [activation_checkpoint.stored, activation_checkpoint.recomputed_in_pieces(20)])
def test_a_transfer_is_both_maps_one_after_the_other(either, call):
    network = random_network(5, num_layers=3)
    maps = network.bind(torch.tensor([4, 0, 4, 3]))
    maps.call = call
    x = points(2).unflatten(1, (-1, 3))
    u, target = maps.transfer(x)
    assert torch.allclose(u, maps.select(slice(2)).rays_to_canonical(x), rtol=1e-5, atol=1e-5)
    expected = maps.select(slice(2, None)).to_local(u.flatten(1, 2)).view_as(x)
    assert torch.allclose(target, expected, rtol=1e-4, atol=1e-4)
