"""Scripts in processes of their own that are forked from one which has imported PyTorch: for tests of many short runs,
of which each would spend seconds on imports. What is run is the script itself, from its first line on."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRELOAD = ["train", "eval", "viz", "preprocessing.cli"]


class Launched:
    """A running `python script arguments`, or of `-m script` without .py, with one thread; as subprocess.Popen with
    pipes and text. `prepare` is called in the process before the script."""

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

    @property
    def returncode(self) -> int | None:
        """As Popen's; also what `poll` returns."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As Popen's."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As Popen's."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """As Popen's."""
        self._process.kill()

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """As Popen's; a process that takes longer is killed."""
        self._process.join(timeout)
        if self._process.is_alive():
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return tuple((self._said / name).read_text() for name in ("stdout", "stderr"))


def launch(script: str, *arguments, timeout: float = 120, prepare=None) -> subprocess.CompletedProcess:
    """What a script says and ends with, as subprocess.run with `capture_output`."""
    process = Launched(script, *arguments, prepare=prepare)
    said = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def _run(arguments: list[str], said: str, prepare) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
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
