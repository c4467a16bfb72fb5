"""Error map, sampler, checkpoints, and training itself on a small rendered sequence."""


import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.geometry import bilinear_colors
from configs.options import parse
from inference.tracker import Tracker
from loaders.correspondences import open_correspondences
from loaders.error_map import ErrorMap
from loaders.pair_sampler import PairSampler
from loaders.sequence import open_sequence
from losses import schedules
from losses.losses import distortion_loss
from preprocessing.pipeline import Method, build_store
from preprocessing.synthetic.render import write_scene
from training.compilation import compiled_pair_objective
from training.distributed import Processes
from training.optimizers import parameter_groups
from training.trainer import Trainer

QUICK = ("--num_iters 60 --num_pairs 4 --num_pts 48 --num_samples_ray 8 --coupling_width 48 --affine_width 32 "
         "--affine_layers 4 --field_width 32 --start_interval 10 --lr_deform 2e-3 --lr_feature 1e-2 --lr_color 1e-3 "
         "--lrate_warmup_steps 5000 --no_tensorboard --error_map_cell 8").split()
GRIDS = ["--deform", "grid", "--field", "grid", "--grid_levels", "3", "--lr_color", "1e-2"]
WARPS = ["--deform", "warp", "--field", "images", "--grid_levels", "3", "--lr_color", "1e-2"]


def options(folder, save_dir, *more):
    return parse("train", ["--data_dir", str(folder), "--save_dir", str(save_dir), *QUICK, *more])


def flow_error(trainer):
    """Mean flow error in pixels over fixed valid correspondences of all pairs."""
    tracker, errors = Tracker(trainer.model, use_max_loc=False), []
    for i, j in trainer.sampler.store.pairs:
        stored = trainer.sampler.store.stored(i, j)
        rows = np.flatnonzero(stored.cycle)[::37]
        if len(rows) == 0:
            continue
        p = np.stack([stored.pixels[rows] % 64, stored.pixels[rows] // 64], axis=-1).astype(np.float32)
        errors.append(np.linalg.norm(tracker.correspond(p, i, j) - p - stored.flow(rows), axis=-1).mean())
    return np.mean(errors)


# Error map

def add(error_map, frame, pixels, errors, method="add_points"):
    pixels, errors = torch.tensor([pixels], dtype=torch.float32), torch.tensor([errors], dtype=torch.float32)
    part = torch.tensor([frame]), pixels, errors, torch.ones_like(errors)
    if method == "add_evaluation":
        error_map.add_evaluation([part])
    else:
        error_map.add_points(*part)


def test_two_evaluations_add():
    error_map = ErrorMap(3, (16, 24), cell=8)
    for errors in ([1.0, 5.0], [3.0, 7.0]):
        add(error_map, 1, [[2, 3], [20, 12]], errors, "add_evaluation")
    assert error_map.sums[1, 0, 0] == 4 and error_map.counts[1, 0, 0] == 2
    assert error_map.sums[1, 1, 2] == 12 and error_map.mean()[1, 1, 2] == 6
    assert error_map.sums.sum() == 16 and error_map.evaluations == 2


def test_steps_add_to_evaluations_and_mode_last_replaces():
    accumulated, last = ErrorMap(2, (16, 16), 8), ErrorMap(2, (16, 16), 8, mode="last")
    for error_map in (accumulated, last):
        add(error_map, 0, [[1, 1]], [2.0], "add_evaluation")
        add(error_map, 0, [[1, 1]], [4.0])
        add(error_map, 0, [[9, 9]], [6.0], "add_evaluation")
    assert accumulated.sums[0].tolist() == [[6, 0], [0, 6]]
    assert last.sums[0].tolist() == [[0, 0], [0, 6]]


def test_untrusted_points_do_not_count():
    error_map = ErrorMap(1, (8, 8), 8)
    error_map.add_points(torch.tensor([0]), torch.tensor([[[1.0, 1], [2, 2]]]), torch.tensor([[5.0, 100]]),
                         torch.tensor([[1.0, 0]]))
    assert error_map.mean().item() == 5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.01, 0.5))
