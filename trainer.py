"""The state of a run and the step that changes it; train.py is the recipe around it."""

import logging
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from configs.options import run_dir
from errors import UserError
from loaders.checkpoint import (
    check_frames,
    check_length,
    checkpoint_path,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from loaders.depth import depth_at, load_depth
from loaders.error_map import ErrorMap
from loaders.sampler import PairSampler, fits_on
from loaders.sequence import open_sequence
from loaders.store import open_correspondences
from losses import schedules
from losses.objective import depth_prior_loss, objective, smoothness_loss
from models.build import (
    checkpoint_num_frames,
    model_from_checkpoint,
    new_model,
    new_optimisers,
    pick_device,
)
from models.depth_init import start_near
from models.tracker import Tracker

log = logging.getLogger("train")
CHECK_EVERY = 50  # steps between looks at the loss where a look makes a GPU wait
MAP_REFRESH = 1_000  # published steps between looks of the sampler at the accumulated error map


class Trainer:
    """One video's model, optimiser, sampler and error map. `step` counts the steps taken."""

    def __init__(self, options: Namespace):
        self.options, self.device, self.dir = options, pick_device(options.device), run_dir(options)
        self.sequence = open_sequence(options.data_dir, options.num_imgs)
        self.hashes = self.sequence.hashes()
        T, size = len(self.sequence), self.sequence.size
        torch.manual_seed(options.seed)
        self.generators = {"sampler": torch.Generator().manual_seed(options.seed),  # pairs and pixels
                           "jitter": torch.Generator(self.device).manual_seed(options.seed + 1)}  # depths on the rays
        self.model = new_model(options, T, size, self.device)
        self.error_map = ErrorMap(T, size, options.error_map_cell, options.error_map, options.error_map_uniform,
                                  self.device)
        frames, store = self.sequence.frames(), open_correspondences(self.sequence)
        self.sampler = PairSampler(
            frames, store, options.num_pairs, options.num_pts, self.generators["sampler"], options.neighbour_weight,
            bool(options.use_count_map), options.error_map_random, self.device,
            fits_on(self.device, options.resident, store, frames))
        self.step, self.loss_sum = 0, torch.zeros((), device=self.device)
        self._new_optimisers()
        self._start_from_checkpoint()
        self.model.recompute_above = options.recompute_above if self.device.type == "cpu" else sys.maxsize
        if options.w_depth or options.init_depth:
            self.depth_priors = torch.from_numpy(load_depth(self.sequence))  # (T, H, W) in [0, 2]
        if options.init_depth and self.step == 0 and not options.ckpt_path:
            prior = options.min_depth + self.depth_priors[T // 2].float() / 2 * (options.max_depth - options.min_depth)
            start_near(self.model, prior, T // 2, torch.Generator().manual_seed(options.seed + 2))

    def train_step(self) -> tuple[dict[str, Tensor], Tensor]:
        """One optimisation step; returns the loss terms (0-d) and the mean flow error in pixels (0-d)."""
        o, s = self.options, schedules.published_step(self.step, self.options.num_iters)
        self._scheduled_events(s)
        farthest = schedules.max_interval(s, o.start_interval, len(self.sequence))
        batch = self.sampler.batch(farthest, lambda d: schedules.pair_weight(d, farthest))

        near_share = 0.2 if o.mask_near and s < 4_000 else 0.0
        prediction = self.model.predict_pairs(
            batch.pixels1, batch.ids1, batch.ids2, self.generators["jitter"], near_share)
        weights = schedules.loss_weights(s, o.distortion_start)
        total, terms = objective(
            prediction, batch, weights, self.sequence.size, (o.min_depth, o.max_depth), o.max_padding)
        if o.w_smoothness:
            terms["smoothness"] = self._smoothness(prediction.local, batch.ids1)
            total = total + o.w_smoothness * terms["smoothness"]
        if o.w_depth:
            prior = depth_at(self.depth_priors, batch.ids1.cpu(), batch.pixels1.cpu()).to(self.device)
            terms["depth_prior"] = depth_prior_loss((prediction.weights * prediction.depths).sum(-1), prior)
            total = total + o.w_depth * terms["depth_prior"]
        self._descend(total, schedules.learning_rate_factor(
            s, o.lrate_decay_steps, o.lrate_decay_factor, o.lrate_warmup_steps))
        self.step += 1

        error = (prediction.pixels.detach() - batch.pixels2).norm(dim=-1)  # (B, N)
        self.error_map.add_points(batch.ids1, batch.pixels1, error, batch.weights)
        terms = {"total": total.detach(), **{name: value.detach() for name, value in terms.items()}}
        return terms, (error * batch.weights).sum() / batch.weights.sum().clamp(min=1e-8)

    def _scheduled_events(self, s: float) -> None:
        """What happens between two steps at published step `s`: freezing, evaluation, a look at the error map."""
        o = self.options
        if o.freeze_step and s >= o.freeze_step and self.model.time_latent.frozen is None:
            self._freeze()
        if o.error_map == "off" or self.step == 0:
            return
        if self.step % max(schedules.own_step(o.i_cache, o.num_iters), 1) == 0:
            self._evaluate_error_map()
        elif self.error_map.ready and o.error_map == "accumulated" and (
                self.step % max(schedules.own_step(MAP_REFRESH, o.num_iters), 1) == 0):
            self.sampler.use_error_map(self.error_map)

    def _check_finite(self) -> None:
        """UserError if a loss since the last check was not finite. Looking makes the CPU wait for a GPU."""
        if not torch.isfinite(self.loss_sum):
            raise UserError(f"the loss is not finite at step {self.step}: lower the learning rates or set --grad_clip, "
                            f"and start again from the last checkpoint in {self.dir}")
        self.loss_sum = torch.zeros((), device=self.device)

    def _descend(self, total: Tensor, factor: float) -> None:
        self.loss_sum = self.loss_sum + total.detach()
        if self.device.type == "cpu" or self.step % CHECK_EVERY == 0:
            self._check_finite()
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        total.backward()
        if self.options.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.grad_clip)
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = self.base_lr[group["name"]] * factor
            optimiser.step()

    def _smoothness(self, local: Tensor, ids: Tensor) -> Tensor:
        """OmniMotion's smoothness loss on a quarter of the points of the frames that have two neighbours."""
        inner = (ids >= 1) & (ids < len(self.sequence) - 1)
        if not inner.any():
            return local.new_zeros(())
        return smoothness_loss(*self.model.scene_flow(local[inner][:, : self.options.num_pts // 4], ids[inner]))

    def _new_optimisers(self) -> None:
        self.optimisers = new_optimisers(self.model, self.options)
        self.base_lr = {name: group["lr"] for name, group in self.parameter_groups().items()}

    def parameter_groups(self) -> dict[str, dict]:
        """The optimisers' groups by name; their "lr" is the current one."""
        return {group["name"]: group for optimiser in self.optimisers.values() for group in optimiser.param_groups}

    @property
    def samples_per_step(self) -> int:
        """Ray samples of a step."""
        return self.options.num_pairs * self.options.num_pts * self.options.num_samples_ray

    def _freeze(self) -> None:
        """Fix the time latents; the optimisers keep their moments of everything else."""
        before = self.optimisers
        self.model.time_latent.freeze()
        self._new_optimisers()
        for name, optimiser in self.optimisers.items():
            moments = before[name].state
            for group in optimiser.param_groups:
                optimiser.state.update({p: moments[p] for p in group["params"] if p in moments})
        log.info("step %d: time latents frozen", self.step)

    @torch.no_grad()
    def _evaluate_error_map(self) -> None:
        """Flow errors of every frame at one random pixel a cell against one partner frame, into the error map."""
        tracker = Tracker(self.model, use_max_loc=False, chunk_size=self.options.chunk_size)

        def errors(i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            j, p1, p2, weights = self.sampler.pixel_a_cell(i, self.error_map)
            found = torch.from_numpy(tracker.correspond(p1.numpy(), i, j))
            return torch.tensor([i]), p1[None], (found - p2).norm(dim=-1)[None], weights[None]

        self.error_map.add_evaluation(map(errors, range(len(self.sequence))))
        self.sampler.use_error_map(self.error_map)

    def save(self) -> None:
        """Write a checkpoint with everything that the next step depends on."""
        self._check_finite()
        save_checkpoint(checkpoint_path(self.dir, self.step), {
            "format": 1, "step": self.step, "config": asdict(self.model.config), "model": self.model.state_dict(),
            "optimizers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "error_map": self.error_map.state_dict(),
            "sampler": self.sampler.state_dict(),
            "generators": {name: generator.get_state() for name, generator in self.generators.items()},
            "frames": {"size": self.sequence.size, "hashes": self.hashes},
            "options": {k: v for k, v in vars(self.options).items() if isinstance(v, str | int | float)}})

    def _check_config(self, config: dict, path: Path) -> None:
        """UserError if the options describe another model or error map than the checkpoint's."""
        now = asdict(self.model.config)
        for name in now:
            if list(now[name]) != list(config[name]) if name == "coordinates" else now[name] != config[name]:
                raise UserError(f"{path} was trained with {name} {config[name]}, now it is {now[name]}: give the same, "
                                "another --expname, or --no_reload to start again")

    def _start_from_checkpoint(self) -> None:
        """Go on from the run's newest checkpoint, or from the model of `ckpt_path`; UserError if it does not fit."""
        newest = None if self.options.no_reload else newest_checkpoint(self.dir)
        path = newest or self.options.ckpt_path
        if not path:
            return
        if newest and self.options.ckpt_path:
            log.warning("--ckpt_path is not used: %s is there; --no_reload starts a new run", newest)
        checkpoint = load_checkpoint(Path(path))
        check_length(checkpoint_num_frames(checkpoint, path), len(self.sequence), path)
        if newest is not None:
            check_frames(checkpoint, self.sequence.size, self.hashes, path)
            self._check_config(checkpoint["config"], path)
        self.model = model_from_checkpoint(checkpoint, self.sequence.size, self.options, self.device)
        self._new_optimisers()
        if newest is None:  # somebody's model as a start: a new run of its own
            log.info("starting from the model in %s", path)
            return
        self.step = checkpoint["step"]
        if checkpoint["optimizers"].keys() != self.optimisers.keys():
            raise UserError(f"{path} was made with another --optimiser ({' and '.join(checkpoint['optimizers'])}): "
                            "give the same, or --no_reload to start again")
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(checkpoint["optimizers"][name])
        if checkpoint["error_map"]["sums"].shape != self.error_map.sums.shape:
            raise UserError(f"{path} was made with another --error_map_cell: give the same, or --no_reload")
        self.error_map.load_state_dict(checkpoint["error_map"])
        self.sampler.load_state_dict(checkpoint["sampler"])
        for name, generator in self.generators.items():
            generator.set_state(checkpoint["generators"][name])
        log.info("going on from %s at step %d", path, self.step)
