"""RAFT: parity with the published network, its weights files, and the store that is made with it."""

import hashlib
import shutil
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.errors import UserError
from loaders.correspondences import open_correspondences
from loaders.sequence import open_sequence
from preprocessing import pretrained
from preprocessing.cli import main
from preprocessing.flow import ModelOptions
from preprocessing.pipeline import Method, build_store
from third_party.correlation import AllPairs, OnDemand
from third_party.raft import RAFT
from third_party.raft_flow import RaftFlow, RaftOptions, load_raft, princeton_names

# The network


def test_parity_with_the_published_network(shared):
    model = RaftFlow(shared("weights/raft-small.pth"), RaftOptions())
    reference = np.load(shared("reference/raft_small_bear.npz"))
    encodings = {t: model.encode(reference[f"image_{t}"]) for t in (10, 11, 15)}
    for a, b in ((10, 11), (15, 10)):
        [(flow, _)] = model.flow([encodings[a]], [encodings[b]], [None])
        error = np.linalg.norm(flow - reference[f"flow_{a}_{b}"], axis=-1)
        assert error.mean() < 0.01 and error.max() < 0.1


def test_the_command_finds_the_published_file(shared, tmp_path):
    reference = np.load(shared("reference/raft_small_bear.npz"))
    images = [tmp_path / f"{t}.png" for t in (10, 15)]
    for path, t in zip(images, (10, 15), strict=True):
        Image.fromarray(reference[f"image_{t}"]).save(path)
    main(["flow", *map(str, images), "--flow", "raft", "--weights_dir", str(shared("weights")), "--offline",
          "--out", str(tmp_path / "flow.npy")])
    error = np.linalg.norm(np.load(tmp_path / "flow.npy") - reference["flow_10_15"], axis=-1)
    assert error.mean() < 0.01 and error.max() < 0.1


def slow_lookup(a, b, p, radius):
    """The definition: the volume of all products, pooled, sampled by grid_sample."""
    B, C, h, w = a.shape
    volume = torch.einsum("bcn,bcm->bnm", a.flatten(2), b.flatten(2)).view(B * h * w, 1, h, w) / C ** 0.5
    out = []
    for level in range(4):
        H, W = volume.shape[-2:]
        offset = torch.arange(-radius, radius + 1.0)
        dx, dy = torch.meshgrid(offset, offset, indexing="ij")
        at = p.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2) / 2 ** level + torch.stack([dx, dy], -1)
        at = at / torch.tensor([W - 1, H - 1]) * 2 - 1
        out.append(F.grid_sample(volume, at, align_corners=True).view(B, h, w, -1))
        volume = F.avg_pool2d(volume, 2)
    return torch.cat(out, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("twin", [AllPairs, OnDemand])
def test_correlation_twins_look_up_what_the_definition_says(twin, monkeypatch):
    monkeypatch.setattr("third_party.correlation.VALUES_PER_PIECE", 10_000)  # several pieces
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 16, 16, 19, generator=generator) for _ in range(2))
    p = torch.rand(2, 2, 16, 19, generator=generator) * 40 - 10  # inside, at the border and far outside
    torch.testing.assert_close(twin(a, b, 3)(p), slow_lookup(a, b, p, 3), rtol=1e-4, atol=1e-5)


def test_the_large_network_upsamples_convexly_and_has_the_documented_size():
    assert sum(p.numel() for p in RAFT("large").parameters()) == 5_257_536  # torchvision's documentation
    assert sum(p.numel() for p in RAFT("small").parameters()) == 990_162
    model = RAFT("large").eval()
    flow = torch.full((1, 2, 6, 7), 1.25)
    fine = model._upsample(flow, torch.randn(1, 128, 6, 7))
    assert fine.shape == (1, 2, 48, 56) and torch.allclose(fine[..., 8:-8, 8:-8], torch.tensor(10.0), atol=1e-4)


def test_a_shift_is_found_at_any_size(shared):
    """Odd, portrait and smaller than the coarsest correlation needs."""
    model = RaftFlow(shared("weights/raft-small.pth"), RaftOptions(iterations=8))
    image = np.load(shared("reference/raft_small_bear.npz"))["image_10"]  # 240x428
    for H, W in ((131, 150), (140, 75), (61, 90)):
        a, b = (model.encode(image[dy: dy + H, dx: dx + W].copy()) for dy, dx in ((2, 3), (0, 0)))
        [(flow, _)] = model.flow([a], [b], [None])
        assert flow.shape == (H, W, 2) and flow.dtype == np.float32
        assert np.abs(np.median(flow, axis=(0, 1)) - (3, 2)).max() < 0.4


