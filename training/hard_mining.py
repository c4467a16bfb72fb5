"""Accumulated hard mining: flow errors are added to an error map over the whole run, and the sampler draws by it.

Each step adds the errors of its points. Full evaluations (`--i_cache`) add one random pixel per cell of every frame;
the sampler uses the map from the first evaluation on. `--error_map last` keeps only the latest evaluation, as
OmniMotion does.
"""

from argparse import Namespace
from collections.abc import Iterator

import torch
from torch import Tensor

from inference.tracker import Tracker
from loaders.error_map import ErrorMap
from loaders.pair_sampler import PairSampler
from losses.schedules import own_step
from models.omnimotion import OmniMotion
from training.distributed import Processes

UPDATE_STEPS = 1_000  # reference steps between updates of the sampler from the accumulated map


class HardMining:
    """Updates the error map of a run, and the sampler from it."""

    def __init__(self, error_map: ErrorMap, sampler: PairSampler, options: Namespace, processes: Processes):
        self.error_map = error_map
        self.sampler = sampler
        self.options = options
        self.processes = processes

    def before_step(self, step: int, model: OmniMotion) -> None:
        """At scheduled steps, evaluate the model on all frames, and give the current map to the sampler."""
        options = self.options
        if options.error_map == "off" or step == 0:
            return
        if step % max(own_step(options.i_cache, options.num_iters), 1) == 0:
            self._evaluate(model)
            self._update_sampler()
        elif (self.error_map.ready and options.error_map == "accumulated"
              and step % max(own_step(UPDATE_STEPS, options.num_iters), 1) == 0):
            self._update_sampler()

    def sum_over_processes(self) -> None:
        """Add to each process's map what the other processes have added to theirs since the last call."""
        if self.processes.count > 1:
            self.error_map.share(self.processes.sum)

    def _update_sampler(self) -> None:
        self.sum_over_processes()
        self.sampler.use_error_map(self.error_map)

    @torch.no_grad()
    def _evaluate(self, model: OmniMotion) -> None:
        """Add the flow errors of every frame at one random pixel per cell, against one other frame."""
        tracker = Tracker(model, use_max_loc=False, chunk_size=self.options.chunk_size)

        def errors() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
            for i in range(model.config.num_frames):
                j, p1, p2, weights = self.sampler.pixel_a_cell(i, self.error_map)
                if i % self.processes.count == self.processes.rank:  # all draw the same pixels, each tracks its frames
                    predicted = torch.from_numpy(tracker.correspond(p1.numpy(), i, j))
                    yield torch.tensor([i]), p1[None], (predicted - p2).norm(dim=-1)[None], weights[None]

        self.error_map.add_evaluation(errors())
