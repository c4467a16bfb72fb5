"""The state of a run and the step that changes it; train.py is the recipe around it."""

import json
import logging
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.files import write_text
from configs.options import run_dir
from inference.tracker import Tracker
from loaders.checkpoint import (
    check_frames,
    check_length,
    checkpoint_path,
    drop_old_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    set_aside,
)
from loaders.correspondences import open_correspondences
from loaders.depth import depth_at, load_depth
from loaders.error_map import ErrorMap
from loaders.pair_sampler import PairSampler, fits_on
from loaders.sequence import open_sequence
from losses import schedules
from losses.losses import depth_prior_loss, smoothness_loss
from models.coords import denormalize_pixels, normalize_pixels
from models.factory import (
    checkpoint_num_frames,
    model_from_checkpoint,
    new_model,
    new_optimizers,
    pick_device,
)
from models.omnimotion import ModelConfig
from training.distributed import Processes
from training.forward import compiled_forward, forward
from training.init_depth import start_near
from training.layer_votes import layer_votes
from training.motion_layers import crossing_motion, layers_of_motion
from training.nonfinite import FORGET, GOOD_EVERY, LIMIT, RETURNS, FaultGuard, fits, step_where

log = logging.getLogger("train")
CHECK_EVERY = 50  # steps between looks at the loss where a look makes a GPU wait
MAP_REFRESH = 1_000  # published steps between looks of the sampler at the accumulated error map
NEAR_SHARE, NEAR_STEPS = 0.2, 4_000  # of --mask_near: share of the samples, published steps


