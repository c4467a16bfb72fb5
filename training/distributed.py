"""Data-parallel training: `torchrun --nproc_per_node=N train.py ...`, one process per GPU, or several on the CPU.

All processes hold the same random generators and draw the same numbers, so the batch of a step does not depend on the
number of processes. Each process loads and computes its own share of the pairs; one all-reduce sums the gradients.
DistributedDataParallel is not used, for three reasons: the model has several entry points; the set of trained
parameters changes when the time latents are frozen; and losses are divided by the number of points of all processes,
so that the gradient of the whole batch is the sum of the processes' gradients and not their mean.
"""

import os
from argparse import Namespace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import UserError


class Processes:
    """The `count` processes of a run, seen from process `rank`. Only rank 0 writes files. With one process every
    reduction returns its input. UserError from any reduction if another process has ended or does not answer."""

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank = rank
        self.count = count

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the process that writes files."""
        return self.rank == 0

    def slice_of(self, items: int) -> slice:
        """This process's slice of `items` (the pairs of a batch). UserError if `count` does not divide `items`."""
        if items % self.count:
            raise UserError(f"--num_pairs {items} cannot be shared by {self.count} processes: give a multiple of it")
        part = items // self.count
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, x: Tensor) -> Tensor:
        """Sum of a tensor over the processes, same shape, without gradient."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum of a tensor over the processes, same shape, without gradient."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def sum_all(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their sums over the processes, in one all-reduce. All have one device and dtype."""
        if self.count > 1:
            flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process. The tensor is on the CPU, so the GPU is not synchronized."""
        return [bool(flag) for flag in self.max(torch.tensor(flags, dtype=torch.uint8))]

    def agree(self, value: int, what: str) -> None:
        """UserError if `value` is not the same in all processes."""
        largest, negated_smallest = self.max(torch.tensor([value, -value])).tolist()
        smallest = -negated_smallest
        if largest != smallest:
            raise UserError(f"the processes of this run differ in {what} ({smallest} to {largest}): all machines must "
                            "see the same --save_dir and --data_dir")

    def from_first(self, value: int) -> int:
        """The first process's `value`; those of the others are ignored."""
        return int(self.sum(torch.tensor(value if self.first else 0)))

    def wait(self) -> None:
        """Barrier: return once all processes have called this."""
        self.any(False)

    def _reduced(self, x: Tensor, operation) -> Tensor:
        if self.count == 1:
            return x
        out = x.detach().clone()
        try:
            dist.all_reduce(out, operation)
        except RuntimeError as error:  # torch.distributed raises RuntimeError with every backend
            raise UserError(f"process {self.rank} of {self.count}: another process of this run was lost or does not "
                            "answer; start the same command again, it goes on from the newest checkpoint") from error
        return out


def join_processes(options: Namespace) -> Processes:
    """Join the process group that torchrun's environment variables describe; a single process without torchrun.

    Each process takes the GPU of its local rank. UserError if there are more processes than GPUs on this machine."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    if count == 1:
        return Processes()
    cuda = options.device != "cpu" and torch.cuda.is_available()
    if cuda:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"{os.environ['LOCAL_WORLD_SIZE']} processes for {torch.cuda.device_count()} GPUs: give "
                            "torchrun as many --nproc_per_node as there are GPUs")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                            timeout=timedelta(minutes=options.process_timeout))
    return Processes(rank, count)


def leave_processes() -> None:
    """Destroy the process group that `join_processes` created, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
