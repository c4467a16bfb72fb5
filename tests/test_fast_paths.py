"""Fast paths against their plain twins, values and gradients, in float32 and with bf16 products."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from configs.options import parse
from losses.losses import front, gradient_loss
from models.factory import new_model
from models.gabor import GaborNet
from models.invertible import InvertibleNetwork
from models.kernels import native
from models.kernels.backend import Products, bf16_units, choose_products, set_products
from models.kernels.fused_mlp import chain
from models.omnimotion import ModelConfig, OmniMotion

CPU = torch.device("cpu")
SHAPES = [(1, 1, 18, 32, 1, 2), (3, 50, 18, 64, 3, 2), (4, 300, 9, 32, 5, 5), (2, 128, 5, 96, 2, 8)]


@pytest.fixture(params=["PyTorch", "emulated", "C++"])
def bf16(request):
    """All ways to make bf16 products."""
    if request.param != "C++":
        return Products(torch.bfloat16, emulated=request.param == "emulated")
    if native.kernels() is None:
        pytest.skip("no CPU with AMX here, or no compiler")
    return Products(torch.bfloat16, native.kernels())


def chain_plain(e, layers, slopes):
    """Reference version of `chain`."""
    for (weight, bias), slope in zip(layers, [*slopes, None], strict=True):
        e = F.linear(e, weight)
        e = (e.view(len(bias), -1, e.shape[-1]) + bias).flatten(0, 1) if bias.dim() == 3 else e + bias
        e = e if slope is None else F.leaky_relu(e, slope)
    return e


def random_chain(B, M, D, width, hidden, out):
    """Input, layers with a bias a frame in the second one, and all these tensors."""
    torch.manual_seed(B * M + width)
    sizes = [D] + [width] * hidden + [out]
    layers = []
    for k, (n_in, n_out) in enumerate(pairwise(sizes)):
        bias = torch.randn(B, 1, n_out) if k == 1 and hidden > 1 else torch.randn(n_out)
        layers.append(((torch.randn(n_out, n_in) / n_in**0.5).requires_grad_(), (0.3 * bias).requires_grad_()))
    e = torch.randn(B * M, D, requires_grad=True)
    return e, layers, [e, *(tensor for layer in layers for tensor in layer)]


def with_grads(output, inputs):
    """An output and the gradients of a random projection of it."""
    torch.manual_seed(5)
    return [output, *torch.autograd.grad((output * torch.randn_like(output)).sum(), inputs)]


def assert_close(results, expected, tolerance):
    """Every tensor within `tolerance` of the norm of the expected one."""
    for a, b in zip(results, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-12, ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_chain_in_float32(shape):
    e, layers, tensors = random_chain(*shape)
    slopes = [0.0] + [0.01] * (len(layers) - 2)
    assert_close(with_grads(chain(e, layers, slopes, Products()), tensors),
                 with_grads(chain_plain(e, layers, slopes), tensors), 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_chain_in_bf16(shape, bf16):
    """Values of the real chain; gradients where the activation has no kink. At a kink a rounded operand may fall on the
    other side, and then that gradient is another one in any bf16 arithmetic."""
    e, layers, tensors = random_chain(*shape)
    slopes = [0.0] + [0.01] * (len(layers) - 2)
    assert_close([chain(e, layers, slopes, bf16)], [chain_plain(e, layers, slopes)], 1e-2)
    slopes = [1.0] * (len(layers) - 1)
    assert_close(with_grads(chain(e, layers, slopes, bf16), tensors),
                 with_grads(chain_plain(e, layers, slopes), tensors), 1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_chain_in_bf16_by_kernels_and_by_pytorch(shape):
    """The same rounded operands, kinks included: the gradients point the same way, and twice the same."""
    if native.kernels() is None:
        pytest.skip("no CPU with AMX here, or no compiler")
    e, layers, tensors = random_chain(*shape)
    slopes = [0.0] + [0.01] * (len(layers) - 2)
    results = [with_grads(chain(e, layers, slopes, Products(torch.bfloat16, kernels)), tensors)
               for kernels in (native.kernels(), None)]
    for a, b in zip(*results, strict=True):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99
    again = with_grads(chain(e, layers, slopes, Products(torch.bfloat16, native.kernels())), tensors)
    assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_encoded_inputs_keep_more_digits_than_bf16(bf16):
    """Coordinates that bf16 cannot tell apart have different codes and different results."""
    a = torch.tensor([[0.5], [0.5 + 2.0**-14]])
    layers = [(torch.ones(32, 1), torch.zeros(32)), (torch.ones(2, 32) / 32, torch.zeros(2))]
    out = chain(a, layers, [0.0], bf16)
    if bf16.native is None:  # its activations are bf16 too
        assert torch.equal(a.bfloat16()[0], a.bfloat16()[1])
        first = torch.tensor([[1.0, -0.5]]), torch.zeros(1)
        assert chain(torch.cat([a, torch.ones(2, 1)], 1), [first, (torch.ones(1, 1), torch.zeros(1))], [1.0],
                     bf16).diff(dim=0).item() == pytest.approx(2.0**-14, rel=1e-2)
    assert (out - 0.5).abs().max() < 2e-3


@pytest.mark.parametrize("n,D,width,hidden", [(1, 3, 32, 1), (300, 66, 64, 2), (129, 7, 96, 3)])
def test_gabor_network_in_bf16(n, D, width, hidden, bf16):
    torch.manual_seed(n)
    net = GaborNet(D, width, 4, hidden, alpha=3.0, input_scale=2.0)
    for filter_ in net.filters:
        filter_.gamma.data.mul_(0.05)
    v = torch.randn(n, D, requires_grad=True)
    net.fused = False
    expected = with_grads(net(v), [v, *net.parameters()])
    net.fused, net.products = True, bf16
    assert_close(with_grads(net(v), [v, *net.parameters()]), expected, 2e-2)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("pairs", [1, 3])
def test_a_step_of_the_whole_model_in_bf16(frozen, pairs, bf16):
    torch.manual_seed(1)
    model = OmniMotion(ModelConfig(num_frames=5, height=100, width=120, num_samples_ray=8, coupling_width=64,
                                   affine_width=32, affine_layers=4, field_width=64, latent_dim=16))
    if frozen:
        model.time_latent.freeze()
    p, ids = torch.rand(pairs, 20, 2) * 99, torch.arange(pairs)
    model.deform.fused = model.field.net.fused = False
    expected = model.predict_pairs(p, ids, ids + 1)
    model.deform.fused = model.field.net.fused = True
    set_products(model, bf16)
    result = model.predict_pairs(p, ids, ids + 1)
    for name in ("canonical", "target", "rgb"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=0, atol=1e-2)
    (result.target.sum() + result.rgb.sum()).backward()
    assert all(torch.isfinite(q.grad).all() for q in model.parameters() if q.grad is not None)


def test_bf16_maps_are_inverse_to_each_other(bf16):
    torch.manual_seed(0)
    network = InvertibleNetwork(width=64, latent_dim=16, affine_width=32, affine_layers=4)
    network.products = bf16
    maps = network.bind(torch.randn(3, 16), torch.rand(3, 1))
    x = torch.rand(3, 500, 3) * 2 - 1
    with torch.no_grad():
        assert (maps.to_local(maps.to_canonical(x)) - x).abs().max() < 1e-3


def test_rays_share_the_affine_map():
    torch.manual_seed(0)
    model = OmniMotion(ModelConfig(num_frames=4, height=20, width=30, num_samples_ray=6, coupling_width=32,
                                   affine_width=16, affine_layers=3, field_width=16, latent_dim=16))
    x = model.lift(torch.rand(2, 9, 2) * 19, jitter=torch.rand(2, 1, 6))
    assert torch.equal(x[:, 0, :, 2], x[:, 5, :, 2]) and not torch.equal(x[0, 0, :, 2], x[1, 0, :, 2])
    ids = torch.tensor([1, 3])
    for model.deform.fused in (True, False):
        maps = model.maps(ids)
        torch.testing.assert_close(maps.rays_to_canonical(x), maps.to_canonical(x.flatten(1, 2)).view_as(x),
                                   rtol=0, atol=1e-5)
    with torch.no_grad(), model.bound():
        torch.testing.assert_close(model.maps(ids).rays_to_canonical(x), maps.rays_to_canonical(x), rtol=0, atol=1e-5)
    assert model.maps(ids).f.requires_grad, "bound maps are for the block only"


def test_chosen_points_come_first_in_their_order():
    torch.manual_seed(0)
    for chosen in (torch.rand(50) < 0.4, torch.zeros(50, dtype=torch.bool), torch.ones(50, dtype=torch.bool)):
        a, b, v = torch.rand(50, 2), torch.rand(50, 2), torch.rand(50)
        seen, a1, b1, v1 = front(chosen, a, b, v)
        count = int(chosen.sum())
        assert torch.equal(a1[:count], a[chosen]) and seen.sum() == seen[:count].sum() == count
        expected = gradient_loss(a[chosen], b[chosen], torch.ones(count, dtype=torch.bool), v[chosen])
        torch.testing.assert_close(gradient_loss(a1, b1, seen, v1), expected)


def test_precision_and_backend_are_chosen_or_refused(caplog, monkeypatch):
    assert choose_products("fp32", "auto", CPU) == Products()
    assert choose_products("bf16", "torch", CPU) == Products(torch.bfloat16, emulated=not bf16_units())
    for precision, backend, words in (("tf32", "auto", "tf32 is for CUDA"), ("fp32", "native", "native computes bf16")):
        with pytest.raises(UserError, match=words):
            choose_products(precision, backend, CPU)
    for backend in ("triton", "tcnn"):
        if not torch.cuda.is_available():
            with pytest.raises(UserError, match=f"--mlp_backend {backend}"):
                new_model(parse("train", ["--mlp_backend", backend, "--device", "cpu"]), 4, (16, 16), CPU)
    monkeypatch.setattr(native, "matrix_unit", lambda: False)
    assert choose_products("auto", "auto", CPU) == Products()


def test_a_failed_build_is_logged_and_pytorch_is_used(caplog, monkeypatch, tmp_path):
    if not native.matrix_unit():
        pytest.skip("no CPU with AMX here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    native.kernels.cache_clear()
    try:
        assert choose_products("bf16", "auto", CPU) == Products(torch.bfloat16)  # AMX helps PyTorch's too
        assert "cannot be built" in caplog.text
        assert not list(tmp_path.rglob("*.so"))
    finally:
        native.kernels.cache_clear()
