"""Frames and masks of a sequence folder (docs/method.md).

Notation
    T, H, W  frames, height, width
    frame    (H, W, 3) uint8 RGB
    pixel    (x, y), x right, y down, pixel centers at integers
"""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from common.errors import UserError
from common.files import MAX_PIXELS, read_json, write_json
from loaders.deep_images import ValueRange
from loaders.images import deep_header, find_range, image_files, no_images, read_image, read_mask, read_masks, size_text

log = logging.getLogger(__name__)
VALUES = "values.json"   # in the sequence folder: how values of more than 8 bits become frames
WHOLE = [2**bits - 1 for bits in range(9, 17)]  # values.json: `high` where the upper 8 bits are used
VALUES_ADVICE = "delete it and the sequence's correspondences, and run `python -m preprocessing` again"
FLOW_FRAMES = "flow_frames"  # in the sequence folder: the frames at a higher resolution
FLOW_FRAMES_ADVICE = "remove that folder, preprocess the video again to another --data_dir, or give --no-flow_frames"
THUMBNAIL = 16         # pixels a side at which a flow frame is compared with its frame
MAX_DIFFERENCE = 8     # gray levels: mean difference of the two thumbnails, at most
CACHE_BYTES = 1 << 29  # bytes; larger sequences are decoded at each access, to limit the memory of preprocessing


@dataclass(frozen=True)
class VideoSequence:
    """The frames in `root`/color, in natural order of names; `size` is (H, W) in pixels."""
    root: Path
    names: tuple[str, ...]
    size: tuple[int, int]
    max_pixels: int = field(default=MAX_PIXELS, repr=False, compare=False)  # larger images are refused
    values: ValueRange | None = field(default=None, repr=False, compare=False)  # of frames of more than 8 bits
    decoded: np.ndarray | None = field(default=None, repr=False, compare=False)  # (T, H, W, 3), if within CACHE_BYTES

    def __len__(self) -> int:
        return len(self.names)

    def frame(self, i: int) -> np.ndarray:
        """Frame i `(H, W, 3)` uint8 RGB. UserError if its file cannot be read."""
        if self.decoded is not None:
            return self.decoded[i]
        return read_image(self.root / "color" / self.names[i], self.max_pixels, self.values)

    @cached_property
    def flow_frames(self) -> list[Path]:
        """The images of flow_frames/: the frames at a higher resolution, for optical flow. Empty without them.

        UserError if they are not of these frames: if a frame has no image of its name, or if the first or the last one
        shows another picture."""
        folder = self.root / FLOW_FRAMES
        by_stem = {path.stem: path for path in image_files(folder)}
        if not by_stem:
            return []
        if missing := [name for name in self.names if Path(name).stem not in by_stem]:
            raise UserError(f"{folder} has no image of frame {missing[0]}: {FLOW_FRAMES_ADVICE}")
        paths = [by_stem[Path(name).stem] for name in self.names]
        for i in {0, len(self) - 1}:
            if not _show_the_same(read_image(paths[i], self.max_pixels), self.frame(i)):
                raise UserError(f"{paths[i]} does not show the same as frame {self.names[i]}: {FLOW_FRAMES_ADVICE}")
        return paths

    def flow_frame(self, i: int) -> np.ndarray:
        """Frame i `(H', W', 3)` uint8 RGB as optical flow sees it: of flow_frames/ if there are any, else as `frame`.

        UserError if its file cannot be read, or has another size than the first."""
        if not self.flow_frames:
            return self.frame(i)
        image = read_image(self.flow_frames[i], self.max_pixels)
        if image.shape[:2] != self.flow_size:
            raise UserError(f"{self.flow_frames[i]} is {size_text(image.shape[:2])}, the first image there is "
                            f"{size_text(self.flow_size)}: {FLOW_FRAMES_ADVICE}")
        return image

    @cached_property
    def flow_frames_hash(self) -> str:
        """Content hash of all files of flow_frames/; empty if there are none."""
        return data_hash(path.read_bytes() for path in self.flow_frames) if self.flow_frames else ""

    @cached_property
    def flow_size(self) -> tuple[int, int]:
        """(H', W') of the flow frames, pixels."""
        return read_image(self.flow_frames[0], self.max_pixels).shape[:2] if self.flow_frames else self.size

    def frames(self) -> np.ndarray:
        """All frames `(T, H, W, 3)` uint8 RGB; if they are cached, each call returns the same array."""
        if self.decoded is not None:
            return self.decoded
        out = np.empty((len(self), *self.size, 3), np.uint8)
        for i in range(len(self)):
            out[i] = self.frame(i)
        return out

    def masks(self, label: int = 0) -> np.ndarray | None:
        """Foreground masks `(T, H, W)` bool: images in mask/, in natural order of names, one per frame.

        loaders/masks.py has the rule by which they are read. None if there are none.

        label: 0: every label above 0; else this label only
        UserError if there are fewer masks than frames, if one cannot be read, or if none has the label."""
        paths = image_files(self.root / "mask")[: len(self)]
        if not paths:
            return None
        if len(paths) != len(self):
            raise UserError(f"{self.root / 'mask'} has {len(paths)} masks for {len(self)} frames: "
                            "one mask a frame is needed, or none")
        return read_masks(paths, self.size, self.max_pixels, label)

    def mask(self, t: int, label: int = 0) -> np.ndarray | None:
        """Foreground mask `(H, W)` bool of frame t; None if there are no masks.

        mask/ has one image per frame, or fewer, of which one has the name of the frame, or a single one that has the
        name of no frame. UserError if there is no mask of frame t, if it cannot be read, or if it lacks the label."""
        paths = image_files(self.root / "mask")
        if not paths:
            return None
        stem = Path(self.names[t]).stem
        if len(paths) >= len(self):
            path = paths[t]
        elif named := [path for path in paths if path.stem == stem]:
            path = named[0]
        elif len(paths) == 1 and paths[0].stem not in {Path(name).stem for name in self.names}:
            path = paths[0]
        else:
            raise UserError(f"{self.root / 'mask'} has no mask of frame {t}: give one a frame, or one named {stem}.png")
        return read_mask(path, self.size, self.max_pixels, label)

    @cached_property
    def hashes(self) -> list[str]:
        """Content hash of each frame's file."""
        return [data_hash([(self.root / "color" / name).read_bytes()]) for name in self.names]


