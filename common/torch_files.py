"""Load untrusted PyTorch files safely: tensors and plain containers only, never more bytes than the file has."""

import warnings
import zipfile
from pathlib import Path

import torch


def load_plain(path: str | Path) -> object:
    """The content of a file written by torch.save (zip or legacy format), on the CPU: tensors in plain containers.

    ValueError with a one-line message if the file is damaged, contains anything but tensors and plain containers, or
    unpacks to more bytes than it has. OSError if it cannot be read."""
    with open(path, "rb") as file:
        head = file.read(4)
    try:
        if head == b"PK\x03\x04":
            _check_archive(Path(path))
        with warnings.catch_warnings():  # warnings about the pickle protocol precede an error
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # depends on the damage: a zip, pickle, Unicode or PyTorch error
        raise ValueError(_reason(error)) from error


def tensors_by_name(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of a weights file: the file's content, or its entry "model".

    ValueError as in `load_plain`, also if the file is not a dict of tensors. OSError if it cannot be read."""
    state = load_plain(path)
    if isinstance(state, dict):
        state = state.get("model", state)
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        raise ValueError("it is not a table of tensors by name")
    return state


def _check_archive(path: Path) -> None:
    """ValueError if the zip archive could not have been written by torch.save, which never compresses."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in members):
        raise ValueError("it is a compressed archive, which PyTorch does not write")
    if sum(info.file_size for info in members) > path.stat().st_size:
        raise ValueError("its members take more bytes than the file has")
    if any(".." in info.filename.split("/") or info.filename.startswith(("/", "\\")) for info in members):
        raise ValueError("it is an archive with paths outside of itself")


def _reason(error: Exception) -> str:
    """One line from torch.load's message, without its advice to set weights_only=False."""
    text = str(error)
    if name := text.partition("GLOBAL ")[2].split(" ")[0]:
        if name.startswith("numpy"):
            return "it holds numpy arrays, and only tensors are read from PyTorch's files"
        return f"it asks for {name[:60]}, which is not a tensor: do not trust this file"
    if "weights_only" in text:
        return "it is not a file of tensors, or it is damaged"
    return " ".join(text.split())[:120] or type(error).__name__