def test_a_batch_lower_precision_and_a_warm_start(shared):
    model = RaftFlow(shared("weights/raft-small.pth"), RaftOptions(iterations=4))
    reference = np.load(shared("reference/raft_small_bear.npz"))
    a, b = (model.encode(reference[f"image_{t}"][:128, :160]) for t in (10, 15))
    (one, low), (two, _) = model.flow([a, b], [b, a], [None, None])
    [(alone, _)] = model.flow([b], [a], [None])
    assert np.abs(two - alone).max() < 1e-3
    lower = RaftFlow(shared("weights/raft-small.pth"), RaftOptions(iterations=4, precision="bfloat16"))
    [(rough, _)] = lower.flow([b], [a], [None])
    assert 0 < np.abs(rough - alone).mean() < 0.05
    [(further, _)] = model.flow([a], [b], [low])
    longer = RaftFlow(shared("weights/raft-small.pth"), RaftOptions(iterations=12))
    [(target, _)] = longer.flow([a], [b], [None])
    assert np.abs(further - target).mean() < np.abs(one - target).mean()  # it goes on from where the first was


# Weights files


def torchvision_names(state):
    """A princeton-vl state dict of the small or large network as torchvision names it, written out by hand."""
    small = "update_block.gru.convz.weight" in state
    rename = {}
    for ours, theirs in (("fnet", "feature_encoder"), ("cnet", "context_encoder")):
        rename[f"{ours}.conv1"], rename[f"{ours}.conv2"] = f"{theirs}.convnormrelu.0", f"{theirs}.conv"
        rename[f"{ours}.norm1"] = f"{theirs}.convnormrelu.1"
        for layer in (1, 2, 3):
            for block in (0, 1):
                here, there = f"{ours}.layer{layer}.{block}", f"{theirs}.layer{layer}.{block}"
                for k in (1, 2, 3):
                    rename[f"{here}.conv{k}"] = f"{there}.convnormrelu{k}.0"
                    rename[f"{here}.norm{k}"] = f"{there}.convnormrelu{k}.1"
                for k in (0, 1):
                    rename[f"{here}.downsample.{k}"] = f"{there}.downsample.{k}"
    for short, long in (("c1", "corr1"), ("c2", "corr2"), ("f1", "flow1"), ("f2", "flow2")):
        rename[f"update_block.encoder.conv{short}"] = f"update_block.motion_encoder.conv{long}.0"
    rename["update_block.encoder.conv"] = "update_block.motion_encoder.conv.0"
    for gate in "zrq":
        for step in ("",) if small else ("1", "2"):
            rename[f"update_block.gru.conv{gate}{step}"] = (
                f"update_block.recurrent_block.convgru{step or 1}.conv{gate}")
    rename |= {f"update_block.flow_head.conv{k}": f"update_block.flow_head.conv{k}" for k in (1, 2)}
    rename |= {"update_block.mask.0": "mask_predictor.convrelu.0", "update_block.mask.2": "mask_predictor.conv"}
    return {f"{rename[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": v for name, v in state.items()}


@pytest.mark.parametrize("size", ["small", "large"])
def test_torchvision_and_princeton_files_load(size, tmp_path):
    state = RAFT(size).state_dict()
    files = {
        "torchvision": torchvision_names(state), "princeton": {f"module.{k}": v for k, v in state.items()},
        "with_norm3": state | {"fnet.layer2.0.norm3.weight": torch.ones(96)}}  # princeton's: again under downsample.1
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        loaded = load_raft(tmp_path / name)
        assert loaded.size == size and all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    assert princeton_names(files["torchvision"]).keys() == state.keys()


