"""Which pairs of frames get correspondences, and an estimate of the time and disk space that they take.

Notation
    T         number of frames
    interval  j - i of a pair of frames i < j; correspondences are computed in both directions, as two ordered pairs
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from loaders.correspondence_format import block_bytes
from loaders.scenes import Scenes

EVERY_FRAME = 64    # interval of "log" up to which pairs start at every frame
STARTS = 16         # pairs of a longer interval that start within it
DISK_MARGIN = 1.05  # free space that is required, as a multiple of the estimate


def intervals(choice: str, num_frames: int) -> dict[int, int]:
    """The intervals of a choice of pairs, ascending, each with the step between the first frames of its pairs.

    choice: "all"; "window:K": 1 to K; "log": 1, 2, 4, 8, 16, ..., where those of more than EVERY_FRAME have steps of
    8, 16, ... UserError if it is none of these."""
    longest = num_frames - 1
    if choice == "all":
        return dict.fromkeys(range(1, longest + 1), 1)
    if choice == "log":
        return {d: _step(d) for d in (1 << k for k in range(longest.bit_length()))}
    name, _, width = choice.partition(":")
    if name != "window" or not width.isdecimal() or int(width) < 1:
        raise UserError(f"--pairs {choice}: give all, log, or window:K with a number K of frames, as in window:20")
    return dict.fromkeys(range(1, min(int(width), longest) + 1), 1)


def _step(interval: int) -> int:
    """Step of an interval of "log", a power of two. Of a long one, STARTS pairs start within it, so that the number of
    all pairs grows as T.

    The step is a multiple of those of shorter intervals: from either frame of a chosen pair, the next shorter one is
    chosen too, which a warm start needs."""
    return 1 if interval <= EVERY_FRAME else interval // STARTS


def with_gaps(chosen: dict[int, int], scenes: Scenes) -> dict[int, int]:
    """The `intervals` `chosen`, followed by those that are missing between a frame and the next one of its scene, over
    blank frames or another scene. Their step is 0: no other pair has them. Chains pass over a gap by its pair."""
    frames = range(len(scenes.scene))
    gaps = {after - i for i in frames if (after := scenes.next(i, 1)) is not None}
    return chosen | dict.fromkeys(sorted(gaps - chosen.keys()), 0)


def pairs_at(interval: int, step: int, scenes: Scenes) -> list[tuple[int, int]]:
    """The pairs (i, i + interval) of frames of one scene where i is a multiple of `step` or no frame of the scene is
    in between; of adjacent frames all pairs."""
    return [(i, i + interval) for i in range(len(scenes.scene) - interval) if scenes.wanted(i, i + interval)
            and ((step and i % step == 0) or scenes.next(i, 1) == i + interval)]


def ordered_pairs(chosen: dict[int, int], scenes: Scenes) -> list[tuple[int, int]]:
    """The pairs of the `intervals` `chosen`, each followed by the pair in the other direction."""
    return [pair for d, step in chosen.items() for i, j in pairs_at(d, step, scenes) for pair in ((i, j), (j, i))]


def chunks(items: Sequence, length: int) -> list[Sequence]:
    """`items` in pieces of `length`; the last one may be shorter."""
    return [items[k: k + length] for k in range(0, len(items), length)]


@dataclass(frozen=True)
class Cost:
    """Estimated cost of computing correspondences."""
    ordered_pairs: int
    done: int       # ordered pairs that an earlier run has written
    seconds: float  # left for optical flow
    disk: int       # bytes of the finished store
    peak_disk: int  # bytes at most while the store is made

    def __str__(self) -> str:
        done = f", {self.done} of them done" if self.done else ""
        return (f"{self.ordered_pairs} ordered pairs of frames{done}; flow takes about "
                f"{tqdm.format_interval(self.seconds)} (minutes:seconds), the store about {self.disk / 2**20:.0f} MiB "
                f"({self.peak_disk / 2**20:.0f} MiB while it is made)")


def estimate(numbers: dict[int, int], size: tuple[int, int], shares: dict[int, float], seconds: float, kept: float,
             done: int, fixed: int) -> Cost:
    """Cost of the wanted pairs, extrapolated from a few measured pairs.

    numbers: interval -> number of ordered pairs
    size:    (H, W) of the frames
    shares:  measured interval -> share of pixels with a correspondence; interpolated linearly in between
    seconds: time per ordered pair, all threads together
    kept:    share of the correspondences of non-adjacent frames that the finished store keeps
    done:    ordered pairs that are already written
    fixed:   bytes of temporary files besides the pairs'"""
    pixels = size[0] * size[1]
    interval = np.array(list(numbers))
    number = np.array(list(numbers.values()))
    measured = sorted(shares)
    share = np.interp(interval, measured, [shares[n] for n in measured])
    adjacent = interval == 1  # all pixels are stored; a temporary copy of the flow is kept in float32
    stored = np.where(adjacent, pixels, share * kept * pixels).astype(np.int64)
    disk = int((number * block_bytes(stored, size)).sum())
    temporary = disk + int((number * 8 * pixels * adjacent).sum())
    ordered_pairs = int(number.sum())
    return Cost(ordered_pairs, done, seconds * (ordered_pairs - done), disk, max(temporary, disk) + fixed)


def check_disk(peak_disk: int, folder: Path, used: int) -> None:
    """UserError if the disk of `folder` is too small for `peak_disk` bytes, of which `used` are already written."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = int(DISK_MARGIN * peak_disk) - used
    if needed > free:
        raise UserError(f"{folder} has {free / 2**30:.1f} GiB free and about {needed / 2**30:.1f} GiB are needed: free "
                        "some, or use fewer pairs (--pairs log), smaller frames or --density half")
