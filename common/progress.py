"""One progress bar for work in several parts, with the time that is left for all of it.

The parts write their own tqdm bars to stderr, in other processes or in this one. `WholeProgress` reads these instead of
a terminal: their counts move the one bar that is shown.
"""

import io
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import NamedTuple

from tqdm import tqdm

COUNTS = re.compile(r"(?P<name>[^|]*?):\s+\d+%\|.*\|\s*(?P<done>\d+)/(?P<total>\d+) \[")
ANY_BAR = re.compile(r"\d+%\||\d+(it|step) \[")  # of a known or an unknown total
MIN_SHARE = 0.02  # of a part; once more of it is done, its own speed tells when it ends
LAST_WORDS = ("error: ", "stopped by Ctrl-C")  # of a command that ends; whoever runs it reports this
SHOW_EVERY = 0.2  # seconds
PRIOR = 10.0      # seconds for which the estimates count as right, before anything is done


class Part(NamedTuple):
    """A part of the work, with a bar of its own."""
    label: str      # what the user reads
    bar: str        # name of its bar
    seconds: float  # an estimate; the time left is scaled by the speed of what has been done


class WholeProgress(io.TextIOBase):
    """A text stream that reads the bars of the parts and shows one bar for all of them.

    Other lines are shown above the bar, except LAST_WORDS. Bars of other names than those of the parts are ignored."""

    def __init__(self, title: str, parts: Sequence[Part], shown: bool = True):
        """parts: in their order."""
        self.title = title
        self.stream = sys.stderr
        self.labels = [part.label for part in parts]
        self.names = [part.bar for part in parts]
        self.estimates = [part.seconds for part in parts]
        self.rest = ""          # of what was written: a line that has not ended
        self.current = -1       # part under way
        self.share = 0.0        # done of it
        self.first_share = 0.0  # done of it when it began: a part that is resumed does not begin at 0
        self.expected = 0.0     # sum of the estimates of what was done here before it
        self.begun = time.monotonic()
        self.part_begun = self.begun
        self.shown_at = 0.0
        self.bar = tqdm(total=100, desc=title, file=self.stream, disable=not shown, dynamic_ncols=True, leave=False,
                        bar_format="{desc} {percentage:3.0f}%|{bar}|")

    @contextmanager
    def of_this_process(self) -> Iterator[None]:
        """In this context, the bars that this process writes are read, too."""
        with redirect_stderr(self):
            yield

    def write(self, text: str) -> int:
        """Read a piece of the stderr of a part."""
        *lines, self.rest = re.split(r"[\r\n]", self.rest + text)
        for line in [*lines, self.rest]:
            found = COUNTS.match(line)
            if found:
                self._advance(found["name"].strip(), int(found["done"]) / max(int(found["total"]), 1))
        for line in lines:
            if line.strip() and not ANY_BAR.search(line) and not line.startswith(LAST_WORDS):
                tqdm.write(line, file=self.stream)
        return len(text)

    def _advance(self, name: str, share: float) -> None:
        """Part `name`, the current one or a later one, is done up to `share`."""
        now = time.monotonic()
        here = max(self.current, 0)
        if name not in self.names[here:]:
            return
        part = self.names.index(name, here)
        if part != self.current:
            if self.current >= 0:
                self.expected += (1 - self.first_share) * self.estimates[self.current]
            self.current = part
            self.first_share = share
            self.part_begun = now
        self.share = share
        self._show(now)

    def seconds_left(self, now: float) -> float:
        """Estimate, at the time `now` of time.monotonic, of the time until all parts are done."""
        estimate = self.estimates[self.current]
        progress = self.share - self.first_share
        slowness = (now - self.begun + PRIOR) / (self.expected + progress * estimate + PRIOR)
        left = slowness * estimate * (1 - self.share)
        if progress > MIN_SHARE:
            left = (now - self.part_begun) * (1 - self.share) / progress
        return left + slowness * sum(self.estimates[self.current + 1:])

    def _show(self, now: float) -> None:
        if now - self.shown_at < SHOW_EVERY:
            return
        self.shown_at = now
        left = self.seconds_left(now)
        elapsed = now - self.begun
        self.bar.set_description_str(f"{self.title}: {self.labels[self.current]}, about {tqdm.format_interval(left)} "
                                     "left in all", refresh=False)
        self.bar.n = 100 * elapsed / max(elapsed + left, 1e-9)
        self.bar.refresh()

    def close(self) -> None:
        """End the bar."""
        self.bar.close()
        super().close()