def test_every_cell_keeps_its_uniform_share(seed, share):
    torch.manual_seed(seed)
    error_map = ErrorMap(4, (40, 56), 8, uniform_share=share)
    error_map.sums = torch.rand(4, 5, 7).pow(8) * 100
    error_map.counts.fill_(3)
    weights = error_map.cell_weights() / 35
    assert torch.allclose(weights.sum((1, 2)), torch.ones(4)) and (weights >= share / 35 - 1e-6).all()
    frames = error_map.frame_weights()
    assert frames.sum().item() == pytest.approx(1, abs=1e-5) and (frames >= share / 4 - 1e-6).all()


# Sampler

def chi_square_is_low(counts, probabilities):
    """Whether counts are plausible draws (6 standard deviations of the chi-square distribution)."""
    expected = probabilities * counts.sum()
    used = expected > 5
    degrees = used.sum() - 1
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
    return statistic < degrees + 6 * np.sqrt(2 * degrees) and counts[expected == 0].sum() == 0


@pytest.fixture
def sampler(small_sequence):
    sequence = open_sequence(small_sequence)
    return PairSampler(sequence.frames(), open_correspondences(sequence), 4, 64, torch.Generator().manual_seed(0))


def test_pairs_are_drawn_by_their_correspondences(sampler):
    counts, farthest = sampler.counts.numpy(), 4
    T = len(counts)
    expected = np.zeros((T, T))
    for i in range(T):
        valid = [counts[i, j] * (0 < abs(i - j) <= farthest) for j in range(T)]
        expected[i] = np.array(valid) / sum(valid)
        for j in (i - 1, i + 1):
            if 0 <= j < T:
                expected[i, j] = 0.5
        expected[i] /= expected[i].sum()
    pairs = sampler.draw_pairs(20_000, farthest).numpy()
    drawn = np.zeros((T, T))
    np.add.at(drawn, (pairs[:, 0], pairs[:, 1]), 1)
    assert chi_square_is_low(drawn, expected / T)


