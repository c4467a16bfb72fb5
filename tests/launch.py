"""Run scripts in processes forked from a server process that has already imported PyTorch.

Many tests run a script for a short time; without this, each would spend seconds on imports. The script runs from its
first line. Differences from a process that a user starts: it has the environment of the server process, the scripts'
modules are already imported, and exit handlers do not run. Some tests therefore start each script as a user does.
With `prepare=fork_children` the Python processes that the script itself starts are forked, too.
"""

import logging
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import weakref
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRELOAD = ["train", "eval", "viz", "track", "preprocessing.cli", "evaluation.video_job",
           "torch._dynamo", "kornia.feature.siftdesc"]  # imported late: by the first optimizer, for SIFT's descriptors


def start_server() -> None:
    """Start the server process, if there is none. Tests call this before the project's code starts it: a process has
    one server, and the first caller decides what it imports."""
    paths = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    if str(ROOT) not in paths:  # so that the server process finds the modules of PRELOAD
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *paths])
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()


class Launched:
    """A running `python script arguments`, or `python -m script arguments` if `script` does not end in .py.

    Has the methods of subprocess.Popen (with pipes and text) that tests use. PyTorch has one thread. `prepare` is
    called in the process before the script and must be picklable. When this object is garbage-collected, the process
    and its children are killed."""

    def __init__(self, script: str, *arguments, prepare=None):
        start_server()
        self.args, self._said = [script, *map(str, arguments)], Path(tempfile.mkdtemp())
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_run, args=(self.args, str(self._said), prepare))
        self._process.start()
        self.pid = self._process.pid
        weakref.finalize(self, _end, self._process, self._said)

    @property
    def returncode(self) -> int | None:
        """Exit code, or None while the process runs. Unlike Popen's, it is current without a call of poll()."""
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

    def wait(self, timeout: float = 240) -> int:
        """Wait for the end, at most `timeout` seconds; returns the exit code."""
        self.communicate(timeout)
        return self.returncode

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Wait for the end; returns stdout and stderr.

    After `timeout` seconds, kills the process and raises TimeoutExpired with the output so far."""
        self._process.join(timeout)
        said = tuple(path.read_text() if path.exists() else "" for path in (self._said / n for n in STREAMS))
        if self._process.is_alive():
            _end(self._process, self._said)
            raise subprocess.TimeoutExpired(self.args, timeout, *said)
        return said


STREAMS = ("stdout", "stderr")


def launch(script: str, *arguments, timeout: float = 240, prepare=None) -> subprocess.CompletedProcess:
    """Run a script to its end; returns exit code and output as subprocess.run does with `capture_output`."""
    process = Launched(script, *arguments, prepare=prepare)
    said = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def wait_until(condition, process, seconds=60):
    """Wait until `condition()` is true, the process has ended, or `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def _end(process: multiprocessing.Process, said: Path) -> None:
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # the process has not called setsid yet
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
    _run_script(arguments)


def _run_script(arguments: list[str]) -> None:
    """Run `script arguments` in this process, as the main program."""
    script, sys.argv = arguments[0], arguments
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def start_command(command: list[str]) -> Launched:
    """Start `[sys.executable, script, ...]` or `[sys.executable, "-m", module, ...]` in forked processes."""
    assert command[0] == sys.executable
    return Launched(*(command[2:] if command[1] == "-m" else command[1:]), prepare=fork_children)


class _ForkedPopen:
    """The part of subprocess.Popen that the project uses to start Python. The process is forked from this one."""

    def __init__(self, command, stderr=None, env=None):
        assert command[0] == sys.executable
        arguments = command[2:] if command[1] == "-m" else command[1:]
        pipe = os.pipe() if stderr == subprocess.PIPE else None
        child = [*map(str, arguments)], pipe, dict(env or os.environ)
        self._process = _CONTEXT("fork").Process(target=_run_forked, args=child)
        self._process.start()
        self.terminate = self._process.terminate
        if pipe is not None:
            os.close(pipe[1])
            self.stderr = os.fdopen(pipe[0], "rb")

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode


def _run_forked(arguments: list[str], pipe: tuple[int, int] | None, environment: dict[str, str]) -> None:
    if pipe is not None:
        os.close(pipe[0])
        os.dup2(pipe[1], sys.stderr.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.getLogger().handlers.clear()
    os.environ.clear()
    os.environ.update(environment)
    _run_script(arguments)


_CONTEXT = multiprocessing.get_context


def set_environment(values: dict[str, str]) -> None:
    """For `prepare`, as `partial(set_environment, values)`: set environment variables."""
    os.environ.update(values)


def fork_children() -> None:
    """For `prepare`: fork the Python processes that the script starts, so that they spend no time on imports."""
    import benchmarks.experiments
    import inference.processes

    multiprocessing.get_context = lambda method=None: _CONTEXT("fork")
    forked = types.SimpleNamespace(PIPE=subprocess.PIPE, Popen=_ForkedPopen,
                                   run=lambda command, check: _ForkedPopen(command).wait())
    inference.processes.subprocess = forked
    benchmarks.experiments.subprocess = forked
