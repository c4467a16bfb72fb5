"""The processes of a run that torchrun starts: `torchrun --nproc_per_node=N train.py ...`, one a GPU, or on the CPU.

How a step is shared: all processes hold the same generators and draw the same random numbers, so that the batch of a
step does not depend on their number; each looks up and computes its own share of the pairs, and gradients are summed in
one all-reduce. It is done by hand and not by DistributedDataParallel because the model has several entry points, its
set of trained parameters changes when the time latents are frozen, and losses are means over points that are counted
over all processes: sums of the shares' gradients are the whole batch's gradient, means would not be.
"""

import logging
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import UserError

log = logging.getLogger("train")


class Processes:
    """This process among the `count` of a run; number `rank`, of which 0 alone writes. Alone, every method hands back
    what it is given. UserError from any method where another process was lost."""

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count = rank, count

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, items: int) -> slice:
        """This process's part of `items` that the processes divide evenly. UserError where they cannot."""
        if items % self.count:
            raise UserError(f"--num_pairs {items} cannot be shared by {self.count} processes: give a multiple of it")
        part = items // self.count
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the processes, of a tensor without gradient; the same shape."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """Maximum over the processes, of a tensor without gradient; the same shape."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def sum_all(self, tensors: list[Tensor]) -> None:
        """Replace tensors of one device and dtype by their sums over the processes, in one go."""
        if self.count > 1:
            flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag whether any process has it set. It goes over the CPU: a GPU is not waited for."""
        return [bool(flag) for flag in self.max(torch.tensor(flags, dtype=torch.uint8))]

    def agree(self, value: int, what: str) -> None:
        """UserError if `value` is not the same in all processes."""
        largest, smallest = self.max(torch.tensor([value, -value])).tolist()
        if largest != -smallest:
            raise UserError(f"the processes of this run differ in {what} ({-smallest} to {largest}): all machines must "
                            "see the same --save_dir and --data_dir")

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)

    def _reduced(self, x: Tensor, operation) -> Tensor:
        if self.count == 1:
            return x
        out = x.detach().clone()
        with self._others_answer():
            dist.all_reduce(out, operation)
        return out

    @contextmanager
    def _others_answer(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what torch.distributed raises, whatever the backend
            raise UserError(f"process {self.rank} of {self.count}: another process of this run was lost or does not "
                            "answer; start the same command again, it goes on from the newest checkpoint") from error


def join_processes(options: Namespace) -> Processes:
    """This process's place among those that torchrun started, by its environment variables; alone without torchrun.
    Only the first one logs anything but warnings."""
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if count == 1:
        return Processes()
    cuda = options.device != "cpu" and torch.cuda.is_available()
    if cuda:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"{os.environ['LOCAL_WORLD_SIZE']} processes for {torch.cuda.device_count()} GPUs: give "
                            "torchrun as many --nproc_per_node as there are GPUs")
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=timedelta(minutes=options.process_timeout))
    if rank:
        logging.getLogger().setLevel(logging.WARNING)
    return Processes(rank, count)


def leave_processes() -> None:
    """End what `join_processes` began."""
    if dist.is_initialized():
        dist.destroy_process_group()