def open_sequence(data_dir: str | Path, num_imgs: int | None = 250,
                  max_pixels: int = MAX_PIXELS) -> VideoSequence:
    """Open the first `num_imgs` frames in `data_dir`/color; None: all frames. A message is logged if there are
    more.

    UserError if the folder is missing or empty, has one frame only, a damaged frame, a frame of more
    than `max_pixels`, or frames of different sizes."""
    root = Path(data_dir)
    color = root / "color"
    if not color.is_dir():
        raise UserError(f"no frames: there is no folder {color} (`python -m preprocessing --video ...` makes it)")
    files = image_files(color)
    paths = files[:num_imgs]
    if not paths:
        raise no_images(color)
    if len(paths) == 1:
        raise UserError(f"{color} has one frame only: tracking needs at least two")
    values = load_values(root, files, max_pixels)
    first = read_image(paths[0], max_pixels, values)
    size = first.shape[:2]
    if min(size) < 2:
        raise UserError(f"the frames in {color} are {size_text(size)}: they must have at least 2 pixels a side")
    frames = np.empty((len(paths), *size, 3), np.uint8) if len(paths) * first.nbytes <= CACHE_BYTES else None
    for i, path in enumerate(paths):  # every frame is decoded now, so that damage is reported early
        frame = read_image(path, max_pixels, values) if i else first
        if frame.shape[:2] != size:
            raise UserError(f"frames of different sizes in {color}: {paths[0].name} is {size_text(size)}, "
                            f"{path.name} is {size_text(frame.shape[:2])}")
        if frames is not None:
            frames[i] = frame
    if len(paths) < len(files):
        log.info("%s has %d frames: the first %d are used (--num_imgs %d)", color, len(files), num_imgs, num_imgs)
    return VideoSequence(root, tuple(path.name for path in paths), size, max_pixels, values, frames)


def load_values(root: Path, files: list[Path], max_pixels: int) -> ValueRange | None:
    """The range of the values of the frames `files`: that of values.json, or else that of all frames.

    None if they have at most 8 bits per value. UserError if values.json is damaged, or a frame cannot be read."""
    if all(deep_header(path) is None for path in files):
        return None
    path = root / VALUES
    if not path.is_file():
        return find_range(files, max_pixels)
    entries = read_json(path, VALUES_ADVICE)
    low = entries.get("low")
    high = entries.get("high")
    flags = [entries.get("curve"), entries.get("whole")]
    if not all(type(number) in (int, float) and abs(number) < 1e30 for number in (low, high)) or not low < high or not (
            all(type(flag) is bool for flag in flags)) or (flags[1] and high not in WHOLE):
        raise UserError(f"{path} is damaged: {VALUES_ADVICE}")
    return ValueRange(low, high, *flags)


def save_values(root: Path, values: ValueRange | None) -> None:
    """Write values.json, or remove it if `values` is None."""
    if values is None:
        (root / VALUES).unlink(missing_ok=True)
    else:
        write_json(root / VALUES, asdict(values))


def data_hash(parts: Iterable) -> str:
    """Hash of the concatenation of `parts`: bytes or contiguous arrays, 32 hexadecimal digits (BLAKE2b, 128 bits)."""
    out = hashlib.blake2b(digest_size=16)
    for part in parts:
        out.update(part)
    return out.hexdigest()


def _show_the_same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two images `(h, w, 3)` uint8 of any sizes are nearly the same as thumbnails."""
    size = (THUMBNAIL, THUMBNAIL)
    a, b = (cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.float32) for image in (a, b))
    return bool(np.abs(a - b).mean() <= MAX_DIFFERENCE)