class Trainer:
    """One video's model, optimizer, sampler and error map. `step` counts the steps taken; `processes` share each."""

    def __init__(self, options: Namespace, processes: Processes | None = None):
        self.options, self.device, self.dir = options, pick_device(options.device), run_dir(options)
        self.processes = processes or Processes()
        self.share = self.processes.share(options.num_pairs)
        self.sequence = open_sequence(options.data_dir, options.num_imgs)
        self.hashes = self.sequence.hashes()
        T, size = len(self.sequence), self.sequence.size
        torch.manual_seed(options.seed)
        self.generators = {"sampler": torch.Generator().manual_seed(options.seed),  # pairs and pixels
                           "jitter": torch.Generator(self.device).manual_seed(options.seed + 1)}  # depths on the rays
        frames, store = self.sequence.frames(), open_correspondences(self.sequence)
        self.model = new_model(options, T, size, self.device)
        self.error_map = ErrorMap(T, size, options.error_map_cell, options.error_map, options.error_map_uniform,
                                  self.device)
        self.sampler = PairSampler(
            frames, store, options.num_pairs, options.num_pts, self.generators["sampler"], options.neighbor_weight,
            options.use_count_map, options.error_map_random, self.device,
            fits_on(self.device, options.resident, store, frames))
        self.step, self.gradient_norm = 0, torch.zeros((), device=self.device)
        self.forward = forward
        if options.compile:
            self.forward = compiled_forward(options.compile, self.device, self.processes)
        self.faults = FaultGuard(self.device, self.processes.first)
        self._new_optimizers()
        self._start_from_checkpoint()
        self.processes.agree(self.step, "the step of their newest checkpoint")
        if options.w_depth or options.init_depth:
            self.depth_priors = torch.from_numpy(load_depth(self.sequence))  # (T, H, W) in [0, 2]
        if self.step == 0 and not options.ckpt_path:
            self._start()
        self.model.recompute_above = options.recompute_above if self.device.type == "cpu" else sys.maxsize
        if self.faults.good is None:
            self.faults.keep(self.step, self.model, self.optimizers)

    def _start(self) -> None:
        """What a new model is told of the video before its first step."""
        o, T = self.options, len(self.sequence)
        if o.init_layers:
            self._start_layers()
        if o.init_depth:
            prior = o.min_depth + self.depth_priors[T // 2].float() / 2 * (o.max_depth - o.min_depth)
            start_near(self.model, prior, T // 2, torch.Generator().manual_seed(o.seed + 2))
        if o.init_layers or o.init_depth:  # machines may round differently; all processes start as the first one does
            with torch.no_grad():
                if not self.processes.first:
                    for p in self.model.parameters():
                        p.zero_()
                self.processes.sum_all(list(self.model.parameters()))

    def _start_layers(self) -> None:
        """As many layers of motion as the options or the video say, each with its motion; and what the correspondences
        know of where each of them is empty. UserError if there is no motion for the third."""
        store, (T, size) = self.sampler.store, (len(self.sequence), self.sequence.size)
        crossing = crossing_motion(store) if self.options.grid_layers != 2 else None
        found = 2 if crossing is None else 3
        self.processes.agree(found, "the number of layers of motion that they find")
        if self.options.grid_layers > found:
            raise UserError(f"nothing crosses the picture in {self.sequence.root}: leave out --grid_layers 3")
        if found != self.model.config.grid_layers:
            torch.manual_seed(self.options.seed)  # as if it had been the first
            self.model = new_model(self.options, T, size, self.device, found)
            self._new_optimizers()
        vertices = self.model.deform.vertices()  # (R, R, 2)
        at = denormalize_pixels(vertices, size)
        moved = torch.from_numpy(layers_of_motion(store, at.numpy(), crossing))  # (T, S, R, R, 2)
        self.model.deform.start_at((normalize_pixels(at + moved, size) - vertices).to(self.device))
        if self.options.field == "grid":
            self.model.field.start_at(torch.from_numpy(layer_votes(self.model, store)))

    def train_step(self) -> tuple[dict[str, Tensor], Tensor]:
        """One optimization step; returns the loss terms (0-d) and the mean flow error in pixels (0-d)."""
        o, s = self.options, schedules.published_step(self.step, self.options.num_iters)
        self._scheduled_events(s)
        farthest = schedules.max_interval(s, o.start_interval, len(self.sequence))
        batch = self.sampler.batch(farthest, lambda d: schedules.pair_weight(d, farthest), self.share)
        jitter = torch.rand(o.num_pairs, 1, o.num_samples_ray, device=self.device, generator=self.generators["jitter"])

        near_share = NEAR_SHARE if o.mask_near and s < NEAR_STEPS else 0.0
        prediction, total, terms = self.forward(
            self.model, batch, jitter[self.share], near_share, schedules.loss_weights(s, o.distortion_start),
            o.max_padding, self.processes)
        total, terms = self._more_losses(prediction, batch, total, terms)
        error = (prediction.pixels.detach() - batch.pixels2).norm(dim=-1)  # (B, N)
        terms |= {"error": (error * batch.weights).sum(), "weight": batch.weights.sum()}
        finite = self._descend(total, terms, batch, prediction, s)
        self.error_map.add_points(batch.ids1, batch.pixels1, error, batch.weights * finite)
        self.step += 1
        if self.device.type == "cpu" or self.step % CHECK_EVERY == 0:
            self._look_at_faults()
        summed, weight = terms.pop("error"), terms.pop("weight")
        return terms, summed / weight.clamp(min=1e-8)

    def _more_losses(self, prediction, batch, total: Tensor, terms: dict[str, Tensor]) -> tuple[
            Tensor, dict[str, Tensor]]:
        """This process's part of the loss with what is off by default, and of its terms."""
        o, whole = self.options, self.processes
        if o.w_smoothness:
            terms["smoothness"] = self._smoothness(prediction.local, batch.ids1)
            total = total + o.w_smoothness * terms["smoothness"]
        if o.w_depth:
            prior = depth_at(self.depth_priors, batch.ids1.cpu(), batch.pixels1.cpu()).to(self.device)
            depth = (prediction.weights * prediction.depths).sum(-1)
            terms["depth_prior"] = depth_prior_loss(depth, prior) / whole.count
            total = total + o.w_depth * terms["depth_prior"]
        return total, {name: value.detach() for name, value in terms.items()}

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
            self._use_error_map()

    def _descend(self, total: Tensor, terms: dict[str, Tensor], batch, prediction, s: float) -> Tensor:
        """Change the parameters by the gradient of `total`, with the learning rates of published step `s`, unless it
        is not finite; whether it is (0-d bool). Terms, and "total" among them, become those of all processes."""
        o = self.options
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        terms["total"] = total.detach().clone()  # a compiled step's belongs to the next one
        parameters = [p for group in self.parameter_groups().values() for p in group["params"] if p.grad is not None]
        self.processes.sum_all([*(p.grad for p in parameters), *terms.values()])
        if o.grad_clip:
            norm = torch.nn.utils.clip_grad_norm_(parameters, o.grad_clip)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self.gradient_norm = norm
        parts = (prediction.pixels, prediction.rgb, prediction.target, batch.pixels1, batch.pixels2, batch.rgb1)
        finite = self.faults.finite(self.step, terms["total"], terms, norm, torch.stack([batch.ids1, batch.ids2]),
                                    sum(part.detach().flatten(1).sum(1) for part in parts))
        factor = self.faults.lr_scale * schedules.learning_rate_factor(
            s, o.lrate_decay_steps, o.lrate_decay_factor, o.lrate_warmup_steps)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                held = group["name"] != "color" and s < o.deform_start  # all that maps depend on
                group["lr"] = 0.0 if held else self.base_lr[group["name"]] * factor
            step_where(finite, optimizer)
        return finite

    def _look_at_faults(self) -> None:
        """Report faulty steps, go back after repeated ones, and remember good states. UserError, after the last good
        state is saved, if nothing helps."""
        bad, good_steps = self.faults.look()
        if bad >= LIMIT and self.faults.returns < RETURNS:
            self.faults.go_back(self.model, self.optimizers)
        elif bad >= LIMIT:
            self._give_up()
        elif good_steps >= FORGET and self.step % GOOD_EVERY == 0:
            self.faults.keep(self.step, self.model, self.optimizers)

    def _give_up(self) -> None:
        """UserError after the last good state and a report are saved."""
        guard = self.faults
        good = guard.good["step"]
        guard.go_back(self.model, self.optimizers)
        report = {"step": self.step, "good_step": good, "returns": guard.returns - 1, "lr_scale": guard.lr_scale,
                  "faults": guard.faults, "options": vars(self.options)}
        guard.returns = 0
        self.save()
        if self.processes.first:
            write_text(self.dir / "faults.json", json.dumps(report, indent=1) + "\n")
        raise UserError(f"steps fail again and again, after {RETURNS} returns with smaller learning rates too: look at "
                        f"{self.dir / 'faults.json'} and at the frames and correspondences of the pairs in it. The "
                        f"last good parameters (of step {good}) are saved; the same command goes on from them")

    def _smoothness(self, local: Tensor, ids: Tensor) -> Tensor:
        """OmniMotion's smoothness loss on a quarter of the points of the frames that have two neighbors."""
        inner = (ids >= 1) & (ids < len(self.sequence) - 1)
        flows = local.new_zeros(2, 0, 3)
        if inner.any():
            flows = self.model.scene_flow(local[inner][:, : self.options.num_pts // 4], ids[inner])
        return smoothness_loss(*flows, self.processes)

    def _new_optimizers(self) -> None:
        self.optimizers = new_optimizers(self.model, self.options)
        self.base_lr = {name: group["lr"] for name, group in self.parameter_groups().items()}

    def parameter_groups(self) -> dict[str, dict]:
        """The optimizers' groups by name; their "lr" is the current one."""
        return {group["name"]: group for optimizer in self.optimizers.values() for group in optimizer.param_groups}

    @property
    def samples_per_step(self) -> int:
        """Ray samples of a step."""
        return self.options.num_pairs * self.options.num_pts * self.options.num_samples_ray

    def _freeze(self) -> None:
        """Fix the time latents; the optimizers keep their moments of everything else."""
        before = self.optimizers
        self.model.time_latent.freeze()
        self._new_optimizers()
        for name, optimizer in self.optimizers.items():
            moments = before[name].state
            for group in optimizer.param_groups:
                optimizer.state.update({p: moments[p] for p in group["params"] if p in moments})
        self.faults.keep(self.step, self.model, self.optimizers)  # an older state would not fit
        log.info("step %d: time latents frozen", self.step)

    @torch.no_grad()
    def _evaluate_error_map(self) -> None:
        """Flow errors of every frame at one random pixel a cell against one partner frame, into the error map."""
        tracker = Tracker(self.model, use_max_loc=False, chunk_size=self.options.chunk_size)

        def errors() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
            for i in range(len(self.sequence)):
                j, p1, p2, weights = self.sampler.pixel_a_cell(i, self.error_map)
                if i % self.processes.count == self.processes.rank:  # all draw the same, each tracks its own frames
                    found = torch.from_numpy(tracker.correspond(p1.numpy(), i, j))
                    yield torch.tensor([i]), p1[None], (found - p2).norm(dim=-1)[None], weights[None]

        self.error_map.add_evaluation(errors())
        self._use_error_map()

    def _use_error_map(self) -> None:
        self._share_error_map()
        self.sampler.use_error_map(self.error_map)

    def _share_error_map(self) -> None:
        if self.processes.count > 1:
            self.error_map.share(self.processes.sum)

    def save(self) -> None:
        """Write a checkpoint with everything that the next step depends on, and drop old ones. All processes call it,
        the first one writes. UserError if it cannot be written."""
        self._share_error_map()
        self.faults.look()
        if self.processes.first:
            save_checkpoint(checkpoint_path(self.dir, self.step), self._state())
            drop_old_checkpoints(self.dir, self.options.keep)
        self.processes.wait()

    def _state(self) -> dict:
        cuda = self.device.type == "cuda"
        return {
            "step": self.step, "config": asdict(self.model.config), "model": self.model.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "faults": self.faults.state_dict(),
            "error_map": self.error_map.state_dict(),
            "sampler": self.sampler.state_dict(),
            "generators": {name: generator.get_state() for name, generator in self.generators.items()},
            "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if cuda else None},
            "device": self.device.type,
            "frames": {"size": self.sequence.size, "hashes": self.hashes},
            "options": {k: v for k, v in vars(self.options).items() if isinstance(v, str | int | float)}}

    def _check_config(self, config: dict, path: Path) -> None:
        """UserError if the options describe another model or error map than the checkpoint's."""
        now, config = asdict(self.model.config), asdict(ModelConfig(**config))  # an older one lacks newer settings
        if not self.options.grid_layers:  # the video said so when the run began
            now["grid_layers"] = config["grid_layers"]
        for name in now:
            if list(now[name]) != list(config[name]) if name == "coordinates" else now[name] != config[name]:
                raise UserError(f"{path} was trained with {name} {config[name]}, now it is {now[name]}: give the same, "
                                "another --expname, or --no_reload to start again")

    def _start_from_checkpoint(self) -> None:
        """Go on from the run's newest sound checkpoint, or from the model of `ckpt_path`; UserError if it does not
        fit."""
        if not self.options.reload and self.processes.first:
            set_aside(self.dir)
        self.processes.wait()
        found = newest_checkpoint(self.dir)
        if found is None and not self.options.ckpt_path:
            return
        if found and self.options.ckpt_path:
            log.warning("--ckpt_path is not used: %s is there; --no_reload starts a new run", found[0])
        path, checkpoint = found or (self.options.ckpt_path, load_checkpoint(Path(self.options.ckpt_path)))
        check_length(checkpoint_num_frames(checkpoint, path), len(self.sequence), path)
        if found:
            check_frames(checkpoint, self.sequence.size, self.hashes, path)
            self._check_config(checkpoint["config"], path)
        self.model = model_from_checkpoint(checkpoint, self.sequence.size, self.options, self.device)
        self._new_optimizers()
        if not found:  # somebody's model as a start: a new run of its own
            log.info("starting from the model in %s", path)
            return
        self._go_on(checkpoint, path)
        log.info("going on from %s at step %d", path, self.step)

    def _go_on(self, checkpoint: dict, path: Path) -> None:
        """Take over all but the model from a checkpoint of this run. UserError if it does not fit the options."""
        self.step = checkpoint["step"]
        if checkpoint["optimizers"].keys() != self.optimizers.keys():
            raise UserError(f"{path} was made with another --optimizer ({' and '.join(checkpoint['optimizers'])}): "
                            "give the same, or --no_reload to start again")
        for name, optimizer in self.optimizers.items():
            if not fits(checkpoint["optimizers"][name], optimizer):
                raise UserError(
                    f"{path} was made with --mlp_backend {checkpoint['options'].get('mlp_backend')}, whose optimizer's "
                    f"state --mlp_backend {self.options.mlp_backend} cannot take over: give the same, or start a new "
                    "run from its model with --ckpt_path and another --expname")
            optimizer.load_state_dict(checkpoint["optimizers"][name])
        if checkpoint["error_map"]["sums"].shape != self.error_map.sums.shape:
            raise UserError(f"{path} was made with another --error_map_cell: give the same, or --no_reload")
        self.error_map.load_state_dict(checkpoint["error_map"])
        self.sampler.load_state_dict(checkpoint["sampler"])
        if "faults" in checkpoint:  # since format 2
            self.faults.load_state_dict(checkpoint["faults"], self.device)
        self.generators["sampler"].set_state(checkpoint["generators"]["sampler"])
        if checkpoint.get("device", self.device.type) != self.device.type:
            log.warning("%s was made on %s: the pixels and depths drawn from here on are not those of an uninterrupted "
                        "run", path, checkpoint["device"])
            self.generators["jitter"].manual_seed(self.options.seed + 1 + self.step)
            return
        self.generators["jitter"].set_state(checkpoint["generators"]["jitter"])
        if "rng" in checkpoint:
            torch.set_rng_state(checkpoint["rng"]["cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])
