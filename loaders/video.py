"""Reading of videos and folders of images; writing of H.264 and GIF. Frames are (H, W, 3) uint8 RGB."""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import chain, islice
from math import atan2, degrees
from pathlib import Path

import av  # imageio's reader returns frames without the display matrix (rotation, mirroring)
import imageio.v3 as iio
import numpy as np
from PIL import Image

from common.errors import UserError
from common.files import MAX_PIXELS, write_bytes
from loaders.deep_images import ValueRange, clip_range, sample
from loaders.images import check_pixels, find_range, image_files, no_images, read_image
from loaders.video_damage import Losses

MAX_FAILED = 100_000  # packets; a reader that fails again and again could go on forever
# self-contained formats; other FFmpeg formats (concat, hls, ...) can make it open other files and network addresses
CONTAINERS = "mov,matroska,avi,mpeg,mpegts,ogg,gif,flv,asf,mxf,yuv4mpegpipe"


@dataclass
class VideoFacts:
    """What `read_video` finds out about a video while it reads it."""
    frame_rate: float | None = None  # frames per second, on average; None: not known
    rotation: int = 0                # degrees clockwise, from the stored frames to the upright ones
    mirrored: bool = False           # whether upright frames are also mirror images of the stored ones
    time: float | None = None        # of the frame that was decoded last, seconds; None: not known
    lost: int = 0                    # frames that were lost in gaps before it
    # of every frame that was yielded:
    numbers: list[int] = field(default_factory=list)         # frame number in the source; lost frames count
    times: list[float | None] = field(default_factory=list)  # seconds


def read_video(path: str | Path, start: int = 0, stop: int | None = None, stride: int = 1,
               max_pixels: int = MAX_PIXELS, facts: VideoFacts | None = None,
               values: ValueRange | None = None, allow_gaps: bool = False) -> Iterator[np.ndarray]:
    """Yields frames start, start + stride, ..., before `stop`, of a video file or of a folder's images.

    The rotation or mirroring in the file's metadata is applied. Frames are counted, not timed: a variable frame rate is
    ignored. Frames that the decoder flags as corrupt are left out and not counted. `facts` is filled in. `values` maps
    values of more than 8 bits; without it, `find_video_range` is called. UserError if the file is missing or cannot be
    decoded, a frame is larger than `max_pixels`, the range has no frame, or, unless `allow_gaps`, frames are missing
    between those of the range (loaders/video_damage.py)."""
    path = Path(path)
    facts = facts or VideoFacts()
    if not path.exists():
        raise UserError(f"no video {path}: give a video file or a folder of images")
    if path.is_dir():
        files = image_files(path)
        if not files:
            raise no_images(path)
        values = values or find_range(files[start:stop:stride], max_pixels)
        frames = (read_image(file, max_pixels, values) for file in files)
    else:
        values = values or find_video_range(path, start, stop, stride, max_pixels)
        frames = _decode(path, max_pixels, facts, partial(_as_bytes, values=values), start, allow_gaps)
    yielded = False
    decoded = 0
    for number, frame in enumerate(islice(frames, stop)):
        decoded += 1
        if number >= start and (number - start) % stride == 0:
            yielded = True
            facts.numbers.append(number + facts.lost)
            facts.times.append(facts.time)
            yield frame
    if decoded == 0 and stop != 0:
        raise UserError(f"no frame of {path} can be decoded: it is damaged or has no key frame, give another video")
    if not yielded:
        raise UserError(f"{path} has {decoded} frames, none in the range {start} to "
                        f"{'the end' if stop is None else stop}: change --start and --stop, or give another video")


