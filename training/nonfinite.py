"""Steps whose loss or gradient is not finite: they are skipped, reported, and after repeated ones the run goes back.

Notation
    fault    a step whose loss, or the norm of whose gradient, is not finite; parameters and moments stay as they were
    bad      faults since the last return or the last `FORGET` good steps in a row
    return   back to the parameters and moments of the last good state, with half the learning rates; the step count,
             generators and schedules go on

Everything that a step needs stays on its device: a GPU is never waited for but when someone looks.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

log = logging.getLogger("train")
TERMS = ("flow", "rgb", "rgb_gradient", "flow_gradient", "depth_range", "distortion", "smoothness", "depth_prior")
LIMIT = 5       # faults before a return
RETURNS = 4     # returns before giving up
FORGET = 50     # good steps in a row after which earlier faults do not count
GOOD_EVERY = 500  # steps between good states


@dataclass
class Fault:
    """What is known of a faulty step."""
    step: int
    terms: dict[str, float]             # loss terms, unweighted
    gradient_norm: float
    pairs: list[tuple[int, int]]        # of frames with values that are not finite; all of the batch if all are finite
    pairs_finite: bool

    def __str__(self) -> str:
        broken = [name for name, value in self.terms.items() if not torch.isfinite(torch.tensor(value))]
        what = f"loss term {', '.join(broken)}" if broken else "gradient"
        pairs = ", ".join(f"{i}-{j}" for i, j in self.pairs)
        where = "one of the pairs of frames" if self.pairs_finite else "pair of frames"
        return f"step {self.step} skipped: the {what} is not finite; {where} {pairs}"


class FaultGuard:
    """Keeps count of the faults of a run, and its last good state."""

    def __init__(self, device: torch.device, first: bool = True):
        self.first = first  # False: another process reports what all processes see
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # bad, good steps in a row, faults not reported
        self.record: Tensor | None = None  # of the oldest fault that is not reported
        self.lr_scale, self.returns, self.good, self.faults = 1.0, 0, None, []

    def finite(self, step: int, total: Tensor, terms: dict[str, Tensor], norm: Tensor, ids: Tensor,
               of_pairs: Tensor) -> Tensor:
        """Whether a step may be taken (0-d bool), and the fault on record if not.

        total, norm: loss and norm of the gradient, 0-d; terms: loss terms, 0-d; ids `(2, B)`: frames of the pairs;
        of_pairs `(B,)`: not finite for a pair that has a value which is not."""
        finite = torch.isfinite(total) & torch.isfinite(norm)
        values = [terms.get(name, torch.zeros_like(total)) for name in TERMS]
        record = torch.cat([torch.stack([*values, norm]).double(), ids.flatten().double(), of_pairs.double(),
                            torch.full((1,), step, dtype=torch.float64, device=total.device)])
        bad, row, unseen = self.counts.unbind()
        if self.record is not None and len(self.record) == len(record):
            record = torch.where((unseen == 0) & ~finite, record, self.record)
        self.record = record
        row = torch.where(finite, row + 1, 0)
        bad = torch.where(row >= FORGET, 0, bad + (~finite).long())
        self.counts = torch.stack([bad, row, unseen + (~finite).long()])
        return finite

    def look(self) -> tuple[int, int]:
        """Report faults since the last look; returns `bad` and the number of good steps in a row. Waits for a GPU."""
        bad, row, unseen = self.counts.tolist()
        if unseen:
            fault = self._fault()
            if self.first or not fault.pairs_finite:
                more = f", and {unseen - 1} steps after it" if unseen > 1 else ""
                log.warning("%s%s", fault, more)
            self.faults = [*self.faults, vars(fault)][-50:]
            self.counts[2] = 0
        return bad, row

    def _fault(self) -> Fault:
        values = self.record.tolist()
        n = len(TERMS)
        terms, (norm, *rest, step) = values[:n], values[n:]
        B = len(rest) // 3
        pairs = [(int(i), int(j)) for i, j in zip(rest[:B], rest[B:2 * B], strict=True)]
        finite = torch.isfinite(torch.tensor(rest[2 * B:])).tolist()
        broken = [pair for pair, ok in zip(pairs, finite, strict=True) if not ok]
        return Fault(int(step), {name: value for name, value in zip(TERMS, terms, strict=True) if value != 0}, norm,
                     broken or pairs, not broken)

    def keep(self, step: int, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        """Remember this state as the last good one."""
        self.good = copied({"step": step, "model": model.state_dict(),
                            "optimizers": {name: o.state_dict() for name, o in optimizers.items()}})

    def go_back(self, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        """Return to the last good state, with half the learning rates."""
        restore(self.good, model, optimizers)
        self.lr_scale, self.returns = self.lr_scale / 2, self.returns + 1
        self.counts.zero_()
        log.warning("%d steps were skipped: back to the parameters of step %d, learning rates x %g from now on", LIMIT,
                    self.good["step"], self.lr_scale)

    def state_dict(self) -> dict:
        """For the checkpoint; call `look` before."""
        return {"counts": self.counts, "lr_scale": self.lr_scale, "returns": self.returns, "good": self.good,
                "faults": self.faults}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Inverse of `state_dict`."""
        self.counts.copy_(state["counts"])
        self.lr_scale, self.returns, self.faults = state["lr_scale"], state["returns"], state["faults"]
        self.good = copied(state["good"], device)


def restore(state: dict, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """Parameters and moments as `FaultGuard.keep` kept them."""
    model.load_state_dict(state["model"])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(copied(state["optimizers"][name]))  # it would keep the very tensors


def copied(value, device: torch.device | None = None):
    """Nested dicts and lists with copies of their tensors, on `device` or where they are."""
    if isinstance(value, Tensor):
        return value.detach().to(device or value.device, copy=True)
    if isinstance(value, dict):
        return {key: copied(item, device) for key, item in value.items()}
    return [copied(item, device) for item in value] if isinstance(value, list) else value


def step_where(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` if `finite` (0-d bool) is true; else parameters and moments stay, without looking at it."""
    if optimizer.defaults.get("fused") and all(group["fused"] for group in optimizer.param_groups):  # it can do that
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        optimizer.step()
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    before = [(p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}) for p in parameters]
    optimizer.step()
    for p, (value, moments) in zip(parameters, before, strict=True):
        p.data.copy_(torch.where(finite, p.data, value))
        for name, moment in optimizer.state[p].items():
            moment.copy_(torch.where(finite, moment, moments.get(name, torch.zeros_like(moment))))


def fits(state: dict, optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's saved state is of parameters of the same number and shapes."""
    groups = zip(state["param_groups"], optimizer.param_groups, strict=False)
    if [len(g["params"]) for g in state["param_groups"]] != [len(g["params"]) for g in optimizer.param_groups]:
        return False
    pairs = [(key, p) for old, new in groups for key, p in zip(old["params"], new["params"], strict=True)]
    return all(moment.shape == p.shape for key, p in pairs for moment in state["state"].get(key, {}).values()
               if moment.ndim)
