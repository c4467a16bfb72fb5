"""The representation: maths against slow, obvious versions, and fast paths against their plain twins."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.encoding import envelope
from inference.dense import coarse_flow, colors_and_depths
from inference.tracker import Tracker
from models import hash_grid
from models.canonical_field import CanonicalField
from models.coords import contract, denormalize_pixels, normalize_pixels
from models.encoding import periodic_encoding
from models.gabor import GaborNet
from models.hash_grid import HashGrid
from models.invertible import InvertibleNetwork
from models.omnimotion import ModelConfig, OmniMotion
from models.rendering import compositing_weights, jitter_depths, ray_depths
from models.time_latent import TimeLatent, frame_times

SMALL = dict(num_frames=5, height=24, width=32, num_samples_ray=8, coupling_width=32, affine_width=16,
             affine_layers=3, field_width=24, latent_dim=16)


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    return OmniMotion(ModelConfig(**{**SMALL, **changes}))


def grads(output, inputs):
    """Gradients of a random projection of `output`."""
    torch.manual_seed(5)
    return torch.autograd.grad((output * torch.randn_like(output)).sum(), inputs)


# Invertible network

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), affine=st.booleans(), hidden=st.integers(1, 3), projection=st.integers(1, 2),
       spread=st.sampled_from([0.5, 1.0, 3.0]))
@example(seed=2013, affine=True, hidden=1, projection=1, spread=3.0)
def test_network_is_invertible_in_and_outside_the_volume(seed, affine, hidden, projection, spread):
    torch.manual_seed(seed)
    network = InvertibleNetwork(width=64, hidden_layers=hidden, projection_layers=projection, latent_dim=16,
                                affine=affine, affine_width=32, affine_layers=4)
    x = (torch.rand(3, 200, 3, dtype=torch.double) * 2 - 1) * spread  # the volume is [-1, 1] x [-1, 1] x [0, 2]
    latent, t = torch.randn(3, 16), torch.rand(3, 1)
    with torch.no_grad():
        for dtype, within in ((torch.float, 1e-4), (torch.double, 1e-10)):
            maps, points = network.to(dtype).bind(latent.to(dtype), t.to(dtype)), x.to(dtype)
            for error in (maps.to_local(maps.to_canonical(points)) - points,
                          maps.to_canonical(maps.to_local(points)) - points):
                # float32 is not fine enough for every point of every network that is so far out
                out = spread > 1 and dtype == torch.float
                assert error.abs().quantile(0.999 if out else 1.0) < within


def test_cycles_of_frames_are_consistent():
    """i -> j -> k equals i -> k: all maps go through one canonical volume."""
    network = InvertibleNetwork(width=32, latent_dim=16, affine_width=16, affine_layers=3)
    maps = network.bind(torch.randn(3, 16), torch.rand(3, 1))
    x = torch.rand(1, 100, 3) * 2 - 1
    i, j, k = (maps.select(torch.tensor([n])) for n in range(3))
    with torch.no_grad():
        via_j = k.to_local(j.to_canonical(j.to_local(i.to_canonical(x))))
        assert torch.allclose(via_j, k.to_local(i.to_canonical(x)), atol=1e-5)


@pytest.mark.parametrize("B,M", [(1, 1), (3, 17), (4, 64)])
@pytest.mark.parametrize("hidden,projection", [(2, 2), (3, 1), (1, 2)])
def test_fused_coupling_equals_the_plain_one(B, M, hidden, projection):
    torch.manual_seed(B * M)
    network = InvertibleNetwork(width=32, hidden_layers=hidden, projection_layers=projection, latent_dim=16,
                                affine_width=16, affine_layers=3).double()
    f = torch.randn(B, 16, dtype=torch.float64, requires_grad=True)
    x = torch.randn(B, M, 3, dtype=torch.float64, requires_grad=True)
    t = torch.rand(B, 1, dtype=torch.float64)
    results = {}
    for network.fused in (True, False):
        for way in ("to_canonical", "to_local"):
            out = getattr(network.bind(f, t), way)(x)
            inputs = [x, f, *network.parameters()]
            results[network.fused, way] = [out, *torch.autograd.grad(out.square().sum(), inputs)]
    for way in ("to_canonical", "to_local"):
        for a, b in zip(results[True, way], results[False, way], strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fused", [True, False])
def test_recomputed_activations_give_the_same_gradients(fused, monkeypatch):
    monkeypatch.setattr("models.omnimotion.FIELD_PIECE", 50)
    model = small_model().double()
    model.deform.fused = fused
    p, ids = torch.rand(3, 7, 2, dtype=torch.float64) * 20, torch.tensor([0, 3, 4])
    results = []
    for model.recompute_above in (10**9, 0):
        out = model.predict_pairs(p, ids, ids.flip(0))
        results.append([out.pixels, out.rgb, *torch.autograd.grad(
            out.pixels.square().sum() + out.rgb.sum(), list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_clamped_scales_have_no_gradient():
    """A coupling whose log-scale is beyond the clamp is linear in x with slope exp(-+8)."""
    network = InvertibleNetwork(width=8, latent_dim=4, affine=False)
    with torch.no_grad():
        for layer in network.layers:
            layer.mlp[-1].weight.zero_()
            layer.mlp[-1].bias.copy_(torch.tensor([50.0, 0.0]))
    x = torch.full((1, 1, 3), 0.5, requires_grad=True)
    u = network.bind(torch.zeros(1, 4), torch.zeros(1, 1)).to_canonical(x)
    assert torch.allclose(u, 0.5 * torch.full_like(u, math.exp(-16)), rtol=1e-4)  # two layers a coordinate
    bias = network.layers[0].mlp[-1].bias
    assert torch.autograd.grad(u.sum(), bias)[0][0] == 0


# Hash grid and time latent

def slow_hash_grid(grid: HashGrid, v, base=16, growth=1.5, log2_entries=15):
    """Level by level, point by point, corner by corner (Mueller et al. 2022, section 3)."""
    out, first = [], 0
    for level in range(hash_grid.LEVELS):
        scale = base * growth**level - 1
        resolution = math.ceil(scale) + 1
        entries = min(-(-(resolution**2) // 8) * 8, 2**log2_entries)
        features = torch.zeros(len(v), hash_grid.FEATURES)
        for n, (x, y) in enumerate((v * torch.tensor(scale) + 0.5).tolist()):
            x0, y0 = math.floor(x), math.floor(y)
            for dx in (0, 1):
                for dy in (0, 1):
                    i, j = x0 + dx, y0 + dy
                    if resolution**2 <= entries:
                        index = i + j * resolution
                    else:
                        index = (i ^ (j * 2654435761 % 2**32))
                    weight = (x - x0 if dx else 1 - x + x0) * (y - y0 if dy else 1 - y + y0)
                    features[n] += weight * grid.table[first + index % entries].detach()
        out.append(features)
        first += entries
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("M", [1, 7, 60])
def test_hash_grid_equals_a_slow_one(M):
    torch.manual_seed(M)
    grid = HashGrid()
    nn.init.normal_(grid.table)
    t = frame_times(M)
    for v in (torch.rand(M, 2), torch.cat([t, torch.log(t + 1)], dim=-1)):
        assert torch.allclose(grid(v), slow_hash_grid(grid, v), atol=2e-3)  # float32 positions at scale 7000
    assert grid(v).shape == (M, 32)


def test_hash_grid_is_continuous_and_its_gradient_is_the_weight():
    grid = HashGrid()
    v = torch.rand(50, 2)
    out = grid(v)
    (gradient,) = torch.autograd.grad(out[:, 0].sum(), grid.table)
    assert torch.isclose(gradient.sum(), torch.tensor(50.0), atol=1e-3)  # interpolation weights sum to 1
    assert (grid(v + 1e-7) - out).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["hash", "gabor", "table"])
def test_freezing_keeps_the_outputs_and_stops_the_gradient(kind):
    model = small_model(time_latent=kind)
    p, ids = torch.rand(2, 9, 2) * 20, torch.tensor([0, 3])
    before = model.predict_pairs(p, ids, ids.flip(0)).pixels
    model.time_latent.freeze()
    after = model.predict_pairs(p, ids, ids.flip(0)).pixels
    assert torch.equal(before, after)
    after.sum().backward()
    assert all(parameter.grad is None for parameter in model.time_latent.parameters())
    assert all(parameter.grad is not None for parameter in model.deform.layers.parameters())
    assert model.state_dict()["time_latent.frozen"].shape == (5, 16)


def test_times_are_the_papers():
    assert torch.equal(TimeLatent(4).t[:, 0], torch.tensor([0.25, 0.5, 0.75, 1.0]))


# Encodings and canonical field

def periodic_encoding_plain(v, num_octaves, scale, identity):
    """Reference version of `periodic_encoding`."""
    angles = v[..., None] * scale * 2.0 ** torch.arange(num_octaves, dtype=v.dtype)  # (..., D, L)
    code = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
    return torch.cat([v, code], dim=-1) if identity else code


@pytest.mark.parametrize("shape", [(1, 3), (40, 3), (2, 5, 3)])
@pytest.mark.parametrize("octaves,scale,identity", [(11, 1.0, False), (4, math.pi, True)])
def test_fused_encoding_equals_the_plain_one(shape, octaves, scale, identity):
    torch.manual_seed(0)
    v = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    fused, plain = (f(v, octaves, scale, identity) for f in (periodic_encoding, periodic_encoding_plain))
    assert torch.allclose(fused, plain, atol=1e-9)
    assert torch.allclose(grads(fused, v)[0], grads(plain, v)[0], atol=1e-8)


def test_code_has_66_columns_in_the_stated_order():
    v = torch.tensor([[0.3, -0.7, 1.1]], dtype=torch.float64)
    code = periodic_encoding(v, 11)[0]
    assert code.shape == (66,)
    for d in range(3):
        for k in range(11):
            assert code[22 * d + k].item() == pytest.approx(math.sin(2**k * v[0, d].item()), abs=1e-9)
            assert code[22 * d + 11 + k].item() == pytest.approx(math.cos(2**k * v[0, d].item()), abs=1e-9)


@pytest.mark.parametrize("M,D,width,layers", [(1, 3, 8, 1), (20, 66, 16, 3), (7, 1, 12, 2)])
def test_fused_gabor_network_equals_the_plain_one(M, D, width, layers):
    torch.manual_seed(M)
    net = GaborNet(D, width, 4, layers, alpha=3.0, input_scale=4.0).double()
    v = torch.randn(M, D, dtype=torch.float64, requires_grad=True)
    results = []
    for net.fused in (True, False):
        out = net(v)
        results.append((out, *grads(out, [v, *net.parameters()])))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-9)


def test_filters_on_the_code_are_alive():
    """As many of them as on raw coordinates, where the published initialization leaves 29% (docs/encoding.md)."""
    torch.manual_seed(0)
    field = CanonicalField(128)
    u = torch.rand(2000, 3) * 2 - 1
    alive = [(envelope(filter_, field.code(u)) > 0.01).float().mean() for filter_ in field.net.filters]
    assert min(alive) > 0.9


def test_contraction_reaches_all_of_space():
    u = torch.randn(1000, 3) * torch.logspace(-2, 4, 1000)[:, None]
    c = contract(u)
    assert (c.norm(dim=-1) <= 2).all()
    inside = u.norm(dim=-1) <= 1
    assert torch.equal(c[inside], u[inside])
    assert torch.allclose(torch.nn.functional.cosine_similarity(c, u), torch.ones(1000), atol=1e-5)


def test_pixels_and_coordinates():
    p = torch.rand(50, 2) * 40
    assert torch.allclose(denormalize_pixels(normalize_pixels(p, (24, 32)), (24, 32)), p, atol=1e-5)
    corners = normalize_pixels(torch.tensor([[0.0, 0.0], [31.0, 23.0]]), (24, 32))
    assert torch.equal(corners, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))


# Rendering

@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), K=st.integers(1, 40), opaque=st.booleans())
def test_compositing_weights_sum_to_at_most_one(seed, K, opaque):
    torch.manual_seed(seed)
    alpha = torch.rand(30, K)
    if opaque:
        alpha[:, K // 2] = 1.0
    w = compositing_weights(alpha)
    assert (w >= 0).all() and (w.sum(-1) <= 1 + 1e-5).all()
    expected = 1 - (1 - alpha).prod(-1)
    assert torch.allclose(w.sum(-1), expected, atol=1e-5)
    if opaque:
        assert (w[:, K // 2 + 1:] < 1e-6).all()


def test_jitter_stays_in_its_stratum_and_is_sorted():
    z = ray_depths(16, 0.0, 2.0, torch.zeros(()))
    jittered = jitter_depths(z, torch.rand(200, len(z), generator=torch.Generator().manual_seed(0)))
    assert (jittered.diff(dim=-1) >= 0).all() and jittered.min() >= 0 and jittered.max() <= 2
    assert (jittered - z).abs().max() <= (z[1] - z[0]) / 2 + 1e-6
    assert (jittered.mean(0)[1:-1] - z[1:-1]).abs().max() < 0.02


# Tracker

def test_tracks_equal_correspondences_frame_by_frame():
    model = small_model()
    tracker = Tracker(model, chunk_size=1)  # 4 rays of 8 samples at a time
    queries = torch.tensor([[0, 5, 7], [3, 10.5, 20], [3, 2, 3], [3, 20, 30], [3, 1, 1]]).numpy()
    out = tracker.track(queries)
    for n, (t, y, x) in enumerate(queries):
        for j in range(5):
            expected = (x, y) if j == t else tracker.correspond(queries[n:n + 1, :0:-1].copy(), int(t), j)[0]
            assert out.tracks[n, j] == pytest.approx(expected, abs=1e-3)
        assert out.visible[n, int(t)]
    assert ((out.occlusion_score >= 0) & (out.occlusion_score <= 1 + 1e-5)).all()
    some = tracker.track(queries, [3, 1])
    assert np.allclose(some.tracks, out.tracks[:, [3, 1]], atol=1e-4)
    assert np.array_equal(some.visible, out.visible[:, [3, 1]])


@pytest.mark.parametrize("kind", ["mlp", "warp"])
def test_points_of_several_frames_are_tracked_as_those_of_one_frame_alone(kind):
    """Chunks of the points of several frames; one evaluation of occlusion for a chunk and frame, not for each query
    frame."""
    torch.manual_seed(0)
    options = {"deform": "warp", "field": "images"} if kind == "warp" else {}
    tracker = Tracker(small_model(**options), chunk_size=1)  # 4 rays of 8 samples at a time
    queries = np.array([[4, 1, 1], [0, 5, 7], [3, 10.5, 20], [0, 30, 2], [3, 2, 3], [1, 20, 30]], np.float32)
    calls = []
    score = tracker.model.occlusion_score
    tracker.model.occlusion_score = lambda *args: calls.append(args) or score(*args)
    together = tracker.track(queries)
    assert len(calls) == 2 * 5
    for n in range(len(queries)):
        alone = tracker.track(queries[n:n + 1])
        assert np.allclose(together.tracks[n], alone.tracks[0], atol=1e-3)
        assert np.allclose(together.depth[n], alone.depth[0], atol=1e-5)
        assert np.allclose(together.occlusion_score[n], alone.occlusion_score[0], atol=1e-5)
        assert np.array_equal(together.visible[n], alone.visible[0])
    assert tracker.track(queries[:0]).tracks.shape == (0, 5, 2)


def test_chunks_do_not_change_dense_results():
    model = small_model()
    a, b = (Tracker(model, chunk_size=n) for n in (10, 10_000))
    assert abs(coarse_flow(a, 0, 3, 1) - coarse_flow(b, 0, 3, 1)).max() < 1e-3
    for t in (1, 2):
        for one, other in zip(colors_and_depths(a, t, 1), colors_and_depths(b, t, 1), strict=True):
            assert abs(one - other).max() < 1e-4
