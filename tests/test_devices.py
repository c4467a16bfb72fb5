"""Nothing mixes devices: training, tracking, drawing and preprocessing with tensors that are marked as on a GPU.

See tests/pretend_cuda.py for what is checked. No GPU is needed; the numbers are computed by the CPU.
"""

import numpy as np
import pytest
import torch

from configs.options import parse
from inference import dense
from inference.load_run import load_run, new_tracker
from tests.pretend_cuda import DeviceError, pretend_cuda
from third_party.raft import RAFT
from third_party.raft_flow import RaftFlow, RaftOptions
from training import init_depth
from training.trainer import Trainer

SMALL = ("--num_iters 20 --num_pairs 2 --num_pts 16 --num_samples_ray 8 --coupling_width 32 --affine_width 16 "
         "--affine_layers 3 --field_width 32 --grid_levels 3 --chunk_size 4096 --no_tensorboard --device cuda "
         "--mlp_backend torch --i_cache 10000").split()  # an error map every 2 steps


@pytest.fixture
def sequence(sequence_with_depth):
    """The folder of the small sequence with a depth prior."""
    return sequence_with_depth[0]


def options(folder, save_dir, preset, *more):
    return parse("train", ["--config", f"configs/{preset}.txt", "--data_dir", str(folder), "--save_dir", str(save_dir),
                           *SMALL, *more])


def train(trainer, steps=(1, 18)):
    """One step before an evaluation for the error map, and one with frozen latents and all losses."""
    for step in steps:
        trainer.step = step
        terms, error = trainer.train_step()
        assert terms["total"].device.type == "cuda" and np.isfinite(float(error))


@pytest.mark.parametrize("preset, resident", [
    ("default", "yes"), ("original", "yes"), ("fast", "yes"), ("default", "no")])
def test_training_with_every_optional_loss(preset, resident, sequence, tmp_path):
    more = ["--w_smoothness", "1", "--w_depth", "1", "--resident", resident]
    with pretend_cuda():
        trainer = Trainer(options(sequence, tmp_path, preset, *more))
        train(trainer)
        assert {p.device.type for p in trainer.model.parameters()} == {"cuda"}
        assert trainer.error_map.ready and trainer.error_map.mean().device.type == "cuda"


@pytest.mark.parametrize("preset, more", [
    ("default", "--init_depth --mask_near --max_padding 3 --optimizer muon --error_map last --time_latent table "
                "--recompute_above 0 --grad_clip 0"),
    ("fast", "--init_depth --field gabor")], ids=["default", "fast"])
def test_training_with_other_options(preset, more, sequence, tmp_path, monkeypatch):
    monkeypatch.setattr(init_depth, "STEPS", 2)
    with pretend_cuda():
        train(Trainer(options(sequence, tmp_path, preset, *more.split())))


@pytest.mark.parametrize("preset", ["default", "fast"])
def test_a_run_is_resumed_tracked_and_drawn(preset, sequence, tmp_path):
    queries = np.array([[0, 20.0, 20.0], [3, 30.0, 40.0]], np.float32)
    run = options(sequence, tmp_path, preset)
    with pretend_cuda():
        trainer = Trainer(run)
        train(trainer, steps=(0, 19))
        trainer.save()
        train(Trainer(run), steps=(20,))
        trained = load_run(run)
        tracker = trained.tracker
        run.follow_flow = 1
        following = new_tracker(tracker.model, trained.sequence, run)
        for tracks in (tracker.track(queries), following.track(queries)):
            assert tracks.tracks.shape == (2, 8, 2)
        tracker.correspond(queries[:, 1:], 0, 3)
        dense.colors_and_depths(tracker, 1, 4)
        dense.coarse_flow(tracker, 0, 3, 4)
        points = dense.canonical_points(tracker, 2, queries[:, 1:])
        dense.render_canonical(tracker, points.min(0) - 1, points.max(0) + 1, (8, 8))


def test_raft_finds_flow(tmp_path):
    torch.save(RAFT("small").state_dict(), tmp_path / "raft.pth")
    image = np.random.default_rng(0).integers(0, 255, (64, 72, 3), np.uint8)
    with pretend_cuda():
        raft = RaftFlow(tmp_path / "raft.pth", RaftOptions(device="cuda", iterations=2))
        a, b = raft.encode(image), raft.encode(image[:, ::-1].copy())
        raft.flow([a, b], [b, a], [None, None])
        raft.flow([a], [b], [raft.flow([b], [a], [None])[0][1]])


# The check itself

def test_a_mix_of_devices_is_found():
    with pretend_cuda():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        for mixed in (lambda: there + here, lambda: torch.stack([here, there]), lambda: there.numpy(),
                      lambda: here[there.long()], lambda: there.index_copy(0, torch.arange(3), there),
                      lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
                      lambda: torch.nn.Linear(3, 3)(there), lambda: torch.einsum("i,i->", here, there)):
            with pytest.raises(DeviceError):
                mixed()


def test_what_a_gpu_allows_is_allowed():
    with pretend_cuda():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        for result in (there + here.sum(), there + here.to(there), there[torch.tensor([0, 2])], there[:2].view(1, 2),
                       there.clone().copy_(here), there.new_zeros(2), torch.zeros_like(here, device="cuda"),
                       torch.nn.Linear(3, 3).to("cuda")(there),
                       torch.rand(2, device="cuda", generator=torch.Generator("cuda"))):
            assert result.device.type == "cuda" and result.is_cuda
        assert there.cpu().numpy().sum() == 3 and here.device.type == "cpu" and not here.is_cuda
        weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
        (weight * there).sum().backward()
        assert weight.grad.device.type == "cuda"


def test_a_trainer_with_a_tensor_on_the_wrong_device_fails(sequence, tmp_path):
    with pretend_cuda():
        trainer = Trainer(options(sequence, tmp_path, "default"))
        trainer.model.field.cpu()
        with pytest.raises(DeviceError):
            trainer.train_step()
