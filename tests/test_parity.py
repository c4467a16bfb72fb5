"""Parity with OmniMotion: the same parameters give the outputs and losses that OmniMotion's code computed on the CPU.

Two sets of parameters. "seeded" are drawn here, exactly as they were drawn for tests/data/omnimotion_seeded.npz, so the
test runs in every clone. "trained" is a checkpoint of a short OmniMotion run, which is not part of the repository.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loaders.checkpoint import Checkpoint, read_checkpoint
from losses.losses import smoothness_loss
from losses.objective import pair_losses
from models.factory import checkpoint_num_frames, model_from_checkpoint

SEEDED = Path(__file__).parent / "data" / "omnimotion_seeded.npz"
NUM_FRAMES = 6
RAYS = SimpleNamespace(num_samples_ray=32, min_depth=0.0, max_depth=2.0, precision="fp32", mlp_backend="torch")


def drawn_checkpoint(reference) -> Checkpoint:
    """A checkpoint in OmniMotion's format with random parameters.

    Parameter i is m + s * standard_normal with seed 1000 + i, or its absolute value where it must be positive.
    The masks of the coupling layers are constants: 0 at the coordinate that the layer changes."""
    checkpoint = {"feature_mlp": {}, "deform_mlp": {}, "color_mlp": {}, "num_imgs": NUM_FRAMES}
    statistics = reference["parameter_mean_std_positive"]  # (P, 3)
    masks = iter(reference["masks"])  # strings such as "1 0 1", in the order of the coupling layers
    for i, full_name in enumerate(reference["parameter_names"]):
        network, name = str(full_name).split("/")
        shape = [int(side) for side in str(reference["parameter_shapes"][i]).split()]
        if name.endswith(".mask"):
            value = np.array([float(number) for number in str(next(masks)).split()])
        else:
            mean, std, positive = statistics[i]
            value = mean + std * np.random.RandomState(1000 + i).standard_normal(int(np.prod(shape)))
            if positive:
                value = np.abs(value)
        checkpoint[network][name] = torch.from_numpy(value.astype(np.float32).reshape(shape))
    return Checkpoint(config={}, model=checkpoint)


@pytest.fixture(params=["seeded", "trained"])
def checkpoint_and_outputs(request):
    if request.param == "seeded":
        outputs = dict(np.load(SEEDED))
        return drawn_checkpoint(outputs), outputs, tuple(outputs["frame_size"])
    shared = request.getfixturevalue("shared")
    checkpoint = read_checkpoint(shared("reference/omnimotion_000030.pth"))
    outputs = dict(np.load(shared("reference/omnimotion_outputs.npz")))
    return checkpoint, outputs, outputs["frame_0"].shape[:2]


@pytest.fixture(params=[True, False], ids=["fused", "plain"])
def loaded(request, checkpoint_and_outputs):
    checkpoint, outputs, size = checkpoint_and_outputs
    assert checkpoint_num_frames(checkpoint, "a checkpoint of OmniMotion") == NUM_FRAMES
    model = model_from_checkpoint(checkpoint, tuple(map(int, size)), RAYS, torch.device("cpu"))
    model.deform.fused = request.param
    model.field.net.fused = request.param
    return model, {name: torch.from_numpy(np.asarray(value)) for name, value in outputs.items()
                   if value.dtype.kind in "fi"}


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@torch.no_grad()
def test_correspondences_and_occlusion(loaded):
    model, ref = loaded
    for use_max_loc in (0, 1):
        p2, depth = model.correspond(ref["px1"], ref["ids1"], ref["ids2"], bool(use_max_loc))
        close(p2, ref[f"px2_maxloc{use_max_loc}"], 1e-2)
        score = model.occlusion_score(p2, depth, ref["ids2"])
        close(score[..., None], ref[f"occ_maxloc{use_max_loc}"], 1e-4)


@torch.no_grad()
def test_colors_depths_and_points(loaded):
    model, ref = loaded
    rgb, depth = model.color_and_depth(ref["px1"], ref["ids1"])
    close(rgb, ref["rgb"], 1e-4)
    close(depth[..., None], ref["depth"], 1e-4)
    x = ref["x_local"].flatten(1, 2)
    u = model.maps(ref["ids1"][:1]).to_canonical(x)
    close(u.view_as(ref["x_canonical"]), ref["x_canonical"], 1e-4)
    close(model.maps(ref["ids2"][:1]).to_local(u).view_as(ref["x_target"]), ref["x_target"], 1e-4)


@torch.no_grad()
def test_losses(loaded):
    model, ref = loaded
    weights = {"flow": 1.0, "rgb": 2.0, "rgb_gradient": 2.0, "flow_gradient": 0.05, "depth_range": 10.0,
               "distortion": 3.0}
    batch = SimpleNamespace(pixels1=ref["px1"], pixels2=ref["batch_pts2"], rgb1=ref["batch_gt_rgb1"],
                            weights=ref["batch_weights"][..., 0])
    prediction = model.predict_pairs(ref["px1"], ref["ids1"], ref["ids2"])
    total, terms = pair_losses(prediction, batch, weights, model.size, (0.0, 2.0))
    inner = (ref["ids1"] >= 1) & (ref["ids1"] < 5)
    quarter = prediction.local[inner][:, : ref["px1"].shape[1] // 4]
    terms["smoothness"] = smoothness_loss(*model.scene_flow(quarter, ref["ids1"][inner]))
    names = {"flow": "flow", "rgb": "rgb", "depth_range": "depth_range", "distortion": "distortion",
             "flow_gradient": "flow_gradient", "smoothness": "scene_flow_smoothness"}
    for ours, theirs in names.items():
        expected = ref[f"loss_loss_{theirs}"].item()
        assert terms[ours].item() == pytest.approx(expected, rel=1e-4, abs=1e-12), ours
    assert total.item() == pytest.approx(ref["loss_Loss"].item(), rel=1e-4)
