"""Frames of a video file that are missing or damaged.

FFmpeg decodes what it can of a damaged file. A frame counts as lost if
    the decoder flags it as corrupt;
    the file has its data, but the decoder returns no frame, and reports an error;
    the times of the frames, otherwise regular, skip it, and the reader or decoder reports an error; or
    the header counts more frames than the file has, or gives a longer duration and the reader reports an error.
Frames that are missing before the first or after the last usable frame leave no gap: a recording may begin between two
key frames, and end when the battery is empty.
"""

import bisect
import logging
from itertools import pairwise
from pathlib import Path
from statistics import median

import av
import av.logging

from common.errors import UserError

log = logging.getLogger(__name__)
logging.getLogger("libav").setLevel(logging.CRITICAL + 1)  # FFmpeg's errors are counted, not printed
av.logging.set_level(av.logging.ERROR)

GAP = 1.75             # smallest distance of two frames with a frame missing in between, in units of the usual one
REGULAR = 0.25         # deviation from the usual distance of a regular frame, in units of it
REGULAR_SHARE = 0.9    # share of the distances that are regular in a video of constant rate
MIN_DISTANCES = 4      # distances that are needed to judge
MAX_DISTANCES = 100    # distances from the first frame on that decide what is usual
HEADER_FRAMES = 2      # frames that a header may count too many,
HEADER_SHARE = 0.02    # and as a share
LAST_FRAMES = 2        # frames without a result at the end of a file that was cut off
TIMED = ("mov", "matroska")  # formats whose times stay right if data is missing


class Losses:
    """Counts the lost frames of one video while it is decoded. Times are in units of the stream."""

    def __init__(self, path: Path, container, stream, start: int):
        self.path = path
        self.start = start
        self.header_frames = stream.frames
        self.timed = container.format.name.startswith(TIMED)
        self.duration_frames = 0  # by the header's duration
        if self.timed and container.duration and stream.average_rate:
            self.duration_frames = round(container.duration / av.time_base * stream.average_rate)
        self.errors_before = av.logging.get_last_error()[0]
        self.failed = 0                  # packets that could not be decoded
        self.packets = 0
        self.untimed = False             # whether the packets have no times, as in AVI; then only numbers are compared
        self.waiting: list[int] = []     # times of packets without a frame yet, ascending
        self.corrupt = 0                 # frames flagged as corrupt after the last usable frame
        self.times: list[int] = []       # of usable frames
        self.decoded = 0
        self.used = 0
        self.leading = 0                 # lost before the first usable frame
        self.gaps: list[tuple[int, int]] = []  # (number of the usable frame after it, lost frames), from `start` on
        self.lost = 0                    # in all gaps

    @property
    def reported(self) -> bool:
        """Whether FFmpeg has reported an error since this file was opened."""
        return self.failed > 0 or av.logging.get_last_error()[0] > self.errors_before

    def add_packet(self, packet: av.Packet) -> None:
        """Note the data of a frame."""
        if packet.size:
            self.packets += 1
            if packet.pts is None:
                self.untimed = True
            elif not packet.is_discard:
                bisect.insort(self.waiting, packet.pts)

    def usable(self, frame: av.VideoFrame) -> bool:
        """Note a decoded frame. False if it is corrupt, and not to be used."""
        self.decoded += 1
        if self.untimed or frame.pts is None:
            self.waiting.clear()
        without_frame = bisect.bisect_left(self.waiting, frame.pts) if self.waiting else 0
        has_packet = self.waiting[without_frame:without_frame + 1] == [frame.pts]
        if frame.is_corrupt:
            self.corrupt += 1
            del self.waiting[without_frame:without_frame + has_packet]
            return False
        del self.waiting[:without_frame + has_packet]
        missing = without_frame if self.reported else 0
        if self.used == 0:
            self.leading = missing
            missing = 0
        lost = self.corrupt + missing
        if frame.pts is not None:
            lost = max(lost, self._skipped(frame.pts))
            self.times.append(frame.pts)
        self.lost += lost
        if lost and (self.used > self.start or self.used == self.start == 0):
            self.gaps.append((self.used, lost))
        self.corrupt = 0
        self.used += 1
        return True

    def _skipped(self, time: int) -> int:
        """Number of frames that the times skip before `time`."""
        if not self.reported or len(self.times) <= MIN_DISTANCES:
            return 0
        first = self.times[:MAX_DISTANCES]
        distances = [b - a for a, b in pairwise(first)]
        usual = median(distances)
        regular = sum(abs(distance - usual) <= REGULAR * usual for distance in distances)
        distance = time - self.times[-1]
        if usual <= 0 or regular < REGULAR_SHARE * len(distances) or distance < GAP * usual:
            return 0
        return round(distance / usual) - 1

    def at_end(self) -> tuple[int, int]:
        """After the last packet: frames lost at an unknown place, and frames lost at the end."""
        waiting = self.packets - self.decoded if self.untimed else len(self.waiting)
        trailing = self.corrupt + (max(waiting, 0) if self.reported else 0)
        expected = self.header_frames
        if not expected and self.reported:
            expected = self.duration_frames - sum(lost for _, lost in self.gaps)
        missing = expected - self.packets
        if missing <= max(HEADER_FRAMES, HEADER_SHARE * expected):
            missing = 0
        unknown = 0 if self.timed else missing
        trailing += missing if self.timed else 0
        if not missing and trailing > LAST_FRAMES:  # the data is there, so the file was not cut off
            return unknown + trailing, 0
        return unknown, trailing

    def check(self, finished: bool, allow_gaps: bool) -> None:
        """UserError if there are gaps, unless they are allowed; otherwise log what is lost, if anything.

        finished: all packets were read"""
        unknown, trailing = self.at_end() if finished and self.used else (0, 0)
        lost = sum(number for _, number in self.gaps) + unknown
        if lost and not allow_gaps:
            where = f", the first before frame {self.gaps[0][0]}" if self.gaps else ""
            total = lost + self.used + self.leading + trailing
            raise UserError(f"{self.path} is damaged: {lost} of {total} frames are missing or corrupt{where}; give an "
                            "undamaged file, or --allow_gaps to use the frames that are left")
        said = [(self.leading, "at the beginning"), (lost, "in between"), (trailing, "at the end")]
        found = ", ".join(f"{number} {where}" for number, where in said if number)
        if found:
            log.warning("%s is damaged: frames are missing or corrupt (%s); %d are left", self.path, found, self.used)
        elif self.reported and self.used:
            log.warning("%s is damaged: FFmpeg reports errors, some frames may be wrong or missing", self.path)
