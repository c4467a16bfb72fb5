"""Scripts in processes of their own that are forked from one which has imported PyTorch: for tests of many short runs,
of which each would spend seconds on imports. What is run is the script itself, from its first line on."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRELOAD = ["train", "eval", "viz", "preprocessing.cli"]


def launch(script: str, *arguments, folder: Path, timeout: float = 120) -> subprocess.CompletedProcess:
    """`python script arguments`, or of `-m script` without .py; what it says goes through files in `folder`."""
    paths = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    if str(ROOT) not in paths:  # what is imported ahead is found by it
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *paths])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    said = [folder / name for name in ("stdout", "stderr")]
    process = context.Process(target=_run, args=(script, list(map(str, arguments)), *map(str, said)))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise subprocess.TimeoutExpired([script, *arguments], timeout)
    return subprocess.CompletedProcess([script, *arguments], process.exitcode, *(path.read_text() for path in said))


def _run(script: str, arguments: list[str], *said: str) -> None:
    for descriptor, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
