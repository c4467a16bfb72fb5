"""PyTorch's files of strangers: tensors and plain containers only, and no more of them than the file has bytes."""

import warnings
import zipfile
from pathlib import Path

import torch


def load_tensors(path: str | Path) -> object:
    """The content of a file that torch.save wrote, on the CPU, its zip or its older format.

    ValueError, of one line, if it is damaged, asks for anything but tensors and plain containers, or unpacks to more
    than it has bytes; FileNotFoundError or another OSError if it cannot be read at all."""
    with open(path, "rb") as file:
        head = file.read(4)
    try:
        if head == b"PK\x03\x04":
            _check_archive(Path(path))
        with warnings.catch_warnings():  # about protocols of pickles, where an error follows anyway
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a zip, pickle, Unicode or PyTorch error, as the damage has it
        raise ValueError(_reason(error)) from error


def tensors_by_name(path: str | Path) -> dict[str, torch.Tensor]:
    """The content of a weights file, which may be under the key "model". ValueError too if it is something else."""
    state = load_tensors(path)
    if isinstance(state, dict):
        state = state.get("model", state)
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        raise ValueError("it is not a table of tensors by name")
    return state


def _check_archive(path: Path) -> None:
    """torch.save compresses nothing and has one folder in the archive; another archive is not its."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in members):
        raise ValueError("it is a compressed archive, which PyTorch does not write")
    if sum(info.file_size for info in members) > path.stat().st_size:
        raise ValueError("its members take more bytes than the file has")
    if any(".." in info.filename.split("/") or info.filename.startswith(("/", "\\")) for info in members):
        raise ValueError("it is an archive with names that lead out of it")


def _reason(error: Exception) -> str:
    """What torch.load says, without its advice to load the file unsafely."""
    text = str(error)
    if name := text.partition("GLOBAL ")[2].split(" ")[0]:
        return f"it asks for {name[:60]}, which is no tensor: do not trust this file"
    if "weights_only" in text:
        return "it is no file of tensors, or damaged"
    return " ".join(text.split())[:120] or type(error).__name__
