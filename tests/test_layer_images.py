"""Layer images, the field of configs/fast.txt: one image of color and density for each motion layer."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from inference import dense
from inference.tracker import Tracker
from models.grid_deformation import layer_index
from models.kernels import native
from models.kernels.images import layer_images, layer_images_plain
from models.layer_images import DENSITY_SCALE, EMPTY_DENSITY_BIAS, SEEN_DENSITY_BIAS, SIDES, LayerImages
from models.omnimotion import ModelConfig, OmniMotion


def random_images(num_layers):
    """Random values; each layer's box is another one, and none is a square around the origin."""
    torch.manual_seed(num_layers)
    field = LayerImages((0.0, 2.0), num_layers)
    for p in field.parameters():
        torch.nn.init.normal_(p)
    low = torch.rand(num_layers, 2) - 2
    field.set_boxes(low, low + 1 + 3 * torch.rand(num_layers, 2))
    return field


def looked_up(field, u):
    """The sum of levels `(n, 4)` at canonical points `(n, 3)`: one point and level after the other."""
    layers = layer_index(u[:, 2], field.near, field.range, field.num_layers).tolist()
    center, half = field.boxes.double().numpy().transpose(1, 0, 2)
    out = np.zeros((len(u), 4))
    for k, s in enumerate(layers):
        place = (u[k, :2].double().numpy() - center[s]) / half[s]
        for level in field.levels:
            image = level[s].detach().double().numpy()  # (4, R, R)
            R = image.shape[-1]
            x, y = ((place + 1) / 2 * (R - 1)).clip(0, R - 1)
            i, j = min(int(x), R - 2), min(int(y), R - 2)
            f, g = x - i, y - j
            out[k] += ((1 - f) * (1 - g) * image[:, j, i] + f * (1 - g) * image[:, j, i + 1]
                       + (1 - f) * g * image[:, j + 1, i] + f * g * image[:, j + 1, i + 1])
    return torch.from_numpy(out).float()


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_values_equal_a_slow_look_up(num_layers):
    """Inside the boxes, outside, and on their corners, where the layers' images touch in memory."""
    field = random_images(num_layers)
    u = torch.rand(200, 3) * torch.tensor([6.0, 6.0, 3.0]) - torch.tensor([3.0, 3.0, 0.5])
    center, half = field.boxes.unbind(1)
    for s in range(num_layers):
        for k, (a, b) in enumerate([(-1, -1), (1, -1), (-1, 1), (1, 1), (0, 1), (0, -1)]):
            u[10 * s + k] = torch.tensor([*(center[s] + half[s] * torch.tensor([a, b])), 2 * (s + 0.5) / num_layers])
    rgb, sigma = field(u)
    plain = looked_up(field, u)
    assert torch.allclose(rgb, plain[:, :3].sigmoid(), atol=2e-4)
    assert torch.allclose(sigma, DENSITY_SCALE * F.softplus(plain[:, 3] - 1), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("num_layers,sides,count", [(1, [2], 1), (2, [3, 5], 50), (4, SIDES, 300)])
def test_kernels_and_pytorch_agree(num_layers, sides, count):
    """Values to 1e-5, gradients of places and levels to 1e-4 of the largest; a third of the points is outside."""
    if native.warp_kernels() is None:
        pytest.skip("the C++ kernels cannot be built on this machine: no g++ or ninja")
    torch.manual_seed(count)
    places = torch.rand(count, 2) * 2.4 - 1.2
    layer = torch.randint(num_layers, (count,))
    levels = [torch.randn(num_layers, 4, R, R) * 0.1 for R in sides]
    weight = torch.randn(count, 4)
    results = []
    for function in (layer_images, layer_images_plain):
        inputs = [x.clone().requires_grad_() for x in (places, *levels)]
        out = function(inputs[0], layer, inputs[1:])
        results.append((out, torch.autograd.grad((out * weight).sum(), inputs)))
    fast, plain = results
    assert torch.allclose(fast[0], plain[0], atol=1e-5)
    for a, b in zip(fast[1], plain[1], strict=True):
        assert b.abs().max() > 0 and torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_outside_its_box_an_image_has_the_values_of_its_border():
    """Far outside, too, and not those of another layer's image."""
    field = random_images(2)
    center, half = field.boxes[0]
    border = torch.stack([center[0] + half[0] * torch.linspace(-1, 1, 9), (center[1] + half[1]).expand(9),
                          torch.full((9,), 0.5)], -1)
    for distance in (0.01, 3.0, 1e6):
        below = border + torch.tensor([0.0, distance, 0.0])
        for there, here in zip(field(below), field(border), strict=True):
            assert torch.allclose(there, here, rtol=1e-3, atol=1e-3)
    assert all(out.isfinite().all() for out in field(torch.tensor([[1e9, -1e9, 0.5], [-1e9, 0.0, -1e9]])))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_gradients_reach_only_the_layer_of_a_point(num_layers):
    """Also at the top and the bottom of the image."""
    field = random_images(num_layers)
    center, half = field.boxes.unbind(1)
    for s in range(num_layers):
        x = torch.linspace(-1.2, 1.2, 15)
        u = torch.stack([center[s, 0] + half[s, 0] * x, center[s, 1] + half[s, 1] * x.flip(0),
                         torch.full((15,), 2 * (s + 0.5) / num_layers)], -1)
        field.zero_grad()
        rgb, sigma = field(u)
        (rgb.sum() + sigma.sum()).backward()
        for level in field.levels:
            share = level.grad.abs().sum((1, 2, 3)) / level.grad.abs().sum()
            assert share[s] > 0.999


def test_boxes_are_what_the_images_cover():
    field = LayerImages((0.0, 2.0), 2)
    low, high = torch.tensor([[-1.0, -2.0], [0.0, 1.0]]), torch.tensor([[3.0, 4.0], [2.0, 9.0]])
    field.set_boxes(low, high)
    for s, z in ((0, 0.5), (1, 1.5)):
        at = torch.stack([low[s], high[s], (low[s] + high[s]) / 2, high[s] + 5])
        u = torch.cat([at, torch.full((4, 1), z)], -1)
        assert torch.allclose(field.place(u)[:3], torch.tensor([[-1.0, -1], [1, 1], [0, 0]]), atol=1e-6)
        last = SIDES[-1] - 1
        assert torch.allclose(field.vertices_of(u), torch.tensor([0, last, last / 2, last])[:, None].expand(4, 2))


def test_boxes_are_part_of_the_checkpoint():
    config = ModelConfig(3, 20, 30, num_samples_ray=2, deform="warp", field="images", grid_levels=2)
    model, again = OmniMotion(config), OmniMotion(config)
    model.field.set_boxes(torch.tensor([[-3.0, -1], [-2, -2]]), torch.tensor([[1.0, 2], [4, 4]]))
    again.load_state_dict(model.state_dict())
    u = torch.rand(20, 3) * 4 - 1
    assert torch.equal(again.field.boxes, model.field.boxes)
    assert all(map(torch.equal, again.field(u), model.field(u)))


@pytest.mark.parametrize("S", [2, 3])
def test_votes_change_the_density_of_their_layer_at_their_vertices(S):
    """A vote at row y and column x is at the canonical point of that vertex; colors and the last layer stay."""
    field = random_images(S)
    side = field.side
    votes = torch.zeros(S - 1, side, side)
    signs = [(-1) ** s for s in range(S - 1)]
    for s, sign in enumerate(signs):
        votes[s, 40, 200] = sign
    center, half = field.boxes.unbind(1)
    place = torch.tensor([[200.0, 40], [40, 200]]) / (side - 1) * 2 - 1
    u = torch.stack([torch.cat([center[s] + half[s] * place, torch.full((2, 1), 2 * (s + 0.5) / S)], -1)
                     for s in range(S)])  # (S, 2, 3)
    before = looked_up(field, u.flatten(0, 1)).view(S, 2, 4)
    field.start_at(votes)
    change = looked_up(field, u.flatten(0, 1)).view(S, 2, 4) - before
    expected = [SEEN_DENSITY_BIAS if sign > 0 else EMPTY_DENSITY_BIAS for sign in signs]
    assert torch.allclose(change[:-1, 0, 3], torch.tensor(expected), rtol=1e-3)
    change[:-1, 0, 3] = 0
    assert change.abs().max() < 1e-3


def test_a_new_field_is_opaque_in_the_last_layer_only():
    for S in (1, 2, 3):
        torch.manual_seed(0)
        field = LayerImages((0.0, 2.0), S)
        z = torch.rand(300, 1) * 2
        alpha = 1 - torch.exp(-field(torch.cat([torch.rand(300, 2) * 3 - 1.5, z], -1))[1])
        last = z[:, 0] > 2 * (S - 1) / S
        assert alpha[last].min() > 0.99 and (S == 1 or alpha[~last].max() < 0.8)


def test_points_do_not_depend_on_their_number():
    field, u = random_images(3), torch.rand(7, 3) * 4 - 2
    for every, some in zip(field(u), field(u[:4]), strict=True):
        assert torch.allclose(every[:4], some, atol=1e-6)
    assert [out.shape for out in field(torch.zeros(2, 3, 5, 3))] == [(2, 3, 5, 3), (2, 3, 5)]


def test_the_canonical_volume_of_layers_is_rendered_like_a_frame():
    """New maps are the identity, so the volume looks as a frame does: one sample a layer."""
    torch.manual_seed(0)
    model = OmniMotion(ModelConfig(3, 20, 30, num_samples_ray=3, deform="warp", field="images", grid_layers=3))
    for level in model.field.levels:
        torch.nn.init.normal_(level)
    tracker = Tracker(model)
    expected, _ = dense.colors_and_depths(tracker, 1, 1)
    found = dense.render_canonical(tracker, np.array([-1, -1, 0]), np.array([1, 1, 2]), (20, 30))
    assert expected.std() > 0.05 and np.allclose(found, expected, atol=1e-5)