def clip_header(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, tuple[int, int]]:
    """Number of frames and their size (H, W) of a video file or a folder of images, as the file names them, before a
    rotation; 0 frames if it does not say. UserError if it cannot be opened."""
    path = Path(path)
    if path.is_dir():
        first = next(read_video(path, stop=1, max_pixels=max_pixels))
        return len(image_files(path)), first.shape[:2]
    if not path.exists():
        raise UserError(f"no video {path}: give a video file or a folder of images")
    within = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise UserError(f"{path} is empty: give a video file or a folder of images")
        with av.open(f"file:{path}", container_options=within, metadata_errors="replace") as container:
            stream = container.streams.video[0]
            seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
            count = stream.frames or round(seconds * float(stream.average_rate or 0))
            return max(count, 0), (stream.codec_context.height, stream.codec_context.width)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: its permissions do not allow it") from error
    except Exception as error:  # a damaged file can raise any exception in PyAV
        raise UserError(f"{path} cannot be opened as a video (it is damaged, incomplete, or something else): give a "
                        "video file or a folder of images") from error


def find_video_range(path: str | Path, start: int = 0, stop: int | None = None, stride: int = 1,
                     max_pixels: int = MAX_PIXELS, fixed: tuple[float, float] | None = None) -> ValueRange | None:
    """The range of the values of a clip, from the frames that `read_video` yields; None if they have at most 8 bits.

    Video in YUV counts as 8 bits up to 12 bits, because FFmpeg maps it to the RGB that it stands for.
    fixed: (low, high) to use instead of the clip's percentiles. UserError as in `read_video`"""
    path = Path(path)
    if path.is_dir():
        return find_range(image_files(path)[start:stop:stride], max_pixels, fixed)
    pixel_format = _pixel_format(path)
    bits = pixel_format.components[0].bits if pixel_format else 8
    if not pixel_format or not _is_deep(pixel_format):
        return None
    if fixed:
        return clip_range([np.ones(1, np.float32 if bits == 32 else np.uint16)], fixed, bits)
    frames = islice(_decode(path, max_pixels, VideoFacts(), _counts, start, allow_gaps=True), start, stop, stride)
    return clip_range([sample(frame) for frame in frames], None, bits if pixel_format.name.startswith("gray") else 16)


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float = 10) -> None:
    """Write frames `(H, W, 3)` uint8 of equal size as MP4: H.264 in yuv420p at the default quality, for most players.

    Odd widths or heights are padded by a copy of the last column or row. UserError if there is no frame."""
    frames = _at_least_one(frames, path)
    encoded = io.BytesIO()
    with av.open(encoded, "w", format="mp4") as container:
        stream = container.add_stream("libx264", Fraction(fps).limit_denominator(65_535), {"preset": "fast"})
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            H, W = frame.shape[:2]
            if not stream.codec_context.is_open:
                stream.height, stream.width = H + H % 2, W + W % 2
            padded = np.pad(frame, ((0, H % 2), (0, W % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(padded)))
        container.mux(stream.encode())
    write_bytes(path, encoded.getvalue())


def write_gif(path: str | Path, frames: Iterable[np.ndarray], fps: float = 10, longest_side: int = 640) -> None:
    """Write frames `(H, W, 3)` uint8 as a looping GIF, downscaled to at most `longest_side` pixels on the longest side.

    UserError if there is no frame."""
    frames = _at_least_one(frames, path)
    encoded = io.BytesIO()
    with iio.imopen(encoded, "w", plugin="pillow", extension=".gif") as file:
        for frame in frames:
            image = Image.fromarray(frame)
            image.thumbnail((longest_side, longest_side))
            file.write(np.asarray(image), is_batch=False, bits=8, duration=round(1000 / fps), loop=0)
    write_bytes(path, encoded.getvalue())


def _at_least_one(frames: Iterable[np.ndarray], path: str | Path) -> Iterator[np.ndarray]:
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise UserError(f"no frames to write to {path}")
    return chain([first], frames)


def _pixel_format(path: Path) -> av.VideoFormat | None:
    """The pixel format of a video; None if it cannot be opened; `_decode` then raises the error."""
    within = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        with av.open(f"file:{path}", container_options=within, metadata_errors="replace") as container:
            return container.streams.video[0].codec_context.format
    except Exception:
        return None


def _is_deep(pixel_format: av.VideoFormat) -> bool:
    """Whether the values of a pixel format are counts of more than 8 bits."""
    bits = pixel_format.components[0].bits
    if pixel_format.is_rgb or pixel_format.name.startswith("gray"):
        return bits > 8
    return bits > 12


def _counts(frame: av.VideoFrame) -> np.ndarray:
    """The values of a frame `(H, W, 1)`, or `(H, W, 3)` RGB of 16 bits or float32."""
    name = frame.format.name
    if name.startswith("gray"):
        return frame.to_ndarray(format=name.removesuffix("be").removesuffix("le") + "le")[..., None]
    if frame.format.components[0].bits == 32:
        return frame.to_ndarray(format="gbrpf32le")
    return frame.to_ndarray(format="rgb48le")


def _as_bytes(frame: av.VideoFrame, values: ValueRange | None) -> np.ndarray:
    """A frame as `(H, W, 3)` uint8 RGB."""
    if values is None or values.whole or not _is_deep(frame.format):
        return frame.to_ndarray(format="rgb24")
    return values.to_bytes(_counts(frame))


def _decode(path: Path, max_pixels: int, facts: VideoFacts,
            convert: Callable[[av.VideoFrame], np.ndarray], start: int, allow_gaps: bool) -> Iterator[np.ndarray]:
    """All usable frames, as `convert` returns them. Other arguments and errors as `read_video`."""
    within = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        with av.open(f"file:{path}", container_options=within, metadata_errors="replace") as container:
            if not container.streams.video:
                raise UserError(f"{path} has no picture track: give a video file or a folder of images")
            stream = container.streams.video[0]
            check_pixels(stream.codec_context.height, stream.codec_context.width, path, max_pixels)
            # The frame size may change in the stream. Decoders round it up to whole blocks, hence the margin.
            stream.codec_context.options = {"max_pixels": str(2 * max_pixels + 4096)}
            stream.thread_type = "SLICE"  # with frame threads, libavcodec may hang when a damaged file is left early
            facts.frame_rate = float(stream.average_rate) if stream.average_rate else None
            losses = Losses(path, container, stream, start)
            finished = False
            try:
                for frame in _frames(container, stream, losses):
                    check_pixels(frame.height, frame.width, path, max_pixels)
                    if losses.gaps and not allow_gaps:
                        continue  # the file is refused; the rest is only counted
                    facts.time = frame.time
                    facts.lost = losses.lost
                    yield _upright(frame, facts, convert)
                finished = True
            except GeneratorExit:
                losses.check(False, True)
                raise
            losses.check(finished, allow_gaps)
    except UserError:
        raise
    except Exception as error:  # errors of FFmpeg; a damaged file can raise any exception in PyAV
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path} cannot be decoded as a video ({' '.join(why.split())[:160]}): give another") from error


def _frames(container, stream, losses: Losses) -> Iterator[av.VideoFrame]:
    """The usable frames of a stream. What cannot be decoded is noted in `losses`.

    FFmpeg's error is raised if nothing can be decoded."""
    error = None
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                break
            losses.add_packet(packet)
            decoded = packet.decode()
        except av.error.FFmpegError as raised:
            error = error or raised
            losses.failed += 1
            if losses.failed > MAX_FAILED:
                break
            continue
        yield from filter(losses.usable, decoded)
    if error is not None and losses.used == 0:
        raise error


def _upright(frame: av.VideoFrame, facts: VideoFacts, convert: Callable[[av.VideoFrame], np.ndarray]) -> np.ndarray:
    """Apply the display matrix of the file to a frame: it maps (x, y) to (a x + c y, b x + d y)."""
    image, matrix = convert(frame), frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        (a, b, _), (c, d, _), _ = np.frombuffer(matrix, np.int32).reshape(3, 3).tolist()
        facts.rotation = round(degrees(atan2(b, a))) % 360
        facts.mirrored = a * d - b * c < 0
        if abs(a) < abs(c):  # a quarter turn
            image, a, d = image.transpose(1, 0, 2), c, b
        image = image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(image)