def test_bad_weights_are_one_line(tmp_path):
    path = tmp_path / "raft.pth"
    torch.save(RAFT("small").state_dict(), path)
    whole = path.read_bytes()
    for content, words in ((whole[:5000], "damaged"), (b"<html>404</html>", "damaged")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            load_raft(path)
    for content in ({"layer.weight": torch.zeros(3)}, torch.zeros(3), {"module.fnet.conv1.weight": 5}):
        torch.save(content, path)
        with pytest.raises(UserError, match=r"no RAFT weights|not a table of tensors"):
            load_raft(path)
    torch.save({k: v for k, v in RAFT("small").state_dict().items() if "gru" not in k}, path)
    with pytest.raises(UserError, match="does not fit RAFT small"):
        load_raft(path)


@pytest.fixture
def downloadable(tmp_path, monkeypatch):
    """Two downloadable files on this disk: one by itself, one in an archive with a folder."""
    content = {"alone.pth": b"weights" * 1000, "inside.pth": b"others" * 500}
    (tmp_path / "alone.pth").write_bytes(content["alone.pth"])
    with zipfile.ZipFile(tmp_path / "models.zip", "w") as archive:
        archive.writestr("models/inside.pth", content["inside.pth"])
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    monkeypatch.setattr(pretrained, "WEIGHTS", {
        "alone.pth": pretrained.WeightsFile((tmp_path / "alone.pth").as_uri(), hashes["alone.pth"]),
        "inside.pth": pretrained.WeightsFile((tmp_path / "models.zip").as_uri(), hashes["inside.pth"], archive=True),
        "changed.pth": pretrained.WeightsFile((tmp_path / "alone.pth").as_uri(), "0" * 64),
        "gone.pth": pretrained.WeightsFile((tmp_path / "gone").as_uri(), "0" * 64)})
    return content


def test_weights_are_downloaded_whole_and_checked(downloadable, tmp_path):
    folder = tmp_path / "cache"
    for name, data in downloadable.items():
        assert pretrained.find_weights([name], folder).read_bytes() == data
    for name, words in (("changed.pth", "wrong checksum"), ("gone.pth", "by hand"), ("x.pth", "choose from")):
        with pytest.raises(UserError, match=words):
            pretrained.find_weights([name], folder)
    with pytest.raises(UserError, match=r"--offline.*changed.pth does not exist: download file:.*by hand"):
        pretrained.find_weights(["changed.pth"], folder, offline=True)
    assert sorted(path.name for path in folder.iterdir()) == sorted(downloadable)
    assert pretrained.find_weights(["changed.pth", "inside.pth"], folder, offline=True) == folder / "inside.pth"


# Stores


@pytest.fixture
def random_raft(tmp_path):
    """A folder with a small network of random weights."""
    torch.manual_seed(0)
    torch.save(RAFT("small").state_dict(), tmp_path / "raft-small.pth")
    return ModelOptions(weights_dir=tmp_path, iterations=2)


def test_a_frame_is_encoded_once_and_a_store_resumes(small_sequence, random_raft, tmp_path, monkeypatch):
    """Stopped after some pairs of the second interval: what the next pairs start from is still there."""
    method = Method(flow="raft", pairs="log")
    whole, again = (tmp_path / name for name in ("whole", "again"))
    for folder in (whole, again):
        shutil.copytree(small_sequence / "color", folder / "color")
    encoded, encode = [], RaftFlow.encode
    monkeypatch.setattr(RaftFlow, "encode", lambda self, image: encoded.append(1) or encode(self, image))
    store = build_store(open_sequence(whole), method, num_workers=2, models=random_raft)
    assert len(encoded) == 8 and store.meta["method"]["flow_warm_start"] is True
    assert {abs(i - j) for i, j in store.pairs.tolist()} == {1, 2, 4}

    class StopError(Exception):
        pass

    calls, flow = [], RaftFlow.flow

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 26:
            raise StopError
        return flow(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(RaftFlow, "flow", failing)
        build_store(open_sequence(again), method, models=random_raft)
    build_store(open_sequence(again), method, resume=True, models=random_raft)
    assert len(encoded) == 16
    for path in (whole / "correspondences").iterdir():
        assert path.read_bytes() == (again / "correspondences" / path.name).read_bytes(), path.name


def test_other_weights_are_another_method(small_sequence, random_raft, tmp_path):
    folder = tmp_path / "seq"
    shutil.copytree(small_sequence / "color", folder / "color")
    method = Method(flow="raft", pairs="window:1")
    build_store(open_sequence(folder), method, models=random_raft)
    torch.save(RAFT("small").state_dict(), random_raft.weights_dir / "raft-small.pth")
    with pytest.raises(UserError, match="flow_weights"):
        build_store(open_sequence(folder), method, models=random_raft)
    assert len(open_correspondences(open_sequence(folder)).pairs) == 14
