"""Images whose values have more than 8 bits: 16-bit and 32-bit counts, floating-point TIFF, OpenEXR.

Notation
    H, W    height, width
    values  (H, W) or (H, W, 3) RGB, as the file has them: unsigned or signed integers, or float32

The header is read first, so that a file is decoded only if its size is allowed. FFmpeg decodes OpenEXR, OpenCV other
color images, and Pillow grayscale ones (loaders/images.py).
"""

import struct
from dataclasses import dataclass
from typing import BinaryIO

import av
import cv2
import numpy as np

PNG_START = b"\x89PNG\r\n\x1a\n"
EXR_START = b"v/1\x01"
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
EXR_HEADER = 1 << 20  # bytes; largest header of an OpenEXR file that is read
FLOAT_SAMPLES = 3     # TIFF's tag SampleFormat
PALETTE = 3           # TIFF's tag PhotometricInterpretation
TAGS = {256: "width", 257: "height", 258: "bits", 262: "photometric", 277: "samples", 339: "format"}
TAG_TYPES = {3: "H", 4: "I", 16: "Q"}
MAX_TAGS = 4096
MAX_CHANNELS = 64

PERCENTILES = (0.1, 99.9)  # of the clip's values; shown as black and white
CORE = (2, 98)             # percentiles of the values without outliers, such as hot pixels and lamps
MIN_CORE_LEVELS = 1        # of the upper 8 bits that the core spans; fewer are noise
MAX_CORE_LEVELS = 32       # of the upper 8 bits; a core that spans more is shown with the whole range
EXPOSURE = 99.0            # percentile of linear light that is shown as white; lamps and highlights may be brighter
SAMPLES = 20_000           # values of a frame, about, that the percentiles are computed from
ENOUGH = 0.5               # share of the range of the bits; of a clip that spans as much the upper 8 bits are used


@dataclass(frozen=True)
class Header:
    """What is known of a file with more than 8 bits per value before it is decoded."""
    kind: str         # "png", "tiff" or "exr"
    height: int
    width: int
    largest: tuple[int, int]  # height and width that are decoded; OpenEXR has data outside of the picture
    gray: bool        # one channel, which Pillow reads
    wide: bool        # floating-point values, or integers of 32 bits
    layer: str = ""   # OpenEXR: layer of the color channels


