"""Image files. They may come from untrusted sources: few formats are read, and the number of pixels is limited.

Notation
    H, W        height, width
    max_pixels  largest number of pixels of an image or video frame: the option --max_pixels
"""

import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps  # imageio's reader cannot be restricted to a few formats, its writer is slower

from common.errors import UserError
from common.files import MAX_PIXELS, in_natural_order, write_bytes
from loaders.deep_images import Header, ValueRange, clip_range, decode, read_header, sample
from loaders.masks import MaskImage, foreground, labels_of, resize_nearest

log = logging.getLogger(__name__)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".exr"}
LOSSLESS = ("PNG", "BMP", "TIFF")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # by content, not suffix; e.g. EPS would run Ghostscript


def check_pixels(height: int, width: int, where: object, max_pixels: int) -> None:
    """UserError if height * width is more than `max_pixels`; `where` names the image in the message."""
    if height * width > max_pixels:
        raise UserError(f"{where} is {width}x{height}, more than --max_pixels {max_pixels}: make it smaller, or raise "
                        "--max_pixels if you trust it")


def image_files(folder: Path) -> list[Path]:
    """Image files in a folder, in natural order of names, without hidden files; an empty list if there is no folder."""
    if not folder.is_dir():
        return []
    return in_natural_order(path for path in folder.iterdir()
                            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))


def first_missing(files: Sequence[Path]) -> int | None:
    """The first number that is missing in the names of numbered images, in natural order. The numbers may have another
    step than 1, that of most of them. None if none is missing, or if they are not numbered."""
    found = [re.search(r"([0-9]+)[^0-9]*$", path.stem) for path in files]
    if len(files) < 3 or None in found:
        return None
    numbers = [int(match[1]) for match in found]
    steps = [b - a for a, b in pairwise(numbers)]
    step, count = Counter(steps).most_common(1)[0]
    if min(steps) < 1 or 2 * count <= len(steps):
        return None
    return next((number + step for number, gap in zip(numbers, steps, strict=False) if gap > step), None)


def no_images(folder: Path) -> UserError:
    """The error for a folder without image files; it names the first file that is there."""
    names = [path.name for path in in_natural_order(folder.iterdir()) if not path.name.startswith(".")]
    if not names:
        return UserError(f"no images: {folder} is empty")
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return UserError(f"{folder} has no images of the kinds {' '.join(sorted(IMAGE_SUFFIXES))}, but {names[0]}{more}: "
                     "convert them, or give another folder")


def read_image(path: Path, max_pixels: int = MAX_PIXELS, values: ValueRange | None = None) -> np.ndarray:
    """Read an image file as `(H, W, 3)` uint8 RGB.

    Grayscale is repeated, alpha is dropped, and the EXIF orientation is applied. Values of more than 8 bits are mapped
    by `values`; without it, of 16 bits the upper 8 are used, and other values are mapped by their own range.
    UserError if the image cannot be decoded, or is larger than `max_pixels`."""
    header = deep_header(path)
    if header is not None and header.wide and values is None:
        values = clip_range([sample(read_values(path, max_pixels))])
    if header is not None and values is not None and (header.wide or not values.whole):
        return values.to_bytes(read_values(path, max_pixels))
    with _opened(path, path, "replace or remove it", max_pixels) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16-bit grayscale
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        return np.array(image.convert("RGB"))


