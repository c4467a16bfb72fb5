"""DINO, DINOv2 and depth models through transformers, with small random models of the same architectures."""

import json

import cv2
import numpy as np
import pytest
import torch

from common.errors import UserError
from common.geometry import pixel_grid, similarity
from loaders.correspondences import open_correspondences
from loaders.depth import load_depth
from loaders.sequence import open_sequence
from preprocessing.cli import main
from preprocessing.depth_priors import normalized, value_range

SMALL = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of random models by name; skipped where transformers is not installed."""
    transformers = pytest.importorskip("transformers", reason="needs requirements-models.txt")
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    dino2 = {**SMALL, "image_size": 56, "patch_size": 14}
    neck = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    stages = {"out_features": [f"stage{k}" for k in range(1, 5)], "reshape_hidden_states": False}
    made = {
        "dino": transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=64, patch_size=16), False),
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**dino2)),
        "registers": transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**dino2)),
        "depth_anything": transformers.DepthAnythingForDepthEstimation(transformers.DepthAnythingConfig(
            backbone_config=transformers.Dinov2Config(**dino2, **stages), reassemble_hidden_size=24, patch_size=14,
            head_hidden_size=4, **neck)),
        "midas": transformers.DPTForDepthEstimation(transformers.DPTConfig(
            **SMALL, image_size=384, patch_size=16, backbone_out_indices=[0, 1, 2, 3], **neck))}
    for name, model in made.items():
        model.save_pretrained(root / name)
    return root, {name: model.eval() for name, model in made.items()}


def picture(size, seed=0):
    noise = np.random.default_rng(seed).uniform(0, 255, (*size, 3)).astype(np.float32)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


@pytest.mark.parametrize("name,extra", [("dino", 1), ("dinov2", 1), ("registers", 5)])
def test_features_are_the_librarys_own_patch_tokens(name, extra, models):
    from third_party.dino import DinoFeatures

    root, made = models
    extract = DinoFeatures(str(root / name), side=100)
    for size in ((90, 130), (151, 77)):  # landscape, and portrait and odd
        image = picture(size)
        features, x = extract(image), extract.prepare(image)
        h, w = features.shape[:2]
        assert x.shape == (1, 3, h * extract.patch, w * extract.patch)
        assert min(x.shape[2:]) == pytest.approx(100, abs=extract.patch)
        with torch.inference_mode():
            tokens = made[name](pixel_values=x, **extract.interpolate).last_hidden_state[0, extra:]
        assert np.array_equal(features, tokens.reshape(h, w, -1).half().numpy())


def test_features_of_a_translated_image_translate(models):
    """In the frame's pixels: looked up at the same point of the scene, features are alike, and elsewhere not."""
    from third_party.dino import DinoFeatures

    extract = DinoFeatures(str(models[0] / "dinov2"), side=96)
    big = picture((140, 180))
    a, b = (torch.from_numpy(extract(big[y: y + 96, x: x + 128].copy())).float() for y, x in ((0, 0), (14, 28)))
    a, b = (f - torch.cat([a, b]).flatten(0, 1).mean(0) for f in (a, b))  # a random network's tokens share a mean
    p = pixel_grid((96, 128))[40:82, 44:110].reshape(-1, 2)
    right = similarity(a, b, p, p - torch.tensor([28.0, 14.0]), (96, 128)).mean()
    for wrong in ((0, 0), (14.0, 28.0), (28.0, 0.0), (14.0, 14.0), (42.0, 14.0)):
        assert right > similarity(a, b, p, p - torch.tensor(wrong), (96, 128)).mean() + 0.1


def test_a_model_that_is_not_available_is_one_line(models, tmp_path):
    from third_party.dino import DinoFeatures

    with pytest.raises(UserError, match=r"--offline, and the model facebook/dino-vits16 cannot .*--weights_dir"):
        DinoFeatures("facebook/dino-vits16", weights_dir=tmp_path, offline=True)
    (tmp_path / "dino-vits16").mkdir()
    for file in (models[0] / "dino").iterdir():
        (tmp_path / "dino-vits16" / file.name).write_bytes(file.read_bytes())
    assert DinoFeatures("facebook/dino-vits16", weights_dir=tmp_path, offline=True).patch == 16
    weights = tmp_path / "dino-vits16" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        DinoFeatures("facebook/dino-vits16", weights_dir=tmp_path, offline=True)


@pytest.fixture
def sequence(tmp_path):
    (tmp_path / "seq" / "color").mkdir(parents=True)
    for t in range(4):
        cv2.imwrite(str(tmp_path / "seq" / "color" / f"{t:05d}.png"), np.roll(picture((48, 64)), 2 * t, axis=1))
    return open_sequence(tmp_path / "seq")