@dataclass(frozen=True)
class ValueRange:
    """The map from the values of a clip to 8 bits, the same for all frames; `str` describes it."""
    low: float            # value that is shown as black
    high: float           # value that is shown as white
    curve: bool = False   # the values are linear light: sRGB's curve follows
    whole: bool = False   # the clip spans the range of its bits: only its upper 8 bits are taken

    def to_bytes(self, values: np.ndarray) -> np.ndarray:
        """Values `(H, W)` or `(H, W, 3)` as an image `(H, W, 3)` uint8 RGB. NaN is black."""
        if self.whole:
            out = (values.clip(0, self.high).astype(np.uint32) >> int(self.high).bit_length() - 8).astype(np.uint8)
            return as_rgb(out)
        precise = np.float64 if values.dtype.kind in "iu" and values.itemsize > 2 else np.float32
        share = (values.astype(precise) - self.low) / (self.high - self.low)
        share = np.nan_to_num(share, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
        if self.curve:
            share = srgb(share)
        return as_rgb(np.rint(share * 255).astype(np.uint8))

    def __str__(self) -> str:
        if self.whole:
            return "more than 8 bits per value: the upper 8 bits are used (--value_range A B sets black and white)"
        curve = ", through sRGB's curve" if self.curve else ""
        return (f"more than 8 bits per value: {self.low:.6g} is shown as black, {self.high:.6g} as white{curve} "
                "(--value_range A B sets them)")


def as_rgb(image: np.ndarray) -> np.ndarray:
    """An image `(H, W)`, `(H, W, 1)` or `(H, W, 3)` as `(H, W, 3)`."""
    if image.ndim == 2:
        image = image[..., None]
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def srgb(light: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] to sRGB's values in [0, 1] (IEC 61966-2-1)."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 0.0031308) ** (1 / 2.4) - 0.055)


def sample(values: np.ndarray) -> np.ndarray:
    """About SAMPLES of an image's values `(n,)`: finite ones and not 0, which often means that there is no value."""
    flat = values.ravel()
    flat = flat[:: max(flat.size // SAMPLES, 1) | 1]  # an odd step meets all columns and channels
    return flat[np.isfinite(flat) & (flat != 0)]


def clip_range(samples: list[np.ndarray], fixed: tuple[float, float] | None = None, bits: int = 16) -> ValueRange:
    """The range of a clip from the `sample`s of its frames.

    fixed: (low, high) to use instead of percentiles
    bits:  of the values, if they are integers
    Integers are mapped linearly. If their percentiles span the range of the bits only because of outliers, the range
    is that of the core; if they span it otherwise, only the upper 8 bits are taken. Floating-point values are linear
    light, unless they are far from 0 or negative, as temperatures are: these are mapped linearly."""
    values = np.concatenate(samples) if samples else np.zeros(0)
    if values.size == 0:
        values = np.array([0, 1])
    low, high = map(float, np.percentile(values, PERCENTILES))
    if high <= low:
        low, high = float(values.min()), float(values.max())
    light = values.dtype.kind == "f"
    if fixed:
        return ValueRange(*fixed, light and _is_light(*fixed))
    if light and _is_light(low, high):
        return ValueRange(0.0, float(np.percentile(values, EXPOSURE)), True)
    if not light and values.max() < 2**bits and high - low >= ENOUGH * (2**bits - 1):
        core = [float(value) for value in np.percentile(values, CORE)]
        if MIN_CORE_LEVELS <= (core[1] - core[0]) / 2 ** (bits - 8) <= MAX_CORE_LEVELS:
            return ValueRange(*core)
        return ValueRange(0.0, float(2**bits - 1), whole=True)
    return ValueRange(low, high if high > low else low + 1)


def _is_light(low: float, high: float) -> bool:
    return high > 0 and -high / 10 <= low <= high / 2


def read_header(file: BinaryIO) -> Header | None:
    """The header of an open image file; None if it is of another kind or has at most 8 bits per value."""
    start = file.read(26)
    try:
        if start.startswith(PNG_START) and len(start) == 26:
            width, height, depth, color = struct.unpack(">IIBB", start[16:26])
            return Header("png", height, width, (height, width), color == 0, False) if depth == 16 else None
        if start.startswith(EXR_START):
            file.seek(0)
            return _exr_header(file.read(EXR_HEADER))
        if start.startswith(TIFF_STARTS):
            return _tiff_header(file)
    except (ValueError, IndexError, KeyError, TypeError, struct.error, SyntaxError, OverflowError):
        return None  # the file is damaged; its reader says so
    return None


def decode(data: bytes, header: Header) -> tuple[np.ndarray, np.ndarray | None]:
    """Values of an encoded color image or OpenEXR file, and its alpha channel `(H, W)` of the same type, or None.

    OpenCV applies TIFF's orientation.
    ValueError, or an error of FFmpeg or OpenCV, if it cannot be decoded."""
    if header.kind == "exr":
        return _decode_exr(data, header)
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # damage is reported by the caller
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        cv2.utils.logging.setLogLevel(level)
    size = [header.height, header.width]
    if image is None or sorted(image.shape[:2]) != sorted(size) or image.dtype.kind not in "iuf":
        raise ValueError("not decoded")
    if image.dtype == np.float64:
        image = image.astype(np.float32)
    if image.ndim == 2:
        return image, None
    alpha = image[..., 3] if image.shape[2] == 4 else None
    if image.shape[2] not in (3, 4):
        raise ValueError("neither gray nor RGB")
    return image[..., 2::-1], alpha


def _decode_exr(data: bytes, header: Header) -> tuple[np.ndarray, np.ndarray | None]:
    """As `decode`, of the display window: what is outside of the data window is 0."""
    context = av.CodecContext.create("exr", "r")
    context.thread_count = 1
    context.options = {"layer": header.layer} if header.layer else {}
    frames = context.decode(av.Packet(data)) or context.decode(None)
    if not frames or (frames[0].height, frames[0].width) != (header.height, header.width):
        raise ValueError("not decoded")
    frame = frames[0]
    name = frame.format.name
    dtype = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2")}.get(name.removesuffix("le")[-3:])
    if dtype is None or not name.endswith("le"):
        raise ValueError(f"values of the kind {name}")
    planes = [np.frombuffer(plane, dtype).reshape(frame.height, -1)[:, : frame.width].astype(np.float32)
              for plane in frame.planes]
    if name.startswith("gbr"):
        green, blue, red, *alpha = planes
        return np.stack([red, green, blue], axis=-1), alpha[0] if alpha else None
    gray, *alpha = planes
    return gray, alpha[0] if alpha else None


def _exr_header(data: bytes) -> Header:
    """Parse the attributes of an OpenEXR file (its first part): size of the display window, channels."""
    at = 8
    entries = {}
    while data[at] != 0:
        name, at = _text(data, at)
        _, at = _text(data, at)
        size = struct.unpack_from("<I", data, at)[0]
        entries[name] = data[at + 4: at + 4 + size]
        at += 4 + size
    left, top, right, bottom = struct.unpack("<4i", entries["displayWindow"])
    if not (0 <= right - left < 1 << 24 and 0 <= bottom - top < 1 << 24):
        raise ValueError("no display window")
    left_data, top_data, right_data, bottom_data = struct.unpack("<4i", entries["dataWindow"])
    if not (0 <= right_data - left_data < 1 << 24 and 0 <= bottom_data - top_data < 1 << 24):
        raise ValueError("no data window")
    names = []
    channels = entries["channels"]
    at = 0
    while channels[at] != 0:
        name, at = _text(channels, at)
        names.append(name)
        at += 16
    layer = ""
    if not {"R", "G", "B", "Y"} & set(names):
        layer = next((name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in ("R", "Y")), "")
    height = bottom - top + 1
    width = right - left + 1
    largest = max(height, bottom_data - top_data + 1), max(width, right_data - left_data + 1)
    return Header("exr", height, width, largest, False, True, layer=layer)


def _text(data: bytes, at: int) -> tuple[str, int]:
    """Text up to the next zero byte, and the position behind it."""
    end = data.index(0, at)
    return data[at:end].decode("latin-1"), end + 1


def _tiff_header(file: BinaryIO) -> Header | None:
    """Parse the tags of the first image of a TIFF or BigTIFF file."""
    file.seek(0)
    start = file.read(16)
    order = "<" if start[:2] == b"II" else ">"
    big = 43 in start[2:4]
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), start, 8 if big else 4)
    file.seek(at)
    (count,) = struct.unpack(order + ("Q" if big else "H"), file.read(8 if big else 2))
    entry_bytes = 20 if big else 12
    entries = file.read(min(count, MAX_TAGS) * entry_bytes)
    tags = {}
    for k in range(0, len(entries) - entry_bytes + 1, entry_bytes):
        tag, kind, length = struct.unpack_from(order + ("HHQ" if big else "HHI"), entries, k)
        if tag in TAGS and kind in TAG_TYPES and 0 < length <= MAX_CHANNELS:
            letter = TAG_TYPES[kind]
            size = length * struct.calcsize(order + letter)
            place = entries[k + entry_bytes - (8 if big else 4): k + entry_bytes]
            if size > len(place):
                file.seek(struct.unpack(order + ("Q" if big else "I"), place)[0])
                place = file.read(size)
            tags[TAGS[tag]] = struct.unpack_from(f"{order}{length}{letter}", place)
    bits = max(tags.get("bits", (1,)))
    if bits <= 8 or tags.get("photometric") == (PALETTE,):
        return None
    is_float = FLOAT_SAMPLES in tags.get("format", ())
    gray = tags.get("samples", (1,)) == (1,) and bits in ((32,) if is_float else (12, 16, 32))
    height = tags["height"][0]
    width = tags["width"][0]
    return Header("tiff", height, width, (height, width), gray, is_float or bits > 16)
