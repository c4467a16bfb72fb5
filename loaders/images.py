"""Reading of image files from untrusted sources: few formats are accepted, and the number of pixels is limited.

Pillow is used instead of imageio, whose reader cannot restrict the formats that Pillow opens.

Notation
    H, W     height, width
    limit    pixels of the largest image or video frame that is decoded, the option --max_pixels
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from common.errors import UserError
from common.files import MAX_PIXELS

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # whatever a file is called; of others, EPS would start Ghostscript
_limit = {"pixels": MAX_PIXELS}

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # check_pixels raises an error instead


def limit_pixels(count: int) -> None:
    """Decode no image or video frame of more than `count` pixels, in this process, from now on."""
    _limit["pixels"] = Image.MAX_IMAGE_PIXELS = count


def pixel_limit() -> int:
    """The limit that `limit_pixels` set."""
    return _limit["pixels"]


def check_pixels(height: int, width: int, where: object) -> None:
    """UserError if a picture of this size, whose file `where` names, is larger than the limit."""
    if height * width > pixel_limit():
        raise UserError(f"{where} is {width}x{height}, more than --max_pixels {pixel_limit()}: make it smaller, or "
                        "raise --max_pixels if you trust it")


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder sorted by name, without hidden ones; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def read_image(path: Path) -> np.ndarray:
    """An image file as `(H, W, 3)` uint8 RGB: grayscale is repeated, alpha dropped, 16 bits reduced to 8, and a
    camera's orientation tag applied. UserError if it cannot be decoded or is larger than the limit."""
    with _opened(path, path, "replace or remove it") as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16-bit grayscale
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        if image.mode == "F":  # whose range nobody knows
            raise UserError(f"{path} holds floating-point numbers: save the frames with 8 or 16 bits")
        return np.array(image.convert("RGB"))


def decode_image(data: bytes, where: str) -> np.ndarray:
    """An encoded image as `(H, W, 3)` uint8 RGB; `where` names it in errors. UserError as `read_image`."""
    with _opened(io.BytesIO(data), where, "download the file again") as image:
        return np.array(image.convert("RGB"))


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A foreground mask `(H, W)` bool: what is opaque in an image with transparency, else what is brighter than half.
    UserError if it cannot be decoded or is not of `size`."""
    with _opened(path, path, "give another mask") as file:
        image = ImageOps.exif_transpose(file)
        transparent = "A" in image.getbands() or "transparency" in image.info
        levels = np.array(image.convert("RGBA"))[..., 3] if transparent else np.array(image.convert("L"))
    if levels.shape != tuple(size):
        raise UserError(f"the mask {path} is {size_text(levels.shape)}, the frames are {size_text(size)}: resize the "
                        "mask")
    return levels > 127


def read_levels(path: Path) -> np.ndarray:
    """A grayscale image of 8 or 16 bits with its values as they are, `(H, W)` uint16. UserError as `read_image`."""
    with _opened(path, path, "process the sequence again") as image:
        levels = np.asarray(image)
        if levels.ndim != 2 or levels.dtype.kind not in "ui":
            raise UserError(f"{path} is not a grayscale image of whole numbers: process the sequence again")
        return levels.clip(0, 65535).astype(np.uint16)


def size_text(size: tuple[int, ...]) -> str:
    """(H, W) as users read it: 854x480."""
    return f"{size[1]}x{size[0]}"


@contextmanager
def _opened(source: Path | BinaryIO, where: object, advice: str) -> Iterator[Image.Image]:
    """The image of a file, its size checked and nothing decoded yet; what goes wrong within is a UserError."""
    try:
        with Image.open(source, formats=FORMATS) as image:
            check_pixels(image.height, image.width, where)
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:  # more than twice the limit, or hidden in a part of the file
        raise UserError(f"{where} is larger than --max_pixels {pixel_limit()}: make it smaller, or raise --max_pixels "
                        "if you trust it") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes of them
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged, or of another format"
        raise UserError(f"{where} cannot be read as an image ({why}): {advice}") from error


limit_pixels(MAX_PIXELS)
