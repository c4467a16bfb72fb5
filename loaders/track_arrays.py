"""The arrays of a file of tracks by name, whatever program wrote it: .npz, .npy, or .pt (.pth).

Files may come from untrusted sources: only numbers are read, and no array takes more than MAX_BYTES.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.torch_files import load_plain
from loaders.npy import MAX_BYTES, ArrayFile, read_npy

ADVICE = ("numpy.savez(FILE, tracks=..., visible=..., query_points=..., frame_size=...) and torch.save((tracks, "
          "visibility), FILE) or torch.save((tracks, visibility, queries), FILE) write what is read here")
SUFFIXES = (".npz", ".npy", ".pt", ".pth")
BY_PLACE = ("tracks", "visible", "queries")  # names of arrays that have a place instead of a name
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Arrays(dict):
    """Arrays by name, with the interface of loaders.npy.ArrayFile.

    by_place: whether the file has no names, so that the first array are the tracks, the second one the visibility,
    and the third one the query points."""

    def __init__(self, arrays: Mapping[str, np.ndarray], by_place: bool = False):
        super().__init__(arrays)
        self.by_place = by_place

    @property
    def names(self) -> list[str]:
        return list(self)


def open_arrays(path: str | Path) -> ArrayFile | Arrays:
    """The arrays of a file of tracks.

    A single array, the entries of a tuple, and arrays that numpy.savez named arr_0, arr_1, and arr_2 are called as in
    BY_PLACE. UserError if the ending is unknown, the file is missing or damaged, or it holds something else."""
    suffix = Path(path).suffix.lower()
    if suffix == ".npz":
        return _named(ArrayFile(path, ADVICE))
    if suffix == ".npy":
        return Arrays({"tracks": read_npy(path, ADVICE)}, by_place=True)
    if suffix in (".pt", ".pth"):
        return _from_torch(path)
    raise UserError(f"{path}: no file of tracks that can be read ends in '{suffix}': {ADVICE}")


def _named(arrays: ArrayFile) -> ArrayFile | Arrays:
    numbered = [name for name in ("arr_0", "arr_1", "arr_2") if name in arrays]
    if sorted(arrays.names) != numbered:
        return arrays
    return Arrays({name: arrays[key] for name, key in zip(BY_PLACE, numbered, strict=False)}, by_place=True)


def _from_torch(path: str | Path) -> Arrays:
    try:
        content = load_plain(path)
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: {ADVICE}") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read as tensors ({error}): {ADVICE}") from error
    by_place = not isinstance(content, dict)
    if isinstance(content, torch.Tensor):
        content = {"tracks": content}
    elif isinstance(content, list | tuple):
        if len(content) > len(BY_PLACE):
            raise UserError(f"{path} holds {len(content)} values without names, at most (tracks, visibility, "
                            f"queries) can be told apart: {ADVICE}")
        content = dict(zip(BY_PLACE, content, strict=False))
    elif not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors: {ADVICE}")
    found = {str(name): _as_array(value, f"{path}: `{str(name)[:40]}`") for name, value in content.items()}
    return Arrays({name: array for name, array in found.items() if array is not None}, by_place)


def _as_array(value: object, where: str) -> np.ndarray | None:
    """A tensor, or a plain list of whole numbers, as an array; None for anything else. UserError, which begins with
    `where`, for a tensor that numpy cannot hold."""
    if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
        return np.array(value) if max(map(abs, value)) < 1 << 62 else None
    if not isinstance(value, torch.Tensor):
        return None
    dense = value.layout == torch.strided and value.device.type == "cpu"
    if not dense or value.dtype not in FLOATS + INTEGERS:
        raise UserError(f"{where} is a tensor of {value.dtype} ({value.layout}), it must hold plain numbers")
    if value.numel() * value.element_size() > MAX_BYTES:  # an expanded tensor takes less in the file
        raise UserError(f"{where} takes {value.numel() * value.element_size() / 1e9:.1f} GB unpacked, at most "
                        f"{MAX_BYTES / 1e9:.0f} are read")
    value = value.detach().resolve_neg()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