def read_values(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Values `(H, W)` or `(H, W, 3)` of an image file of more than 8 bits, as the file has them.

    UserError if it cannot be decoded, or is larger than `max_pixels`."""
    header = deep_header(path)
    if header is None or header.gray:
        with _opened(path, path, "replace or remove it", max_pixels) as file:
            return np.asarray(ImageOps.exif_transpose(file))
    return _decoded(path, header, max_pixels)[0]


def _decoded(path: Path, header: Header, max_pixels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Values and alpha channel of a file of more than 8 bits that Pillow does not read."""
    check_pixels(*header.largest, path, max_pixels)
    try:
        return decode(path.read_bytes(), header)
    except Exception as error:  # a damaged file can raise any exception in PyAV and OpenCV
        raise UserError(f"{path} cannot be read as an image (it is damaged, or has channels that are not known): "
                        "replace or remove it") from error


def deep_header(path: Path) -> Header | None:
    """The header of an image file of more than 8 bits per value; None for other files. UserError if it is missing."""
    try:
        with open(path, "rb") as file:
            return read_header(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image ({error.strerror}): replace or remove it") from error


def find_range(files: Sequence[Path], max_pixels: int = MAX_PIXELS,
               fixed: tuple[float, float] | None = None) -> ValueRange | None:
    """The range of the values of a clip's frames; None if all have at most 8 bits per value.

    fixed: (low, high) to use instead of the clip's percentiles
    UserError if a file of more bits cannot be read."""
    deep = [path for path in files if deep_header(path) is not None]
    if not deep:
        return None
    chosen = deep[:1] if fixed else deep
    return clip_range([sample(read_values(path, max_pixels)) for path in chosen], fixed)


def decode_image(data: bytes, where: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an encoded image to `(H, W, 3)` uint8 RGB; `where` names it in errors.

    UserError if it cannot be decoded or is larger than `max_pixels`."""
    with _opened(io.BytesIO(data), where, "download the file again", max_pixels) as image:
        return np.array(image.convert("RGB"))


def read_mask(path: Path, size: tuple[int, int], max_pixels: int = MAX_PIXELS, label: int = 0) -> np.ndarray:
    """Read a foreground mask `(H, W)` bool by the rule of loaders/masks.py. Arguments and errors as of `read_masks`."""
    return read_masks([path], size, max_pixels, label)[0]


def read_masks(paths: Sequence[Path], size: tuple[int, int], max_pixels: int = MAX_PIXELS,
               label: int = 0) -> np.ndarray:
    """Read foreground masks `(T, H, W)` bool by the rule of loaders/masks.py, resized to `size` (H, W).

    label: 0: every label above 0; else this label only
    UserError if an image cannot be decoded or is larger than `max_pixels`, or if no image has the label."""
    out = np.empty((len(paths), *size), bool)
    others = {}  # other size -> number of masks
    labels = set()
    for t, path in enumerate(paths):
        content = _mask_image(path, max_pixels)
        mask = foreground(content, label, path)
        if label:
            labels.update(labels_of(content))
        if mask.shape != tuple(size):
            others[mask.shape] = others.get(mask.shape, 0) + 1
            mask = resize_nearest(mask, size)
        out[t] = mask
    where = paths[0] if len(paths) == 1 else paths[0].parent
    for shape, count in others.items():
        log.info("%s: %s of %s, resized to the frames' %s (nearest neighbor)", where,
                 "mask" if len(paths) == 1 else f"{count} masks", size_text(shape), size_text(size))
    if label and label not in labels:
        known = ", ".join(map(str, sorted(labels)[:20])) or "none"
        raise UserError(f"{where} has no label {label}: choose --mask_label among {known}")
    return out


def _mask_image(path: Path, max_pixels: int) -> MaskImage:
    """Decode a mask file."""
    header = deep_header(path)
    if header is not None and not header.gray:
        values, alpha = _decoded(path, header, max_pixels)
        if values.dtype.kind == "f":
            values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        if values.ndim == 3 and (values == values[..., :1]).all():
            values = values[..., 0]
        return MaskImage(values, 16 if values.dtype.itemsize == 2 else 32, alpha=alpha)
    with _opened(path, path, "give another mask", max_pixels) as file:
        lossless = file.format in LOSSLESS and file.info.get("compression") != "jpeg"
        image = ImageOps.exif_transpose(file)
        mode = image.mode
        alpha = None
        if "A" in image.getbands() or ("transparency" in image.info and mode in ("1", "L", "P", "RGB")):
            alpha = np.array(image.convert("RGBA"))[..., 3]
        if mode == "P":
            return _palette_image(image, alpha)
        if mode == "1":
            return MaskImage(np.array(image).astype(np.uint8), 1, lossless=lossless)
        if mode == "F":
            values = np.nan_to_num(np.array(image), nan=0.0, posinf=0.0, neginf=0.0)
            return MaskImage(values, 32, lossless=lossless)
        if mode.startswith("I"):
            values = np.array(image).astype(np.int64)
            return MaskImage(values, 16 if values.max() < 1 << 16 else 32, lossless=lossless)
        if mode in ("L", "LA"):
            return MaskImage(np.array(image.convert("LA"))[..., 0], lossless=lossless, alpha=alpha)
        colors = np.array(image.convert("RGB"))
        gray = (colors == colors[..., :1]).all()
        return MaskImage(colors[..., 0] if gray else colors, lossless=lossless, alpha=alpha)


def _palette_image(image: Image.Image, alpha: np.ndarray | None) -> MaskImage:
    """An image with a palette: labels, or gray levels if all colors that it uses are different grays."""
    indices = np.array(image)
    palette = np.zeros((256, 3), np.uint8)
    entries = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)[:256]
    palette[: len(entries)] = entries
    used = palette[np.flatnonzero(np.bincount(indices.ravel(), minlength=256))]
    if (used == used[:, :1]).all() and len(np.unique(used[:, 0])) == len(used):
        return MaskImage(palette[indices, 0], alpha=alpha)
    return MaskImage(indices, labels=True, alpha=alpha)


def read_levels(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a grayscale image of 8 or 16 bits as `(H, W)` uint16, without scaling its values.

    UserError if it cannot be decoded, is not grayscale, or is larger than `max_pixels`."""
    with _opened(path, path, "process the sequence again", max_pixels) as image:
        levels = np.asarray(image)
        if levels.ndim != 2 or levels.dtype.kind not in "ui":
            raise UserError(f"{path} is not a grayscale image of whole numbers: process the sequence again")
        return levels.clip(0, 65535).astype(np.uint16)


def encode_image(image: np.ndarray, extension: str, **options) -> bytes:
    """An image `(H, W, 3)` uint8, or `(H, W)` uint8 or uint16, as the bytes of a file with `extension`, such as ".png".

    `options` are those of Pillow's writer of the format."""
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, Image.registered_extensions()[extension], **options)
    return encoded.getvalue()


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an image `(H, W, 3)` uint8 RGB, or `(H, W)` uint8 or uint16, as PNG, atomically."""
    write_bytes(path, encode_image(image, ".png", compress_level=1))


def size_text(size: tuple[int, ...]) -> str:
    """Text for a size (H, W), width first: 854x480."""
    return f"{size[1]}x{size[0]}"


@contextmanager
def _opened(source: Path | BinaryIO, where: object, advice: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image and check its size, without decoding it. Exceptions in the block become UserError."""
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            image = Image.open(source, formats=FORMATS)
        with image:
            check_pixels(image.height, image.width, where, max_pixels)
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{where} is larger than --max_pixels {max_pixels}, or than the {2 * Image.MAX_IMAGE_PIXELS} "
                        "pixels that Pillow reads: make it smaller") from error
    except Exception as error:  # a damaged file can raise any exception in Pillow's decoders
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged, or of another format"
        raise UserError(f"{where} cannot be read as an image ({why}): {advice}") from error
