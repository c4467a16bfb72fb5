"""Decode a video into the frames of a sequence folder, and write there where they come from."""

import logging
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path

import cv2
import numpy as np

from common.errors import UserError
from common.files import MAX_PIXELS, write_bytes
from loaders.deep_images import ValueRange
from loaders.images import encode_image, find_range, first_missing, image_files, read_image, size_text, write_png
from loaders.sequence import FLOW_FRAMES, VALUES, VALUES_ADVICE, VideoSequence, open_sequence, save_values
from loaders.source_frames import SourceFrames, content_hash, write_source
from loaders.video import VideoFacts, find_video_range, read_video

log = logging.getLogger(__name__)
FLOW_SIDE = 512  # pixels of the shorter side of flow frames, at most; DIS sees adjacent frames at this size
FLOW_QUALITY = 95  # of flow frames, which are JPEG files
MIN_SIDE = 16  # pixels; smaller frames have too few pixels for optical flow and features
WRITERS = 2    # threads that resize and write frames while the next ones are decoded


def extract_frames(video: str, data_dir: Path, start: int = 0, stop: int | None = None, stride: int = 1,
                   max_frames: int | None = None, resize: tuple[int, int] | None = None,
                   short_side: int | None = None, max_pixels: int = MAX_PIXELS,
                   value_range: tuple[float, float] | None = None, allow_gaps: bool = False,
                   flow_frames: bool = True) -> VideoSequence:
    """Decode `video` (a file or a folder of images) into `data_dir`/color as PNG files, and write video.json.

    Values of more than 8 bits are mapped to 8 bits, the same way in all frames, and values.json says how.

    start, stop, stride: which frames to take, as in range(); stop None: to the end
    max_frames:          largest number of frames
    resize:              frame size (H, W)
    short_side:          pixels of the frames' shorter side, keeping the aspect ratio
    max_pixels:          largest number of pixels of a frame that is decoded
    value_range:         values of more than 8 bits that become black and white; None: percentiles of the clip
    allow_gaps:          accept a damaged video that lacks frames in between
    flow_frames:         where frames have fewer pixels than the video, also write flow_frames/ (`write_flow_frame`)
    The folder is created only when all frames are written. If it exists, it must have the same frames.
    UserError if the video cannot be read, has a single frame or frames of different sizes, if the folder has other
    frames or other files, or if it cannot be created."""
    color = data_dir / "color"
    _check_replaceable(color)
    partial = data_dir / "color.partial"
    partial_flow = data_dir / f"{FLOW_FRAMES}.partial"
    for folder in (partial, partial_flow):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial} cannot be created ({error.strerror}): give another --data_dir") from error
    facts = VideoFacts()
    last = min(n for n in (stop, max_frames and start + max_frames * stride, sys.maxsize) if n is not None)
    try:
        values = find_video_range(video, start, last, stride, max_pixels, value_range)
        say_values(values, video, value_range)
        if Path(video).is_dir():
            say_missing(video, image_files(Path(video))[start:last])
        frames = read_video(video, start, stop, stride, max_pixels, facts, values, allow_gaps)
        numbered = zip(count(start, stride), islice(frames, max_frames), strict=False)
        source_size = _write_frames(numbered, video, partial, partial_flow if flow_frames else None,
                                    lambda frame: _resized(frame, resize, short_side))
        if len(image_files(partial)) == 1:
            raise UserError(f"{video} gives one frame: tracking needs at least two, change --start, --stop or --stride")
        if not image_files(color):
            _move_into_place(partial, partial_flow, data_dir)
        elif not _same_images(color, partial, max_pixels):
            raise UserError(f"{color} already has other frames than {video}: give another --data_dir, or remove that "
                            "folder, or leave out --video to use its frames")
    finally:
        for folder in (partial, partial_flow):
            shutil.rmtree(folder, ignore_errors=True)
    save_values(data_dir, values)
    sequence = open_sequence(data_dir, None, max_pixels)
    source = SourceFrames(sequence.size, source_size, np.array(facts.numbers), facts.frame_rate,
                          Path(video).resolve().name)
    _write_source(sequence, source, facts, Path(video), {"start": start, "stride": stride})
    if flow_frames:
        say_without_flow_frames(data_dir, source_size, sequence.size)
    log.info("%d frames of %dx%d in %s", len(sequence), sequence.size[1], sequence.size[0], color)
    return sequence


def _write_frames(frames: Iterable[tuple[int, np.ndarray]], video: str, folder: Path, flow_folder: Path | None,
                  resize: Callable[[np.ndarray], np.ndarray]) -> tuple[int, int] | None:
    """Write the resized frames to `folder`, and flow frames to `flow_folder`, unless that is None.

    frames: each with its number in the video. Returns the size (H, W) of the video's frames, None without frames.
    UserError if they differ in size, or are too small."""
    def write(t: int, frame: np.ndarray) -> None:
        resized = resize(frame)
        check_sides(resized.shape[:2], video)
        write_png(folder / f"{t:05d}.png", resized)
        if flow_folder is not None:
            write_flow_frame(flow_folder / f"{t:05d}.jpg", frame, resized.shape[:2])

    shape = None
    with ThreadPoolExecutor(WRITERS) as pool:
        waiting = deque()
        for t, (number, frame) in enumerate(frames):
            shape = shape or frame.shape
            if frame.shape != shape:
                raise UserError(f"frames of different sizes in {video}: the first is {size_text(shape[:2])}, frame "
                                f"{number} is {size_text(frame.shape[:2])}")
            waiting.append(pool.submit(write, t, frame))
            if len(waiting) > WRITERS:  # few frames are in memory at a time
                waiting.popleft().result()
        for task in waiting:
            task.result()
    return shape and shape[:2]


