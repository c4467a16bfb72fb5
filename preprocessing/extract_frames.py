"""From a video to the frames of a sequence folder."""

import logging
import shutil
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from common.errors import UserError
from common.files import write_bytes
from loaders.images import image_files
from loaders.sequence import VideoSequence, file_hash, open_sequence
from loaders.video import read_video

log = logging.getLogger(__name__)


def extract_frames(video: str, data_dir: Path, start: int = 0, stop: int | None = None, stride: int = 1,
                   max_frames: int | None = None, resize: tuple[int, int] | None = None,
                   short_side: int | None = None) -> VideoSequence:
    """Decode `video` (file or image folder) into `data_dir`/color as PNG files; the folder appears when it is complete.

    resize: (H, W); short_side: pixels, aspect kept. Frames that are there already are kept if they are the same.
    UserError if the video cannot be read, has one frame only or frames of different sizes, or if other frames are
    there already, or if the folder cannot be made."""
    color, partial = data_dir / "color", data_dir / "color.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial} cannot be made ({error.strerror}): give another --data_dir") from error
    try:
        count, size = 0, None
        for count, frame in enumerate(islice(read_video(video, start, stop, stride), max_frames), 1):
            size = size or frame.shape
            if frame.shape != size:
                raise UserError(f"frames of different sizes in {video}: the first is {size[1]}x{size[0]}, frame "
                                f"{start + (count - 1) * stride} is {frame.shape[1]}x{frame.shape[0]}")
            image = _resized(frame, resize, short_side)
            write_bytes(partial / f"{count - 1:05d}.png",
                        cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes())
        if count == 1:
            raise UserError(f"{video} gives one frame: tracking needs at least two, change --start, --stop or --stride")
        if not image_files(color):
            shutil.rmtree(color, ignore_errors=True)
            partial.replace(color)
        elif _contents(color) != _contents(partial):
            raise UserError(f"{color} already has other frames than these of {video}: give another --data_dir, or "
                            "remove that folder, or leave out --video to use its frames")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sequence = open_sequence(data_dir, num_imgs=None)
    log.info("%d frames of %dx%d in %s", len(sequence), sequence.size[1], sequence.size[0], color)
    return sequence


def _resized(frame: np.ndarray, resize: tuple[int, int] | None, short_side: int | None) -> np.ndarray:
    H, W = frame.shape[:2]
    if short_side:
        zoom = short_side / min(H, W)
        resize = round(H * zoom), round(W * zoom)
    if not resize or tuple(resize) == (H, W):
        return frame
    shrinks = resize[0] * resize[1] < H * W
    return cv2.resize(frame, (resize[1], resize[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _contents(folder: Path) -> list[tuple[str, str]]:
    return [(path.name, file_hash(path)) for path in image_files(folder)]
