"""Where the frames of a sequence come from: video.json, and the maps between frames and source.

Notation
    T, H, W  frames of the sequence, their height and width
    source   the video that was preprocessed, upright: the rotation in its metadata is applied
    number   frame number in the source, from 0 on
    size     (H, W), pixels
    point    (x, y) in pixels, x right, y down; pixel centers are at integers, in the frames and in the source

A frame is a resized source frame, so x_source = (x + 0.5) * W_source / W - 0.5, and y likewise. Frame t of the sequence
is frame numbers[t] of the source. Without video.json, the frames count as their own source.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import read_json, write_json
from loaders.images import image_files, size_text
from loaders.sequence import VideoSequence

FILE_NAME = "video.json"
MAX_SIDE = 1 << 20    # pixels
MAX_NUMBER = 1 << 31  # of a frame
HASH_BYTES = 1 << 24  # bytes that are read at a time
ADVICE = "remove it, or preprocess the video again to another --data_dir"


@dataclass(frozen=True)
class SourceFrames:
    """The source of T frames."""
    size: tuple[int, int]             # of the frames
    source_size: tuple[int, int]      # of the source's frames
    numbers: np.ndarray = field(compare=False)  # (T,) int64, ascending: source frame number of each frame
    frame_rate: float | None = None   # of the source, frames per second; None: not known
    name: str = ""                    # file name of the source
    known: bool = True                # False: the source is not known; the frames stand for it

    @property
    def is_the_sequence(self) -> bool:
        """Whether source and frames have the same pixels and frame numbers."""
        return self.size == self.source_size and np.array_equal(self.numbers, np.arange(len(self.numbers)))

    def fits(self, size: tuple[int, int]) -> bool:
        """Whether `size` has the aspect ratio of the frames or of the source."""
        return same_aspect(size, self.size) or same_aspect(size, self.source_size)

    def indices(self, numbers: np.ndarray) -> np.ndarray | None:
        """Frames of the sequence that have the source frame numbers `numbers`; None if it lacks one of them."""
        found = np.searchsorted(self.numbers, numbers).clip(0, len(self.numbers) - 1)
        return found if np.array_equal(self.numbers[found], numbers) else None

    def numbers_text(self) -> str:
        """Text for the source frame numbers: `3, 5, ..., 15`."""
        numbers = self.numbers.tolist()
        shown = numbers if len(numbers) < 5 else [*numbers[:2], "...", numbers[-1]]
        return ", ".join(map(str, shown))

    def __str__(self) -> str:
        return f"{size_text(self.source_size)}, frames {self.numbers_text()}"


def source_of(sequence: VideoSequence) -> SourceFrames:
    """The source of a sequence's frames, from its video.json; without this file, the sequence itself.

    UserError if the file is damaged or describes other frames."""
    path = sequence.root / FILE_NAME
    if not path.is_file():
        return own_source(sequence.size, len(sequence))
    entries = read_json(path, ADVICE)
    frames = entries.get("frames")
    rate = entries.get("frame_rate")
    if not isinstance(frames, dict) or not _is_size(entries.get("size")) or not _is_size(frames.get("size")) or not (
            rate is None or (isinstance(rate, int | float) and 0 < rate < MAX_NUMBER)):
        raise UserError(f"{path} is damaged: {ADVICE}")
    names = frames.get("names")
    numbers = frames.get("numbers")
    if not (_is_list(names, str) and _is_list(numbers, int) and len(names) == len(numbers)
            and all(0 <= number < MAX_NUMBER for number in numbers)):
        raise UserError(f"{path} is damaged: {ADVICE}")
    of_name = dict(zip(names, numbers, strict=True))
    used = [of_name.get(name) for name in sequence.names]
    if tuple(frames["size"]) != sequence.size or None in used or sorted(set(used)) != used:
        raise UserError(f"{path} describes other frames than those in {sequence.root / 'color'}: {ADVICE}")
    name = entries.get("video")
    return SourceFrames(sequence.size, tuple(entries["size"]), np.array(used, np.int64), rate,
                        Path(" ".join(name.split())).name if isinstance(name, str) else "")


def own_source(size: tuple[int, int], num_frames: int) -> SourceFrames:
    """The source of frames whose video is not known: the frames themselves."""
    return SourceFrames(size, size, np.arange(num_frames), known=False)


def write_source(folder: Path, source: SourceFrames, names: list[str], times: list[float | None],
                 others: dict) -> None:
    """Write video.json to a sequence folder.

    names, times: file name of each frame, and its time in the source in seconds (None: not known)
    others: further entries, which no reader needs"""
    write_json(folder / FILE_NAME, {
        "video": source.name, **others, "size": list(source.source_size), "frame_rate": source.frame_rate,
        "frames": {"size": list(source.size), "names": names, "numbers": source.numbers.tolist(), "times": times}})


def content_hash(video: Path) -> str:
    """Hash of the contents of a video file, or of the images in a folder, 32 hexadecimal digits."""
    out = hashlib.blake2b(digest_size=16)
    for path in image_files(video) if video.is_dir() else [video]:
        with open(path, "rb") as file:
            while part := file.read(HASH_BYTES):
                out.update(part)
    return out.hexdigest()


def is_made_from(folder: Path, video: Path) -> bool:
    """Whether the video.json of a sequence folder names the content of `video`. UserError if it is missing or damaged.
    """
    return read_json(folder / FILE_NAME, ADVICE).get("hash") == content_hash(video)


def same_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (H, W) have the same aspect ratio, up to the rounding of one side to whole pixels."""
    small, large = sorted([size, other])
    return abs(small[0] * large[1] / large[0] - small[1]) <= 1 or abs(small[1] * large[0] / large[1] - small[0]) <= 1


def resize_points(points: np.ndarray, size: tuple[int, int], new_size: tuple[int, int]) -> np.ndarray:
    """Points `(..., 2)` in frames of `size`, transformed to the frames resized to `new_size`, float32.

    The outer edges of the frame, half a pixel beyond the border pixels' centers, are mapped to the outer edges."""
    scale = np.array([new_size[1] / size[1], new_size[0] / size[0]])
    return ((points + 0.5) * scale - 0.5).astype(np.float32)


def resize_queries(queries: np.ndarray, size: tuple[int, int], new_size: tuple[int, int]) -> np.ndarray:
    """Query points `(M, 3)` in frames of `size`, transformed to the frames resized to `new_size`, float32."""
    points = resize_points(queries[:, :0:-1], size, new_size)
    return np.concatenate([queries[:, :1], points[:, ::-1]], axis=1).astype(np.float32)


def _is_size(value: object) -> bool:
    return _is_list(value, int) and len(value) == 2 and all(0 < side < MAX_SIDE for side in value)


def _is_list(value: object, kind: type) -> bool:
    """Whether `value` is a list of `kind`; True and False do not count as int."""
    return isinstance(value, list) and all(type(item) is kind for item in value)