def _check_replaceable(color: Path) -> None:
    """UserError if the folder `color` has files, but no images: it would be replaced."""
    if color.is_dir() and not image_files(color):
        files = [path.name for path in color.iterdir() if not path.name.startswith(".")]
        if files:
            raise UserError(f"{color} has {min(files)}, but no images: give another --data_dir, or move its files")


def _move_into_place(partial: Path, partial_flow: Path, data_dir: Path) -> None:
    """Make the written folders those of the sequence. The frames come last: without them, all is written again."""
    color = data_dir / "color"
    shutil.rmtree(color, ignore_errors=True)
    shutil.rmtree(data_dir / FLOW_FRAMES, ignore_errors=True)
    if partial_flow.is_dir():
        partial_flow.replace(data_dir / FLOW_FRAMES)
    partial.replace(color)


def write_flow_frame(path: Path, frame: np.ndarray, size: tuple[int, int]) -> None:
    """Write a frame of the video `(H', W', 3)` uint8 RGB for optical flow, at `flow_frame_size`, if that is not None.

    size: (H, W) of the sequence's frames"""
    wanted = flow_frame_size(frame.shape[:2], size)
    if wanted:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, encode_image(_resized(frame, wanted, None), ".jpg", quality=FLOW_QUALITY))


def flow_frame_size(source_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int] | None:
    """Size of the flow frames of a video with frames of `source_size`, whose shorter side has at most FLOW_SIDE pixels.
    None if they would have no more pixels than the sequence's frames of `size`, all (H, W)."""
    zoom = min(1, FLOW_SIDE / min(source_size))
    height, width = (round(side * zoom) for side in source_size)
    return (height, width) if height * width > size[0] * size[1] else None


def say_without_flow_frames(data_dir: Path, source_size: tuple[int, int], size: tuple[int, int]) -> None:
    """Say that a sequence folder lacks the flow frames that it would get now: it is older than these, or was made with
    --no-flow_frames. Arguments as of `flow_frame_size`."""
    if flow_frame_size(source_size, size) and not image_files(data_dir / FLOW_FRAMES):
        log.info("%s was made without flow_frames/: flow is computed from its frames", data_dir)


def say_values(values: ValueRange | None, where: object, value_range: tuple[float, float] | None) -> None:
    """Say how values of more than 8 bits become frames. UserError for a `value_range` of frames of 8 bits."""
    if values is not None:
        log.info("%s has %s", where, values)
    elif value_range:
        raise UserError(f"--value_range is for frames of more than 8 bits per value, and {where} has 8: leave it out")


def say_missing(where: object, files: list[Path]) -> None:
    """Warn if the numbers in the names of the images `files` of the folder `where` have a gap."""
    number = first_missing(files)
    if number is not None:
        log.warning("%s lacks images: %d is the first number that is missing; frames are counted without it", where,
                    number)


def use_color(data_dir: Path, max_pixels: int, value_range: tuple[float, float] | None) -> VideoSequence:
    """Open the sequence whose frames the user put into `data_dir`/color. If they have more than 8 bits per value,
    values.json is written. Arguments as of `extract_frames`.

    UserError as of `open_sequence`, or if values.json has another range than `value_range`."""
    sequence = open_sequence(data_dir, None, max_pixels)
    check_sides(sequence.size, sequence.root / "color")
    say_missing(sequence.root / "color", image_files(sequence.root / "color"))
    values = sequence.values
    if values is not None and value_range:
        values = find_range(image_files(data_dir / "color"), max_pixels, value_range)
        if (data_dir / VALUES).is_file() and values != sequence.values:
            raise UserError(f"{data_dir / VALUES} has another range than --value_range: {VALUES_ADVICE}")
    say_values(values, sequence.root / "color", value_range)
    if values is None:
        return sequence
    save_values(data_dir, values)
    return open_sequence(data_dir, None, max_pixels)


def check_sides(size: tuple[int, int], where: object) -> None:
    """UserError if a side of frames of `size` (H, W) is shorter than MIN_SIDE; `where` names them in the message."""
    if min(size) < MIN_SIDE:
        raise UserError(f"frames of {where} have {size_text(size)} pixels: each side must have at least {MIN_SIDE}, "
                        "enlarge them (with --video: --resize H W or --short_side N)")


def _write_source(sequence: VideoSequence, source: SourceFrames, facts: VideoFacts, video: Path, chosen: dict) -> None:
    """Write video.json. `chosen` are the options that selected the frames."""
    names = list(sequence.names)
    others = chosen | {"hash": content_hash(video), "rotation": facts.rotation, "mirrored": facts.mirrored}
    write_source(sequence.root, source, names, facts.times, others)


def _resized(frame: np.ndarray, size: tuple[int, int] | None, short_side: int | None) -> np.ndarray:
    """The frame at `size` (H, W), or with a shorter side of `short_side` pixels; unchanged if both are None."""
    H, W = frame.shape[:2]
    if short_side:
        zoom = short_side / min(H, W)
        size = round(H * zoom), round(W * zoom)
    if not size or tuple(size) == (H, W):
        return frame
    shrinks = size[0] * size[1] < H * W
    return cv2.resize(frame, (size[1], size[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _same_images(folder: Path, other: Path, max_pixels: int) -> bool:
    """Whether two folders have images of the same names and pixels; the files may be compressed differently."""
    files = image_files(folder)
    others = image_files(other)
    if [file.name for file in files] != [file.name for file in others]:
        return False
    images = ([read_image(file, max_pixels) for file in pair] for pair in zip(files, others, strict=True))
    return all(np.array_equal(a, b) for a, b in images)