def test_pixels_are_drawn_by_the_count_map_and_then_by_the_error_map(sampler):
    stored = sampler.store.stored(2, 5)
    pixels = torch.from_numpy(stored.pixels)
    sampler.num_pts = 200_000
    probabilities = (sampler.store.count_map(2).ravel()[stored.pixels] + 1.0) ** -0.5
    drawn = np.bincount(sampler.draw_rows(2, pixels, sampler.uniform(1)[0]).numpy(), minlength=len(pixels))
    assert chi_square_is_low(drawn, probabilities / probabilities.sum())

    error_map = ErrorMap(8, (64, 64), 8)
    add(error_map, 2, [[20.0, 30]], [50.0], "add_evaluation")
    add(error_map, 2, [[50.0, 50]], [1.0], "add_evaluation")
    sampler.use_error_map(error_map)
    weights = error_map.cell_weights()[2].numpy()[stored.pixels // 64 // 8, stored.pixels % 64 // 8]
    drawn = np.bincount(sampler.draw_rows(2, pixels, sampler.uniform(1)[0]).numpy(), minlength=len(pixels))
    assert chi_square_is_low(drawn, weights / weights.sum())
    frames = np.bincount(sampler.draw_pairs(20_000, 8)[:, 0].numpy(), minlength=8)
    assert chi_square_is_low(frames, error_map.frame_weights().numpy())


@pytest.mark.parametrize("i, j, by_errors", [(2, 5, False), (2, 5, True), (3, 4, False)])
def test_drawing_by_rejection_has_the_same_distribution(sampler, i, j, by_errors):
    if by_errors:
        error_map = ErrorMap(8, (64, 64), 8)
        add(error_map, 2, [[20.0, 30], [50, 50]], [50.0, 1], "add_evaluation")
        sampler.use_error_map(error_map)
    stored = sampler.store.stored(i, j)
    assert (sampler.store.index(i, j).count > stored.count) == (j > i + 1)  # tentative ones are not drawn
    sampler.num_pts = 100_000
    weights = sampler.pixel_weights(i).double().numpy()[stored.pixels]
    pixels, flow, cycle = sampler.draw_stored(i, j, sampler.candidates(1)[0])
    rows = np.searchsorted(stored.pixels, pixels.numpy())
    assert chi_square_is_low(np.bincount(rows, minlength=len(stored.pixels)), weights / weights.sum())
    assert np.array_equal(flow.numpy(), stored.flow(rows)) and np.array_equal(cycle.numpy(), stored.cycle[rows])


def test_with_too_few_candidates_points_are_drawn_by_the_weights(sampler, monkeypatch):
    from loaders import pair_sampler as module
    monkeypatch.setattr(module, "CANDIDATES", 1)  # not all of them are stored, so they are fewer than the points
    assert sampler.draw_stored(2, 5, sampler.candidates(1)[0]) is None
    assert sampler.batch(7, lambda interval: 1.0).pixels1.shape == (4, 64, 2)


@pytest.mark.parametrize("resident", [False, True])
def test_a_batch_is_what_the_store_says(sampler, resident):
    """By rejection, and by the sum of weights over pairs that stay on the device."""
    sampler.resident = resident
    batch = sampler.batch(7, lambda interval: 1.0 / interval)
    assert batch.pixels1.shape == batch.pixels2.shape == (4, 64, 2) and batch.rgb1.shape == (4, 64, 3)
    for b in range(4):
        i, j = int(batch.ids1[b]), int(batch.ids2[b])
        known, cycle = set(), {}
        for a, c, flip in ((i, j, False), (j, i, True)):
            stored = sampler.store.stored(a, c)
            p = np.stack([stored.pixels % 64, stored.pixels // 64], -1).astype(np.float32)
            q = p + stored.flow(slice(None))
            if flip:  # what is hidden in frame i cannot be a query there
                cycle = dict(zip(map(tuple, np.concatenate([q, p], axis=1).round(3).tolist()), stored.cycle.tolist(),
                                 strict=True))
            known |= set(map(tuple, np.concatenate([q, p] if flip else [p, q], axis=1).round(3).tolist()))
        drawn = torch.cat([batch.pixels1[b], batch.pixels2[b]], dim=-1).numpy().round(3).tolist()
        assert set(map(tuple, drawn)) <= known
        for point, weight in zip(map(tuple, drawn), batch.weights[b].tolist(), strict=True):
            assert weight == pytest.approx(1 / abs(i - j)) or (weight == 0 and not cycle[point])
        inside = (batch.pixels1[b] == batch.pixels1[b].round()).all(-1)  # at pixels the color is the frame's
        x, y = batch.pixels1[b][inside].long().unbind(-1)
        ok = (x >= 0) & (x < 64) & (y >= 0) & (y < 64)
        assert torch.allclose(batch.rgb1[b][inside][ok], sampler.frames[i, y[ok], x[ok]] / 255, atol=1e-6)
    assert torch.equal(batch.rgb1, bilinear_colors(sampler.frames, batch.ids1, batch.pixels1))


def test_colors_between_pixels():
    frames = torch.arange(48, dtype=torch.uint8).view(2, 2, 4, 3)
    p = torch.tensor([[0.0, 0.0], [3.0, 1.0], [0.5, 0.5], [-9.0, 40.0]])
    at = bilinear_colors(frames, torch.tensor([1, 0]), torch.stack([p, p])) * 255
    assert torch.allclose(at[1, :, 0], torch.tensor([0.0, 21.0, 7.5, 12.0])) and torch.allclose(at[0], at[1] + 24)


# Schedules and losses

def test_schedules_are_shares_of_the_run():
    for num_iters in (100, 100_000, 250_000):
        at = [schedules.reference_step(step * num_iters // 10, num_iters) for step in range(11)]
        assert at == pytest.approx([10_000 * k for k in range(11)])
        assert schedules.own_step(40_000, num_iters) == 0.4 * num_iters
    assert schedules.loss_weights(2_500)["rgb"] == 0.5 and schedules.loss_weights(10**6)["rgb"] == 10
    assert "distortion" not in schedules.loss_weights(40_000) and schedules.loss_weights(44_000)["distortion"] == 2
    assert schedules.loss_weights(5_000)["flow_gradient"] == pytest.approx(0.01)
    assert schedules.max_interval(0, 20, 60) == 20 and schedules.max_interval(10_000, 20, 60) == 25
    assert schedules.max_interval(99_000, 20, 30) == 29
    assert schedules.pair_weight(1, 20) == 1 and schedules.pair_weight(21, 20) == pytest.approx(0, abs=1e-12)
    assert schedules.learning_rate_factor(45_000, 20_000, 0.5) == 0.25


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), K=st.integers(2, 12))
def test_distortion_equals_the_double_sum(seed, K):
    torch.manual_seed(seed)
    z, w = torch.rand(5, K).double().sort(dim=-1).values, torch.rand(5, K).double()
    end = torch.cat([z[:, 1:], z[:, -1:]], dim=-1)
    m = (z + end) / 2
    slow = sum(w[:, i] * w[:, j] * (m[:, i] - m[:, j]).abs() for i in range(K) for j in range(K))
    slow = slow + (w**2 * (end - z)).sum(-1) / 3
    assert torch.allclose(distortion_loss(z, w), slow.mean())


# Training

def test_sixty_steps_halve_the_flow_error(small_sequence, tmp_path):
    trainer = Trainer(options(small_sequence, tmp_path))
    before = flow_error(trainer)
    while trainer.step < 60:
        trainer.train_step()
    assert flow_error(trainer) < before / 2
    assert trainer.model.time_latent.frozen is not None and "feature" not in parameter_groups(trainer.optimizers)


def test_thirty_steps_of_grids_halve_the_flow_error(small_sequence, tmp_path):
    more = [*GRIDS, "--num_iters", "30"]
    trainer = Trainer(options(small_sequence, tmp_path, *more))
    before = flow_error(trainer)
    while trainer.step < 30:
        trainer.train_step()
    assert flow_error(trainer) < before / 2
    trainer.save()
    again = Trainer(options(small_sequence, tmp_path, *more))
    assert flow_error(again) == flow_error(trainer)
    with pytest.raises(UserError, match="trained with deform grid, now it is mlp"):
        Trainer(options(small_sequence, tmp_path, *more, "--deform", "mlp"))


@pytest.mark.parametrize("more", [
    [], ["--optimizer", "muon", "--mask_near"], [*GRIDS, "--deform_start", "20000"],
    [*WARPS, "--init_layers", "--grid_layers", "1"], [*WARPS, "--init_layers", "--grid_layers", "4"],
    ["--error_map", "last", "--error_map_cell", "4", "--error_map_random", "0.5", "--grad_clip", "1"]])
def test_a_resumed_run_equals_an_uninterrupted_one(more, small_sequence, tmp_path):
    """Stopped before and after the first error map (step 6), the freezing (step 12), and the start of the maps; both
    track points alike."""
    more = [*more, "--num_iters", "30"]
    whole = Trainer(options(small_sequence, tmp_path / "whole", *more))
    for _ in range(20):
        whole.train_step()
    for stop in (3, 10, 17):
        first = Trainer(options(small_sequence, tmp_path / "parts", *more))
        while first.step < stop:
            first.train_step()
        first.save()
        del first
    last = Trainer(options(small_sequence, tmp_path / "parts", *more))
    assert last.step == 17
    while last.step < 20:
        last.train_step()
    assert whole.error_map.evaluations >= 2
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, last.model.state_dict()[name]), name
    assert torch.equal(whole.error_map.sums, last.error_map.sums)
    queries = np.array([[0, 20.5, 30], [7, 40, 8]])
    tracks = [Tracker(trainer.model).track(queries).tracks for trainer in (whole, last)]
    assert np.array_equal(*tracks) and np.allclose(tracks[0][[0, 1], [0, 7]], queries[:, :0:-1], atol=1e-3)


@pytest.mark.parametrize("more", [[], GRIDS, ["--optimizer", "muon"]])
def test_maps_start_to_learn_at_deform_start(more, small_sequence, tmp_path):
    """At published step 5,000 of 100,000, the third of 60 steps; until then the field learns alone."""
    trainer = Trainer(options(small_sequence, tmp_path, *more, "--deform_start", "5000", "--lrate_warmup_steps", "0"))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def changed():
        return {name.split(".")[0] for name, value in trainer.model.state_dict().items()
                if not torch.equal(value, before[name])}

    for _ in range(3):
        trainer.train_step()
    assert changed() == {"field"}
    trainer.train_step()
    assert changed() == {"field", "deform", "time_latent"} - ({"time_latent"} if more == GRIDS else set())


def test_a_compiled_step_is_the_step(small_sequence, tmp_path):
    """One graph without a break. Of grids with a Gabor field: the MLPs' graph takes a minute to trace."""
    parameters = []
    for name, backend in (("eager", ""), ("compiled", "aot_eager")):
        chosen = options(small_sequence, tmp_path / name, "--deform", "grid", "--grid_levels", "1",
                         "--field_layers", "1", "--distortion_start", "-1", "--precision", "fp32")
        chosen.compile = backend  # no user option: traces as inductor does, in less time
        trainer = Trainer(chosen)
        for _ in range(3):
            terms, _ = trainer.train_step()
        assert "distortion" in terms
        parameters.append(trainer.model.state_dict())
    for name, value in parameters[0].items():
        assert torch.allclose(value, parameters[1][name], rtol=1e-4, atol=1e-6), name


def test_what_is_not_compiled(small_sequence, tmp_path):
    with pytest.raises(UserError, match="--compile works with one process, this run has 2"):
        compiled_pair_objective("aot_eager", "mlp", torch.device("cpu"), Processes(0, 2))
    with pytest.raises(UserError, match="--compile does not work with --deform warp"):
        Trainer(options(small_sequence, tmp_path, "--config", "configs/fast.txt", "--compile", "inductor"))


def test_a_seed_is_a_run(small_sequence, tmp_path):
    def weights(seed, folder):
        trainer = Trainer(options(small_sequence, tmp_path / folder, "--seed", str(seed)))
        for _ in range(4):
            trainer.train_step()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    a, b, c = weights(1, "a"), weights(1, "b"), weights(2, "c")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_finished_checkpoint_holds_plain_data_only(small_sequence, tmp_path):
    trainer = Trainer(options(small_sequence, tmp_path))
    trainer.train_step()
    trainer.save()
    (path,) = trainer.dir.glob("model_*.pth")
    state = torch.load(path, weights_only=True)
    assert {"step", "config", "model", "optimizers", "error_map", "sampler", "generators"} <= state.keys()


def test_the_published_layout_gives_the_same_run(small_sequence, published_sequence, tmp_path):
    losses = []
    for folder, save in ((small_sequence, "a"), (published_sequence, "b")):
        trainer = Trainer(options(folder, tmp_path / save))
        losses.append([trainer.train_step()[0]["total"].item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("preset", ["configs/default.txt", "configs/original.txt", "configs/small.txt",
                                    "configs/fast.txt", "configs/demo.txt"])
def test_presets_train(preset, small_sequence, tmp_path):
    trainer = Trainer(parse("train", ["--config", preset, "--data_dir", str(small_sequence), "--save_dir",
                                      str(tmp_path), "--num_pairs", "2", "--num_pts", "16", "--num_samples_ray", "8"]))
    terms, error = trainer.train_step()
    assert torch.isfinite(terms["total"]) and error > 0
    assert ("smoothness" in terms) == (preset == "configs/original.txt")


def test_a_checkpoint_of_another_length_is_refused(small_sequence, tmp_path):
    trainer = Trainer(options(small_sequence, tmp_path))
    trainer.save()
    with pytest.raises(UserError, match="trained on 8 frames, the sequence has 5"):
        Trainer(options(small_sequence, tmp_path, "--num_imgs", "5"))


@pytest.mark.parametrize("more,words", [
    (["--num_samples_ray", "9"], "num_samples_ray 8, now it is 9"), (["--error_map_cell", "4"], "error_map_cell"),
    (["--optimizer", "muon"], "optimizer")])
def test_other_settings_on_resume_are_refused(more, words, small_sequence, tmp_path):
    Trainer(options(small_sequence, tmp_path)).save()
    with pytest.raises(UserError, match=words):
        Trainer(options(small_sequence, tmp_path, *more))


def test_a_checkpoint_of_other_frames_is_refused(small_sequence, tmp_path):
    write_scene(tmp_path / "small", "easy", (64, 64), 8, seed=1, num_points=8)
    Trainer(options(small_sequence, tmp_path)).save()
    build_store(open_sequence(tmp_path / "small"), Method())
    with pytest.raises(UserError, match="other frames"):
        Trainer(options(tmp_path / "small", tmp_path))


def test_a_published_checkpoint_can_be_the_start(shared, tmp_path):
    write_scene(tmp_path / "six", "easy", (60, 108), 6, seed=1, num_points=8)
    build_store(open_sequence(tmp_path / "six"), Method())
    published = str(shared("reference/omnimotion_000030.pth"))
    trainer = Trainer(options(tmp_path / "six", tmp_path, "--ckpt_path", published))
    assert trainer.step == 0 and torch.isfinite(trainer.train_step()[0]["total"])


def test_frames_without_correspondences_cannot_train(sampler):
    sampler.counts.zero_()
    with pytest.raises(UserError, match="no frame has a valid correspondence"):
        sampler.draw_pairs(4, 7)
