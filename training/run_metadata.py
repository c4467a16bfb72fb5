"""Run metadata: `args.txt`, which `--config` reads, and `versions.json` with one entry for each start of the run."""

import json
import os
import platform
import shutil
import subprocess
import sys
from argparse import Namespace
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from common.errors import UserError
from common.files import write_text
from configs.config_file import as_config

ROOT = Path(__file__).resolve().parents[1]  # folder of this checkout
PACKAGES = ("torch", "numpy", "opencv-python-headless", "kornia", "triton", "tinycudann")  # recorded if installed


def write_run_metadata(run_dir: Path, options: Namespace, step: int) -> None:
    """Write args.txt and append an entry for this start, at step `step`, to versions.json. UserError if the folder
    cannot be written or the value of an option cannot be represented in a config file."""
    path = run_dir / "versions.json"
    try:
        write_text(run_dir / "args.txt", as_config(options))
        write_text(path, json.dumps([*read_entries(path), start_entry(options, step)], indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written ({error.strerror}): make room, or give another --save_dir"
                        ) from error


def start_entry(options: Namespace, step: int) -> dict:
    """Entry of versions.json: software, hardware and command, on which the results depend besides the options."""
    cuda = options.device != "cpu" and torch.cuda.is_available()
    return {"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv,
            "folder": str(Path.cwd()), "versions": versions(), "uncommitted_changes": uncommitted_changes(),
            "platform": platform.platform(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if cuda else cpu_name(),
            "processes": int(os.environ.get("WORLD_SIZE", 1))}


def read_entries(path: Path) -> list[dict]:
    """The entries of a JSON file that a run appends to; none if the file is missing or damaged, so that it is
    replaced."""
    try:
        entries = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return []
    return entries if isinstance(entries, list) else []


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages, and the commit of this code if it is a git checkout."""
    out = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "--short", "HEAD")
    return out | ({"commit": commit.strip()} if commit is not None else {})


@cache
def uncommitted_changes() -> list[str] | None:
    """Changed files of this checkout, as lines of `git status --short`; None without git."""
    status = _git("status", "--short")
    return None if status is None else status.splitlines()


@cache
def cpu_name() -> str:
    """Processor name and number of logical cores."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    return f"{name}, {os.cpu_count()} cores"


def _git(*arguments: str) -> str | None:
    if not shutil.which("git"):
        return None
    result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return result.stdout if result.returncode == 0 else None
