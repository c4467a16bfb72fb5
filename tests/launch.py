"""Scripts in processes of their own that are forked from one which has imported PyTorch: for tests of many short runs,
of which each would spend seconds on imports.

What is run is the script itself, from its first line on. Otherwise such a process differs from one that a user starts:
its environment is that of the first one, modules that scripts import are there already, and nothing runs at its exit.
So each script is also started plainly by some test."""

import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRELOAD = ["train", "eval", "viz", "preprocessing.cli"]


class Launched:
    """A running `python script arguments`, or of `-m script` without .py, with one thread for PyTorch; the part of
    subprocess.Popen, with pipes and text, that tests use. `prepare`, which pickle must know, is called in the process
    before the script. What still runs when this is gone is killed, with all that it has started."""

    def __init__(self, script: str, *arguments, prepare=None):
        paths = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
        if str(ROOT) not in paths:  # what is imported ahead is found by it
            os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *paths])
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.args, self._said = [script, *map(str, arguments)], Path(tempfile.mkdtemp())
        self._process = context.Process(target=_run, args=(self.args, str(self._said), prepare))
        self._process.start()
        self.pid = self._process.pid
        weakref.finalize(self, _end, self._process, self._said)

    @property
    def returncode(self) -> int | None:
        """As Popen's, but known as soon as it has ended."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As Popen's."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As Popen's."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """As Popen's."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """As Popen's; what takes longer is killed, and TimeoutExpired has what it said until then."""
        self._process.join(timeout)
        said = tuple(path.read_text() if path.exists() else "" for path in (self._said / n for n in STREAMS))
        if self._process.is_alive():
            _end(self._process, self._said)
            raise subprocess.TimeoutExpired(self.args, timeout, *said)
        return said


STREAMS = ("stdout", "stderr")


def launch(script: str, *arguments, timeout: float = 240, prepare=None) -> subprocess.CompletedProcess:
    """What a script says and ends with, as subprocess.run with `capture_output`."""
    process = Launched(script, *arguments, prepare=prepare)
    said = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def wait_until(condition, process, seconds=60):
    """Until the condition holds, the process has ended, or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def _end(process: multiprocessing.Process, said: Path) -> None:
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group yet
            process.kill()
        process.join()
    shutil.rmtree(said, ignore_errors=True)


def _run(arguments: list[str], said: str, prepare) -> None:
    os.setsid()
    for descriptor, name in zip((1, 2), STREAMS, strict=True):
        os.dup2(os.open(Path(said, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    script, sys.argv = arguments[0], arguments
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
