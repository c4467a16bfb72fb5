"""Which pairs of frames get correspondences, and what that will cost.

Notation
    T         frames
    interval  j - i of a pair i < j; both directions of a pair are computed
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from loaders.correspondence_format import block_bytes

log = logging.getLogger(__name__)


def intervals(choice: str, num_frames: int) -> list[int]:
    """Intervals of a choice of pairs, ascending: "all"; "window:K", up to K; "log": 1, 2, 3, 4, 6, 8, 12, 16, 24, ...

    UserError if it is none of these."""
    longest = num_frames - 1
    if choice == "all":
        return list(range(1, longest + 1))
    if choice == "log":
        powers = [1 << k for k in range(longest.bit_length())]
        return sorted(d for d in {*powers, *(3 * p // 2 for p in powers[1:])} if d <= longest)
    name, _, width = choice.partition(":")
    if name != "window" or not width.isdecimal() or int(width) < 1:
        raise UserError(f"--pairs {choice}: say all, log, or window:K with a whole number K of frames, as in window:20")
    return list(range(1, min(int(width), longest) + 1))


def pairs_at(interval: int, num_frames: int) -> list[tuple[int, int]]:
    """The pairs (i, i + interval)."""
    return [(i, i + interval) for i in range(num_frames - interval)]


def chunks(items: Sequence, length: int) -> list[Sequence]:
    """`items` in pieces of `length`, the last one perhaps shorter."""
    return [items[k: k + length] for k in range(0, len(items), length)]


@dataclass(frozen=True)
class Cost:
    """What a choice of pairs costs; disk in bytes, time in seconds of the flow stage."""
    directed: int    # ordered pairs
    done: int        # of them written already
    seconds: float
    disk: int        # the finished store
    while_working: int  # what it takes until then

    def __str__(self) -> str:
        done = f", {self.done} of them done" if self.done else ""
        return (f"{self.directed} ordered pairs of frames{done}; flow takes about {_duration(self.seconds)}, "
                f"the store about {self.disk / 2**20:.0f} MiB, {self.while_working / 2**20:.0f} MiB while it is made")


def estimate(chosen: list[int], num_frames: int, size: tuple[int, int], shares: dict[int, float], seconds: float,
             kept: float, done: int, fixed: int) -> Cost:
    """Cost of the intervals `chosen`, from probed pairs.

    shares:  share of pixels with a correspondence at some intervals (linear in between)
    seconds: time of one ordered pair, all workers together
    kept:    share of a distant pair's correspondences that the finished store keeps
    done:    ordered pairs written already; fixed: bytes that are needed besides pairs while working"""
    pixels, near = size[0] * size[1], sorted(shares)
    directed = disk = parts = 0
    for d in chosen:
        number = 2 * (num_frames - d)
        share = 1.0 if d == 1 else _between(shares, near, d)
        directed += number
        disk += number * block_bytes(int(share * (1.0 if d == 1 else kept) * pixels), size)
        parts += number * (block_bytes(int(share * pixels), size) + (8 * pixels if d == 1 else 0))
    return Cost(directed, done, seconds * (directed - done), disk, max(parts, disk) + fixed)


def check_disk(cost: Cost, folder: Path, used: int = 0) -> None:
    """UserError if the disk of `folder` has no room for the work; `used` bytes of it are there already."""
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, int(1.05 * cost.while_working) - used
    if needed > free:
        raise UserError(f"{folder} has {free / 2**30:.1f} GiB free and about {needed / 2**30:.1f} GiB are needed: free "
                        "some, or take fewer pairs (--pairs log), smaller frames or --keep half")


def _between(shares: dict[int, float], near: list[int], d: int) -> float:
    below = max((n for n in near if n <= d), default=near[0])
    above = min((n for n in near if n >= d), default=near[-1])
    if below == above:
        return shares[below]
    return shares[below] + (shares[above] - shares[below]) * (d - below) / (above - below)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
