"""Steps that are not finite are skipped and reported; after many in a row the run stops. Degenerate videos train."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from loaders.checkpoint import checkpoints, read_checkpoint
from loaders.sequence import open_sequence
from preprocessing.pipeline import Method, build_store
from tests.test_crash_safety import same, same_state
from tests.test_training import options
from training.checkpointing import checkpoint_of
from training.nonfinite import MAX_SKIPPED
from training.optimizers import step_where
from training.trainer import Trainer


def parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def with_a_broken_frame(trainer, frame=3):
    """Set the colors of one frame to NaN: every pair that starts in it has a loss that is not finite."""
    frames = trainer.sampler.frames.float()
    frames[frame] = torch.nan
    trainer.sampler.frames = frames
    return trainer


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_faulty_step_changes_nothing_and_is_reported(optimizer, small_sequence, tmp_path, caplog):
    trainer = Trainer(options(small_sequence, tmp_path, "--optimizer", optimizer))
    for _ in range(3):
        trainer.train_step()
    with_a_broken_frame(trainer)
    with caplog.at_level(logging.WARNING, "train"):
        while not caplog.messages:
            trainer.save()
            trainer.train_step()
    saved, now = read_checkpoint(checkpoints(trainer.dir)[0]), checkpoint_of(trainer)
    assert same(saved.model, now.model) and same(saved.error_map, now.error_map)
    assert same(saved.optimizers["adam"]["state"], now.optimizers["adam"]["state"])
    assert now.step == saved.step + 1
    (line,) = caplog.messages
    assert line.startswith(f"step {saved.step} skipped: the loss term rgb, rgb_gradient is not finite")
    pairs = line.split("frame pair ")[1].split(", ")
    assert pairs and all(pair.startswith("3-") for pair in pairs)


def test_the_pair_whose_prediction_is_not_finite_is_named(small_sequence, tmp_path, caplog):
    trainer = Trainer(options(small_sequence, tmp_path, "--time_latent", "table", "--freeze_step", "0"))
    with torch.no_grad():
        trainer.model.time_latent.network.table[5] = torch.nan
    with caplog.at_level(logging.WARNING, "train"):
        while not caplog.messages:
            trainer.train_step()
    pairs = caplog.messages[0].split("frame pair ")[1].split(", ")
    assert "loss term flow" in caplog.messages[0] and pairs and all("5" in pair.split("-") for pair in pairs)


def test_finite_steps_between_skipped_ones_train_the_model(small_sequence, tmp_path):
    """Half of the pairs start in a broken frame: the others train, and the run does not stop."""
    trainer = with_a_broken_frame(Trainer(options(small_sequence, tmp_path)))
    start = parameters(trainer)
    for _ in range(MAX_SKIPPED + 5):
        trainer.train_step()
    changed = parameters(trainer)
    assert torch.isfinite(changed).all() and not torch.equal(changed, start)


def test_many_skipped_steps_in_a_row_stop_the_run_with_the_last_good_state_saved(small_sequence, tmp_path):
    trainer = Trainer(options(small_sequence, tmp_path, "--time_latent", "table", "--freeze_step", "0"))
    trainer.train_step()
    good = parameters(trainer)
    trainer.sampler.frames = torch.full_like(trainer.sampler.frames.float(), torch.nan)
    with pytest.raises(UserError, match=rf"{MAX_SKIPPED} steps in a row were not finite.*loss term rgb.*are saved in"):
        for _ in range(MAX_SKIPPED):
            trainer.train_step()
    again = Trainer(options(small_sequence, tmp_path, "--time_latent", "table", "--freeze_step", "0"))
    assert again.step == MAX_SKIPPED + 1 and torch.equal(parameters(again), good)
    again.train_step()  # sound frames: the run goes on
    assert not torch.equal(parameters(again), good)


def test_a_run_with_skipped_steps_is_resumed_bit_for_bit(small_sequence, tmp_path, caplog):
    whole = with_a_broken_frame(Trainer(options(small_sequence, tmp_path / "whole")))
    for stop in (7, 19):
        part = with_a_broken_frame(Trainer(options(small_sequence, tmp_path / "parts")))
        while part.step < stop:
            part.train_step()
        part.save()
    with caplog.at_level(logging.WARNING, "train"):
        while whole.step < 19:
            whole.train_step()
    assert any("skipped" in message for message in caplog.messages)
    whole.save()
    a, b = (read_checkpoint(checkpoints(trainer.dir)[0]) for trainer in (whole, part))
    assert same_state(a, b)


def test_the_count_of_skipped_steps_goes_on_in_a_resumed_run(small_sequence, tmp_path):
    first = Trainer(options(small_sequence, tmp_path))
    first.sampler.frames = torch.full_like(first.sampler.frames.float(), torch.nan)
    for _ in range(MAX_SKIPPED - 1):
        first.train_step()
    first.save()
    second = Trainer(options(small_sequence, tmp_path))
    second.sampler.frames = torch.full_like(second.sampler.frames.float(), torch.nan)
    with pytest.raises(UserError, match="in a row were not finite"):
        second.train_step()


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_a_masked_step_equals_the_plain_step_or_changes_nothing(kind):
    def make():
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(6, 8))
        return p, (torch.optim.Adam([p], fused=True) if kind == "adam" else torch.optim.Muon([p], lr=0.1))

    (a, plain), (b, masked) = make(), make()
    for k in range(6):
        gradient = torch.randn(6, 8)
        if k % 2:  # a faulty step in between
            b.grad = torch.full((6, 8), torch.nan if k > 3 else torch.inf)
            step_where(torch.tensor(False), masked)
            continue
        a.grad, b.grad = gradient.clone(), gradient.clone()
        plain.step()
        step_where(torch.tensor(True), masked)
    assert torch.equal(a, b) and same(plain.state_dict()["state"], masked.state_dict()["state"])


def test_clipping_above_every_norm_changes_no_bit(small_sequence, tmp_path):
    runs = [Trainer(options(small_sequence, tmp_path / clip, "--grad_clip", clip)) for clip in ("1e6", "0")]
    for trainer in runs:
        for _ in range(15):
            trainer.train_step()
    assert torch.equal(parameters(runs[0]), parameters(runs[1]))


def scene(kind, rng):
    """Frames `(T, 48, 64, 3)` uint8 of a degenerate video."""
    textures = rng.integers(0, 256, (8, 12, 16, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    if kind == "static":
        return np.stack([textures[0]] * 4)
    if kind == "two frames":
        return np.stack([textures[0], np.roll(textures[0], 2, axis=1)])
    if kind == "a cut":  # no valid correspondence between its two halves
        return np.stack([textures[0], np.roll(textures[0], 2, axis=1), textures[1], np.roll(textures[1], 2, axis=1)])
    return np.stack([np.roll(np.tile(textures[0], (1, 4, 1)), -80 * t, axis=1)[:, :64] for t in range(4)])


def test_a_black_video_is_refused(tmp_path):
    """No frame shows anything that could be tracked."""
    color = tmp_path / "seq" / "color"
    color.mkdir(parents=True)
    for t in range(4):
        Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(color / f"{t:05d}.png")
    build_store(open_sequence(tmp_path / "seq"), Method())
    trainer = Trainer(options(tmp_path / "seq", tmp_path, "--num_iters", "10"))
    with pytest.raises(UserError, match="no frame has a valid correspondence"):
        trainer.train_step()


@pytest.mark.parametrize("kind", ["static", "two frames", "a cut", "faster than the frame"])
def test_degenerate_videos_train(kind, tmp_path, caplog):
    color = tmp_path / "seq" / "color"
    color.mkdir(parents=True)
    for t, frame in enumerate(scene(kind, np.random.default_rng(0))):
        Image.fromarray(frame).save(color / f"{t:05d}.png")
    build_store(open_sequence(tmp_path / "seq"), Method())
    caplog.clear()  # it names duplicates and cuts
    trainer = Trainer(options(tmp_path / "seq", tmp_path, "--num_iters", "10", "--w_smoothness", "1"))
    start = parameters(trainer)
    with caplog.at_level(logging.WARNING, "train"):
        while trainer.step < 10:
            trainer.train_step()
    assert not caplog.messages and trainer.error_map.ready
    assert torch.isfinite(parameters(trainer)[: len(start)]).all()
    trainer.save()
    assert Trainer(options(tmp_path / "seq", tmp_path, "--num_iters", "10", "--w_smoothness", "1")).step == 10
