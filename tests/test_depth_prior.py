"""Depth priors in training: the loss, and initialization near them."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from inference.dense import colors_and_depths
from inference.tracker import Tracker
from losses.losses import depth_prior_loss
from tests.test_training import options
from training.trainer import Trainer


def rendered(trainer, t=4):
    return colors_and_depths(Tracker(trainer.model), t, 1)[1]


def test_the_loss_ignores_scale_and_shift_of_each_frame():
    depth = torch.rand(3, 50, dtype=torch.float64)
    prior = depth * torch.tensor([[0.5], [2.0], [30.0]]) + torch.tensor([[1.0], [-3.0], [0.1]])
    assert depth_prior_loss(depth, prior) < 1e-9
    assert depth_prior_loss(depth, -prior) > 1 and depth_prior_loss(depth, prior.flip(1)) > 0.5
    flat = torch.full((1, 50), 1.3, requires_grad=True)
    depth_prior_loss(flat, torch.rand(1, 50)).backward()
    assert flat.grad.isfinite().all() and flat.grad.abs().sum() < 300


@pytest.mark.parametrize("more", [[], ["--deform", "grid", "--field", "grid"]], ids=["mlp", "grid"])
def test_init_depth_starts_surfaces_near_the_prior(more, sequence_with_depth, tmp_path):
    folder, prior = sequence_with_depth
    plain = Trainer(options(folder, tmp_path / "a", *more))
    start = Trainer(options(folder, tmp_path / "b", "--init_depth", *more))
    agreement = [np.corrcoef(rendered(t).ravel(), prior.ravel())[0, 1] for t in (plain, start)]
    assert agreement[1] > 0.9 > agreement[0] + 0.2
    assert np.abs(rendered(start) - (prior - 1) / 3 * 2).mean() < 0.35  # the prior's own values, not their order only


def test_w_depth_pulls_rendered_depth_to_the_prior(sequence_with_depth, tmp_path):
    folder, prior = sequence_with_depth
    agreement = []
    for weight in (0, 20):
        trainer = Trainer(options(folder, tmp_path / str(weight), "--w_depth", str(weight)))
        for _ in range(30):
            terms, _ = trainer.train_step()
        assert ("depth_prior" in terms) == bool(weight)
        agreement.append(np.corrcoef(rendered(trainer).ravel(), prior.ravel())[0, 1])
    assert agreement[1] > agreement[0] + 0.3


def test_training_without_the_prior_it_asks_for_is_refused(small_sequence, tmp_path):
    with pytest.raises(UserError, match="no depth priors"):
        Trainer(options(small_sequence, tmp_path, "--w_depth", "1"))
