"""Which pixels of a mask image are the object. One rule for --foreground_mask_path and for the files in mask/.

The first row that fits an image counts; with a chosen label (--mask_label) the first row is skipped.

| image | object |
|---|---|
| alpha channel or transparent color that is not the same in all pixels | alpha above half of its largest value |
| alpha 0 in all pixels | none |
| palette with colors (DAVIS) | labels above 0, or the chosen one |
| lossless colors in regions on black | colors other than black |
| label image: lossless grayscale with small or few values in regions | labels above 0, or the chosen one |
| other grayscale and colors, of any number of bits | values above half of the largest value in the file |

Small values are below a quarter of 2^bits (64 for 8 bits, 16,384 for 16 bits). Few values are at most FEW_VALUES with
the background's 0, none of them 2^bits - 1: a mask of 0, 128, 255 may have an unknown region. Values are in regions if,
for half of them or more, at least a tenth of the pixels equal all four neighbors; noise and soft edges are not in
regions. A lossless grayscale image of one value, or of 0 and one other value, is a label image. In the last row, a file
whose largest value is below NOISE is noise and has no object.
"""

import logging
from dataclasses import dataclass

import numpy as np

from common.errors import UserError

log = logging.getLogger(__name__)
NOISE = 32       # gray levels; rounding in a JPEG changes a flat background by less
SMALL = 0.25     # share of 2^bits; labels are below it
FEW_VALUES = 8   # labels of any size, with the background
INNER = 0.1      # share of the pixels of a value in regions that equal all four neighbors, at least
MAX_LABEL = 1 << 24  # larger values are not counted one by one


@dataclass(frozen=True)
class MaskImage:
    """The decoded content of a mask file."""
    values: np.ndarray             # (H, W) palette indices, gray levels or floating-point values; (H, W, 3) colors
    bits: int = 8                  # of a value
    labels: bool = False           # values are indices of a palette with colors
    lossless: bool = True          # the file format keeps values exactly
    alpha: np.ndarray | None = None  # (H, W)


def foreground(image: MaskImage, label: int, where: object) -> np.ndarray:
    """Object pixels `(H, W)` bool by the rule above.

    label: 0: all labels above 0; else this one. `where` names the file in messages.
    UserError if there is a `label` and the image has none."""
    if not label and image.alpha is not None and image.alpha.min() < image.alpha.max():
        return _above_half(image.alpha, 16 if image.alpha.dtype == np.uint16 else 8, where)
    if image.alpha is not None and not image.alpha.any():
        return np.zeros(image.alpha.shape, bool)
    values = image.values
    if values.ndim == 3:
        if label:
            raise UserError(f"{where} has colors and no labels: leave out --mask_label, or give a palette image")
        if image.lossless and values.dtype in (np.uint8, np.uint16):
            codes = values.astype(np.int64) @ [1 << 32, 1 << 16, 1]  # (H, W)
            if codes.min() == 0 and in_regions(codes):
                return codes > 0
        return _above_half(values.max(axis=-1), image.bits, where)
    if label:
        return values == label
    if image.labels or (image.lossless and is_label_image(values, image.bits)):
        return values > 0
    return _above_half(values, image.bits, where)


def is_label_image(values: np.ndarray, bits: int) -> bool:
    """Whether the values `(H, W)` of a lossless grayscale image are labels, 0 being the background."""
    low = values.min()
    high = values.max()
    if low < 0 or (values.dtype.kind == "f" and (values != np.rint(values)).any()):
        return False
    if ((values == low) | (values == high)).all():
        return low in (0, high)
    if low != 0 or high >= MAX_LABEL or high == 2**bits - 1:
        return False
    small_or_few = high < SMALL * 2**bits or len(np.unique(values)) <= FEW_VALUES
    return small_or_few and in_regions(values.astype(np.int64))


def in_regions(codes: np.ndarray) -> bool:
    """Whether INNER of the pixels equal all four neighbors, for half or more of the values above 0 of `(H, W)`."""
    down = codes[1:] == codes[:-1]
    right = codes[:, 1:] == codes[:, :-1]
    inner = np.ones(codes.shape, bool)
    inner[1:] &= down
    inner[:-1] &= down
    inner[:, 1:] &= right
    inner[:, :-1] &= right
    if codes.max() < 1 << 16:
        of_value = codes.ravel()
    else:
        of_value = np.unique(codes, return_inverse=True)[1].ravel()
    count = np.bincount(of_value)
    share = np.bincount(of_value, weights=inner.ravel()) / np.maximum(count, 1)
    return bool((share[1:][count[1:] > 0] >= INNER).mean() >= 0.5)


def labels_of(image: MaskImage) -> list[int]:
    """The labels above 0 of a palette or grayscale image, at most 1,000."""
    if image.values.ndim == 3:
        return []
    values = np.unique(image.values)
    return [int(value) for value in values[values > 0][:1000]]


def resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask `(h, w)` at `size` (H, W): each pixel has the value at its center, (y + 0.5) * h / H - 0.5."""
    rows, columns = ((np.arange(new) * 2 + 1) * old // (2 * new) for new, old in zip(size, mask.shape, strict=True))
    return mask[rows[:, None], columns]


def _above_half(values: np.ndarray, bits: int, where: object) -> np.ndarray:
    """Values `(H, W)` above half of the largest one; none if they are noise."""
    if values.dtype.kind != "f":
        for step in (257, 256):  # 8 bits that were written as 16
            if bits == 16 and not (values % step).any():
                values = values // step
                bits = 8
    high = values.max()
    if values.dtype.kind != "f" and bits > 1 and high < NOISE:
        if high > 0:
            log.warning("%s: its values reach %d of %d and are no labels: taken as noise, no object", where, high,
                        2**bits - 1)
        return np.zeros(values.shape, bool)
    return values > max(high / 2, 0)
