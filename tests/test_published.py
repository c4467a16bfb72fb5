"""Parity with the outputs of the published OmniMotion."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from losses.losses import objective, smoothness_loss
from models.factory import checkpoint_num_frames, model_from_checkpoint

RAYS = SimpleNamespace(num_samples_ray=32, min_depth=0.0, max_depth=2.0, precision="fp32", mlp_backend="torch")


@pytest.fixture(params=[True, False], ids=["fused", "plain"])
def published(request, shared):
    checkpoint = torch.load(shared("reference/omnimotion_000030.pth"), map_location="cpu", weights_only=True)
    outputs = np.load(shared("reference/omnimotion_outputs.npz"))
    assert checkpoint_num_frames(checkpoint, "published") == 6
    model = model_from_checkpoint(checkpoint, outputs["frame_0"].shape[:2], RAYS, torch.device("cpu"))
    model.deform.fused = request.param
    return model, {k: torch.from_numpy(np.asarray(outputs[k])) for k in outputs}


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@torch.no_grad()
def test_correspondences_and_occlusion(published):
    model, ref = published
    for use_max_loc in (0, 1):
        p2, depth = model.correspond(ref["px1"], ref["ids1"], ref["ids2"], bool(use_max_loc))
        close(p2, ref[f"px2_maxloc{use_max_loc}"], 1e-2)
        score = model.occlusion_score(p2, depth, ref["ids2"])
        close(score[..., None], ref[f"occ_maxloc{use_max_loc}"], 1e-4)


@torch.no_grad()
def test_colors_depths_and_points(published):
    model, ref = published
    rgb, depth = model.color_and_depth(ref["px1"], ref["ids1"])
    close(rgb, ref["rgb"], 1e-4)
    close(depth[..., None], ref["depth"], 1e-4)
    x = ref["x_local"].flatten(1, 2)
    u = model.maps(ref["ids1"][:1]).to_canonical(x)
    close(u.view_as(ref["x_canonical"]), ref["x_canonical"], 1e-4)
    close(model.maps(ref["ids2"][:1]).to_local(u).view_as(ref["x_target"]), ref["x_target"], 1e-4)


@torch.no_grad()
def test_losses(published):
    model, ref = published
    weights = {"flow": 1.0, "rgb": 2.0, "rgb_gradient": 2.0, "flow_gradient": 0.05, "depth_range": 10.0,
               "distortion": 3.0}
    batch = SimpleNamespace(pixels1=ref["px1"], pixels2=ref["batch_pts2"], rgb1=ref["batch_gt_rgb1"],
                            weights=ref["batch_weights"][..., 0])
    prediction = model.predict_pairs(ref["px1"], ref["ids1"], ref["ids2"])
    total, terms = objective(prediction, batch, weights, model.size, (0.0, 2.0))
    inner = (ref["ids1"] >= 1) & (ref["ids1"] < 5)
    quarter = prediction.local[inner][:, : ref["px1"].shape[1] // 4]
    terms["smoothness"] = smoothness_loss(*model.scene_flow(quarter, ref["ids1"][inner]))
    names = {"flow": "flow", "rgb": "rgb", "depth_range": "depth_range", "distortion": "distortion",
             "flow_gradient": "flow_gradient", "smoothness": "scene_flow_smoothness"}
    for ours, theirs in names.items():
        expected = ref[f"loss_loss_{theirs}"].item()
        assert terms[ours].item() == pytest.approx(expected, rel=1e-4, abs=1e-12), ours
    assert total.item() == pytest.approx(ref["loss_Loss"].item(), rel=1e-4)