def test_the_command_computes_dino_features(sequence, models):
    main(["--data_dir", str(sequence.root), "--features", "dino", "--feature_model", str(models[0] / "dino"),
          "--feature_side", "64", "--depth", "depth_anything", "--depth_model", str(models[0] / "depth_anything")])
    assert open_correspondences(sequence).meta["method"]["feature_model"] == "dino"
    assert load_depth(sequence).shape == (4, 48, 64)


@pytest.mark.parametrize("kind", ["depth_anything", "midas"])
def test_disparity_is_the_librarys_own(kind, models):
    from third_party.depth import DisparityEstimator

    estimator = DisparityEstimator(kind, str(models[0] / kind))
    assert estimator.input_size((480, 854)) == ((518, 924) if kind == "depth_anything" else (384, 384))
    assert estimator(picture((40, 60))).shape == (40, 60)
    h, w = estimator.input_size((40, 40))
    x, seen = picture((h, w)), []
    estimator.model.register_forward_hook(lambda module, args, kwargs, out: seen.append(kwargs), with_kwargs=True)
    found = estimator(x)
    with torch.inference_mode():
        assert np.allclose(models[1][kind](**seen[0]).predicted_depth[0], found, atol=1e-4)


# Depth priors

def test_one_scale_and_shift_serve_the_video():
    maps = [np.linspace(t, t + 10, 5000, dtype=np.float32).reshape(50, 100) for t in (0, 5)]
    low, high = value_range(maps)
    z = [normalized(m, low, high) for m in maps]
    assert z[0].min() == 0 and z[1].max() == 2 and z[0].dtype == np.float16
    assert z[1][20, 0] - z[0][20, 0] == pytest.approx(2 * 5 / (high - low), abs=2e-3)


@pytest.mark.parametrize("disparity", [False, True])
def test_depth_maps_of_the_user(disparity, sequence, tmp_path):
    maps = np.random.default_rng(0).uniform(3, 7, (4, 48, 64)).astype(np.float32)
    (tmp_path / "maps").mkdir()
    for t, d in enumerate(maps):
        np.save(tmp_path / "maps" / f"{t}.npy", d)
    np.savez(tmp_path / "maps.npz", depth=maps)
    found = []
    for source in ("maps", "maps.npz"):
        main(["--data_dir", str(sequence.root), "--depth", "npz", "--depth_dir", str(tmp_path / source)]
             + ["--depth_is_disparity"] * disparity)
        found.append(load_depth(sequence))
    assert np.array_equal(*found) and found[0].min() == 0 and found[0].max() == 2
    assert np.corrcoef(found[0].ravel().astype(float), maps.ravel())[0, 1] * (-1) ** disparity > 0.99
    assert sorted(p.name for p in (sequence.root / "depth").iterdir())[-1] == "meta.json"


def test_depth_needs_no_options_of_the_correspondences_that_are_there(sequence, tmp_path, caplog):
    folder = ["--data_dir", str(sequence.root)]
    main([*folder, "--pairs", "window:1", "--no-chain"])
    store = (sequence.root / "correspondences" / "meta.json").read_bytes()
    np.savez(tmp_path / "d.npz", depth=np.random.default_rng(0).random((4, 48, 64)))
    depth = ["--depth", "npz", "--depth_dir", str(tmp_path / "d.npz")]
    with caplog.at_level("INFO"):
        main(folder + depth)
    assert load_depth(sequence).shape == (4, 48, 64) and "left as they are" in caplog.text
    assert (sequence.root / "correspondences" / "meta.json").read_bytes() == store
    for given in (["--pairs", "all"], ["--flow", "dis"], ["--flow_frames"], ["--chain"]):  # the last three: defaults
        with pytest.raises(UserError, match="was made with"):
            main([*folder, *depth, *given])


def test_depth_of_other_frames_is_refused(sequence, tmp_path):
    with pytest.raises(UserError, match="no depth priors"):
        load_depth(sequence)
    np.savez(tmp_path / "d.npz", depth=np.random.default_rng(0).random((4, 48, 64)))
    for wrong, words in ((np.zeros((4, 48, 60)), r"resize the maps"), (np.zeros((3, 48, 64)), "of 4 maps")):
        np.savez(tmp_path / "wrong.npz", depth=wrong)
        with pytest.raises(UserError, match=words):
            main(["--data_dir", str(sequence.root), "--depth", "npz", "--depth_dir", str(tmp_path / "wrong.npz")])
    main(["--data_dir", str(sequence.root), "--depth", "npz", "--depth_dir", str(tmp_path / "d.npz")])
    cv2.imwrite(str(sequence.root / "color" / "00002.png"), picture((48, 64), seed=9))
    with pytest.raises(UserError, match=r"other frames: 1 changed, first 00002\.png"):
        load_depth(open_sequence(sequence.root))
    assert "high" in json.loads((sequence.root / "depth" / "meta.json").read_text())
