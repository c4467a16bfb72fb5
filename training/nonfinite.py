"""Steps whose loss or gradient is not finite are skipped and logged; after MAX_SKIPPED in a row the run stops.

A skipped step leaves parameters and optimizer state unchanged. The counts stay on the device, so that the CPU waits for
a GPU only in `report`.
"""

import logging
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from losses.objective import TERMS

log = logging.getLogger("train")
MAX_SKIPPED = 20  # skipped steps in a row after which the run stops


@dataclass
class SkippedStep:
    """Description of a skipped step, for the log."""
    step: int
    terms: dict[str, float]        # loss terms, unweighted
    pairs: list[tuple[int, int]]   # frame pairs with values that are not finite; all of the batch if all are finite
    pairs_finite: bool

    def __str__(self) -> str:
        broken = [name for name, value in self.terms.items() if not math.isfinite(value)]
        what = f"loss term {', '.join(broken)}" if broken else "gradient"
        pairs = ", ".join(f"{i}-{j}" for i, j in self.pairs)
        where = "one of the frame pairs" if self.pairs_finite else "frame pair"
        return f"step {self.step} skipped: the {what} is not finite; {where} {pairs}"


class Record(NamedTuple):
    """A skipped step, on the device."""
    step: Tensor       # ()
    terms: Tensor      # (len(TERMS),)
    ids: Tensor        # frames of the pairs  (2, B)
    pair_sums: Tensor  # not finite for a pair with a value that is not finite  (B,)


class NonfiniteGuard:
    """Counts skipped steps and records the first one since the last report."""

    def __init__(self, device: torch.device, reports: bool = True):
        """reports: whether this process logs. The first process does, because all processes skip the same steps."""
        self.reports = reports
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # skipped in a row, skipped since the report
        self.record: Record | None = None  # of the first step that was skipped since the last report
        self.latest: SkippedStep | None = None  # the one that was reported last

    def check(self, step: int, total: Tensor, terms: dict[str, Tensor], norm: Tensor, ids: Tensor,
              pair_sums: Tensor) -> Tensor:
        """Whether a step may be taken (0-d bool); if not, it is counted and recorded.

        total, norm: loss and norm of the gradient, 0-d; terms: loss terms, 0-d; ids, pair_sums: see Record."""
        finite = torch.isfinite(total) & torch.isfinite(norm)
        values = [terms.get(name, torch.zeros_like(total)) for name in TERMS]
        record = Record(torch.full((), step, device=total.device), torch.stack(values), ids, pair_sums)
        in_a_row, unreported = self.counts.unbind()
        if self.record is not None:
            first = (unreported == 0) & ~finite
            record = Record(*(torch.where(first, new, old) for new, old in zip(record, self.record, strict=True)))
        self.record = record
        skipped = (~finite).long()
        self.counts = torch.stack([torch.where(finite, 0, in_a_row + 1), unreported + skipped])
        return finite

    def report(self) -> int:
        """Log the steps skipped since the last call; the number of skipped steps in a row. Waits for a GPU."""
        in_a_row, unreported = self.counts.tolist()
        if unreported:
            self.latest = self._recorded()
            if self.reports or not self.latest.pairs_finite:
                more = f", and {unreported - 1} steps after it" if unreported > 1 else ""
                log.warning("%s%s", self.latest, more)
            self.counts[1] = 0
        return in_a_row

    def resume(self, in_a_row: int) -> None:
        """Go on from a checkpoint that was written after this many skipped steps in a row."""
        self.counts[0] = in_a_row

    def _recorded(self) -> SkippedStep:
        step, terms, ids, pair_sums = (values.tolist() for values in self.record)
        pairs = list(zip(*ids, strict=True))
        broken = [pair for pair, value in zip(pairs, pair_sums, strict=True) if not math.isfinite(value)]
        present = {name: value for name, value in zip(TERMS, terms, strict=True) if value != 0}
        return SkippedStep(step, present, broken or pairs, not broken)
