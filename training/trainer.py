"""The state of a run (model, optimizers, sampler, error map) and the training step; train.py calls it in a loop."""

import logging
import sys
import time
from argparse import Namespace

import torch
from torch import Tensor

from common.errors import UserError
from configs.options import run_dir
from loaders.correspondences import open_correspondences
from loaders.depth import depth_at, load_depth
from loaders.error_map import ErrorMap
from loaders.pair_sampler import Batch, PairSampler, fits_on
from loaders.sequence import open_sequence
from losses import schedules
from losses.objective import objective
from models.factory import check_model_options, model_from_checkpoint, new_model, pick_device
from training import checkpointing
from training.compilation import compiled_pair_objective
from training.distributed import Processes
from training.hard_mining import HardMining
from training.initialization import decide_motion_layers, initialize
from training.nonfinite import MAX_SKIPPED, NonfiniteGuard
from training.optimizers import copy_moments, new_optimizers, parameter_groups, step_where

log = logging.getLogger("train")
CHECK_EVERY = 50    # on a GPU: steps between the points at which the CPU waits for results
NEAR_SHARE = 0.2    # --mask_near: share of the samples of a ray whose alpha is set to 0
NEAR_STEPS = 4_000  # --mask_near: number of reference steps, from the first on


class Trainer:
    """One video's model, optimizers, sampler and error map. `step` counts the steps taken.

    Several processes share each step (training/distributed.py)."""

    def __init__(self, options: Namespace, processes: Processes | None = None):
        """A new run, or one that is resumed from the newest checkpoint of its folder. UserError for options, files or
        checkpoints that do not fit each other."""
        self.options = options
        self.device = pick_device(options.device)
        self.dir = run_dir(options)
        self.processes = processes or Processes()
        self.pair_slice = self.processes.slice_of(options.num_pairs)  # this process's pairs of a batch
        check_model_options(options)
        self.sequence = open_sequence(options.data_dir, options.num_imgs, options.max_pixels)
        self.hashes = self.sequence.hashes
        store = open_correspondences(self.sequence)
        self.pair_terms = None
        if options.compile:
            self.pair_terms = compiled_pair_objective(options.compile, options.deform, self.device, self.processes)
        self._make_generators()
        self._make_sampler(store)
        uses_prior = options.w_depth or options.init_depth
        self.depth_priors = torch.from_numpy(load_depth(self.sequence)) if uses_prior else None  # (T, H, W) in [0, 2]
        self.guard = NonfiniteGuard(self.device, self.processes.first)
        self.step = 0
        self.gradient_norm = torch.zeros((), device=self.device)
        self._make_model(store)
        self.processes.agree(self.step, "the step of their newest checkpoint")
        self.model.recompute_above = options.recompute_above if self.device.type == "cpu" else sys.maxsize
        self.saved_step = self.step  # step of the newest checkpoint of this run, 0 for a new run
        self.saved_at = time.monotonic()  # seconds

    def _make_generators(self) -> None:
        """Seed PyTorch's global generator, which draws the new model's parameters, and make those of the run."""
        seed = self.options.seed
        torch.manual_seed(seed)
        self.generators = {"sampler": torch.Generator().manual_seed(seed),  # pairs and pixels
                           "jitter": torch.Generator(self.device).manual_seed(seed + 1)}  # depths on the rays

    def _make_sampler(self, store) -> None:
        options = self.options
        frames = self.sequence.frames()
        self.error_map = ErrorMap(len(self.sequence), self.sequence.size, options.error_map_cell, options.error_map,
                                  options.error_map_uniform, self.device)
        self.sampler = PairSampler(
            frames, store, options.num_pairs, options.num_pts, self.generators["sampler"], options.neighbor_weight,
            options.use_count_map, options.error_map_random, self.device,
            fits_on(self.device, options.resident, store, frames))
        self.hard_mining = HardMining(self.error_map, self.sampler, options, self.processes)

    def _make_model(self, store) -> None:
        """Decide what model to build (a checkpoint's, or a new one with as many motion layers as the video has), build
        it once, and initialize it or resume its training."""
        options = self.options
        path, checkpoint, resumed = checkpointing.find_start(self)
        if checkpoint is None:
            layers = decide_motion_layers(options, store, self.processes)
            self.model = new_model(options, len(self.sequence), self.sequence.size, self.device, layers.count)
            initialize(self.model, options, store, layers, self.depth_priors, self.processes)
        else:
            self.model = model_from_checkpoint(checkpoint, self.sequence.size, options, self.device)
        self._set_optimizers(new_optimizers(self.model, options))
        if resumed:
            checkpointing.resume(self, checkpoint, path)
            log.info("going on from %s at step %d", path, self.step)
        elif checkpoint is not None:
            log.info("starting from the model in %s", path)

    def _set_optimizers(self, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self.base_lr = {name: group["lr"] for name, group in parameter_groups(optimizers).items()}

    def train_step(self) -> tuple[dict[str, Tensor], Tensor]:
        """One optimization step; the loss terms (0-d) and the mean flow error in pixels (0-d), over all processes.

        UserError if MAX_SKIPPED steps in a row were not finite; a checkpoint is saved before."""
        options = self.options
        s = schedules.reference_step(self.step, options.num_iters)
        if options.freeze_step and s >= options.freeze_step and self.model.time_latent.frozen is None:
            self._freeze_time_latents()
        self.hard_mining.before_step(self.step, self.model)

        largest = schedules.max_interval(s, options.start_interval, len(self.sequence))
        batch = self.sampler.batch(largest, lambda interval: schedules.pair_weight(interval, largest),
                                   self.pair_slice)
        jitter = torch.rand(options.num_pairs, 1, self.model.config.num_samples_ray, device=self.device,
                            generator=self.generators["jitter"])
        weights = schedules.loss_weights(s, options.distortion_start, options.w_smoothness, options.w_depth)
        near_share = NEAR_SHARE if options.mask_near and s < NEAR_STEPS else 0.0
        prediction, total, terms = objective(
            self.model, batch, jitter[self.pair_slice], weights, near_share, options.max_padding, self._prior_at(batch),
            self.processes, self.pair_terms)

        error = (prediction.pixels.detach() - batch.pixels2).norm(dim=-1)  # (B, N)
        terms["error"] = (error * batch.weights).sum()
        terms["weight"] = batch.weights.sum()
        finite = self._descend(total, terms, batch, prediction, s)
        self.error_map.add_points(batch.ids1, batch.pixels1, error, batch.weights * finite)
        self.step += 1
        if self.device.type == "cpu" or self.step % CHECK_EVERY == 0:
            self._stop_if_not_finite()
        error_sum = terms.pop("error")
        weight_sum = terms.pop("weight")
        return terms, error_sum / weight_sum.clamp(min=1e-8)

    def _prior_at(self, batch: Batch) -> Tensor | None:
        """The depth prior at the batch's points `(B, N)`; None if no loss uses it."""
        if not self.options.w_depth:
            return None
        return depth_at(self.depth_priors, batch.ids1.cpu(), batch.pixels1.cpu()).to(self.device)

    def _descend(self, total: Tensor, terms: dict[str, Tensor], batch: Batch, prediction, s: float) -> Tensor:
        """Update the parameters by the gradient of `total`, with the learning rates of reference step `s`, unless it is
        not finite; whether it is finite (0-d bool).

        Changes `terms` in place: they become sums over all processes, with "total" among them."""
        options = self.options
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        terms["total"] = total.detach().clone()  # the next compiled step overwrites its memory
        groups = parameter_groups(self.optimizers).values()
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        self.processes.sum_all([*(p.grad for p in parameters), *terms.values()])
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        # on a GPU, always: the CPU does not wait for the norm
        if options.grad_clip and (norm.device.type != "cpu" or norm > options.grad_clip):
            torch.nn.utils.clip_grads_with_norm_(parameters, options.grad_clip, norm)
        self.gradient_norm = norm
        values = (prediction.pixels, prediction.rgb, prediction.target, batch.pixels1, batch.pixels2, batch.rgb1)
        pair_sums = sum(value.detach().flatten(1).sum(1) for value in values)  # (B,)
        finite = self.guard.check(self.step, terms["total"], terms, norm, torch.stack([batch.ids1, batch.ids2]),
                                  pair_sums)
        self._set_learning_rates(s)
        for optimizer in self.optimizers.values():
            step_where(finite, optimizer)
        return finite

    def _set_learning_rates(self, s: float) -> None:
        options = self.options
        factor = schedules.learning_rate_factor(
            s, options.lrate_decay_steps, options.lrate_decay_factor, options.lrate_warmup_steps)
        for name, group in parameter_groups(self.optimizers).items():
            frozen = name != "color" and s < options.deform_start  # until then only the field is trained
            group["lr"] = 0.0 if frozen else self.base_lr[name] * factor

    def _stop_if_not_finite(self) -> None:
        """Log skipped steps. After MAX_SKIPPED in a row, save the state before them and raise UserError."""
        if self.guard.report() < MAX_SKIPPED:
            return
        self.guard.resume(0)  # the same command tries again
        self.save()
        raise UserError(f"{MAX_SKIPPED} steps in a row were not finite, the last ones like this: {self.guard.latest}. "
                        f"The parameters before them are saved in {self.dir}: look at the frames and correspondences "
                        "of these pairs, or lower the learning rates; the same command goes on from there")

    def _freeze_time_latents(self) -> None:
        """Compute the time latents of all frames once; the optimizers keep their moments of everything else."""
        self.model.time_latent.freeze()
        earlier = self.optimizers
        self._set_optimizers(new_optimizers(self.model, self.options))
        copy_moments(self.optimizers, earlier)
        log.info("step %d: time latents frozen", self.step)

    def any_process(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process. Several processes on GPUs ask each other only every
        CHECK_EVERY steps, and take the flags as not set in between."""
        if self.processes.count > 1 and self.device.type == "cuda" and self.step % CHECK_EVERY:
            return [False] * len(flags)
        return self.processes.any(*flags)

    def checkpoint_overdue(self) -> bool:
        """Whether the newest checkpoint is older than `--save_every_minutes`."""
        limit = self.options.save_every_minutes
        return bool(limit) and time.monotonic() - self.saved_at > 60 * limit

    def save(self) -> None:
        """Write a checkpoint (training/checkpointing.py); called by all processes."""
        checkpointing.save(self)
        self.saved_step = self.step
        self.saved_at = time.monotonic()
