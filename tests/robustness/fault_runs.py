"""Run the project's commands in child processes for the fault tests (tests/robustness/faults.py).

Every command runs in a process that is forked after all modules are imported. The command itself is the same, but the
seconds of importing are skipped, so a kill hits the work and not the imports. A test uses only what a user sees: the
exit code, the printed output, and the files.
"""

import hashlib
import json
import os
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch

import eval as eval_driver  # noqa: F401  imported before forking
import train as train_driver  # noqa: F401
from common.errors import UserError
from loaders.checkpoint import read_checkpoint
from loaders.images import read_image
from loaders.sequence import open_sequence
from loaders.track_files import save_queries
from loaders.video import write_video

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--device cpu --mlp_backend torch --num_pairs 2 --num_pts 16 --num_samples_ray 8 --affine_width 16 "
        "--affine_layers 3 --field_width 24 --no_tensorboard --i_img 0").split()
LIMIT_S = 900  # seconds; a process that runs longer counts as hung and is killed


@dataclass
class Outcome:
    """Exit code (minus the signal number if a signal ended the process), output and wall time in seconds."""
    code: int
    text: str
    seconds: float

    def is_clear(self) -> bool:
        """Whether the command succeeded, or exited with code 2 and an error line, without a traceback."""
        if "Traceback" in self.text or self.code < 0:
            return False
        last = self.text.strip().splitlines()[-1] if self.text.strip() else ""
        return self.code == 0 or (self.code == 2 and ("error: " in last or "--help" in last))


@dataclass(frozen=True)
class Stage:
    """A command of the project, its inputs, and the part of its output that is compared."""
    name: str
    inputs: tuple[str, ...]          # names in the campaign's inputs, copied to the working folder
    argv: tuple[str, ...]            # module or script, then options
    result: Callable[[Path], dict]   # output that must not depend on interruptions


def run(argv: tuple[str, ...], folder: Path, kill_after: float | None = None, prepare: Callable = lambda: None,
        meanwhile: Callable | None = None, delay: float = 1.0, log: Path | None = None) -> Outcome:
    """Run a command in `folder`; send SIGKILL to it and its children after `kill_after` seconds.

    prepare: called in the child before the command. meanwhile: called once in this process after `delay` seconds.
    log: file for the command's output."""
    log, begin = log or folder / "log.txt", time.monotonic()
    pid = os.fork()
    if pid == 0:
        _command(argv, folder, log, prepare)
    os.setpgid(pid, pid)  # the child also does this; a kill may come before it has
    deadline = begin + (LIMIT_S if kill_after is None else kill_after)
    status = None
    while status is None:
        found, code = os.waitpid(pid, os.WNOHANG)
        if found:
            status = os.waitstatus_to_exitcode(code)
        elif time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        else:
            if meanwhile is not None and time.monotonic() > begin + delay:
                meanwhile()
                meanwhile = None
            time.sleep(0.005)
    text = log.read_text(errors="replace") if log.exists() else ""
    return Outcome(status, text, time.monotonic() - begin)


def _command(argv: tuple[str, ...], folder: Path, log: Path, prepare: Callable) -> None:
    """Run the command in the child process; does not return."""
    code = 1
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        sys.argv = list(argv)
        torch.set_num_threads(1)
        prepare()
        if argv[0].endswith(".py"):
            runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
        else:
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_child(task: Callable[[], object]) -> object:
    """The value of `task()`, which must be valid JSON, computed in a forked process.

    This keeps the parent free of PyTorch threads, so that it can be forked again. RuntimeError if `task` raises."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            answer = {"value": task()}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(answer))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = json.loads(pipe.read())
    os.waitpid(pid, 0)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["value"]


# Outputs of the stages


def digest(value: object) -> str:
    """SHA-256 of a file, a tensor, any value with a fixed repr, or nested containers of these."""
    out = hashlib.sha256()
    if isinstance(value, Path):
        out.update(value.read_bytes())
    elif isinstance(value, torch.Tensor):
        out.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            out.update(f"{key}={digest(value[key])}".encode())
    elif isinstance(value, list | tuple):
        for item in value:
            out.update(digest(item).encode())
    else:
        out.update(repr(value).encode())
    return out.hexdigest()


def frames_and_store(folder: Path) -> dict:
    """Hashes of the frames and of the correspondence files."""
    names = sorted([*folder.glob("seq/color/*"), *folder.glob("seq/correspondences/*")])
    return {str(path.relative_to(folder)): digest(path) for path in names}


def last_checkpoint(folder: Path) -> dict:
    """Hashes of all parts of the last checkpoint: parameters, optimizers, error map, sampler, random generators."""
    path = max(folder.glob("out/*/model_*.pth"), key=lambda path: int(path.stem[6:]))
    parts = ("step", "model", "optimizers", "error_map", "sampler", "generators")
    content = read_checkpoint(path)
    return {"name": path.name, **{part: digest(getattr(content, part)) for part in parts}}


def scores(folder: Path) -> dict:
    """The metrics, and hashes of the tracks; times are left out."""
    with np.load(folder / "out/default_seq/annotation_tracks.npz") as arrays:
        tracks = {name: digest(arrays[name].tolist()) for name in arrays.files}
    return {"metrics": json.loads((folder / "out/default_seq/metrics.json").read_text()), **tracks}


def benchmark_scores(folder: Path) -> dict:
    """The metrics of all videos, by tracker."""
    trackers = json.loads((folder / "out/default_small/first/results.json").read_text())["trackers"]
    return {name: {video: record["metrics"] for video, record in table["videos"].items()}
            for name, table in trackers.items()}


def saved_files(folder: Path) -> dict[str, str]:
    """Read every file that has a final (not temporary) name: name -> "", or the error message of its reader."""
    out = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        hidden = any(part.startswith(".tmp-") or part.endswith(".partial") for part in path.relative_to(folder).parts)
        if hidden or path.suffix in (".txt", ".running"):
            continue
        try:
            _read_any(path)
            out[str(path.relative_to(folder))] = ""
        except (UserError, OSError, ValueError, zipfile.BadZipFile) as error:
            out[str(path.relative_to(folder))] = str(error)
    return out


def _read_any(path: Path) -> None:
    if path.suffix == ".png":
        read_image(path)
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".pth":
        read_checkpoint(path)
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            list(arrays.values())


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint; 0 if there is none."""
    return max((int(path.stem[6:]) for path in folder.glob("out/*/model_*.pth")), default=0)


# Inputs


QUICK_VIDEO = ("--tapvid", "small.pkl", "--save_dir", "out", "--query_mode", "first", "--tapvid_size", "0",
               "--num_iters", "12", "--i_weight", "4", "--coupling_width", "32", *TINY)
STAGES = [
    Stage("preprocessing", ("clip.mp4",), ("preprocessing", "--video", "clip.mp4", "--data_dir", "seq", "--num_workers",
                                           "1", "--resume"), frames_and_store),
    Stage("training", ("seq",), ("train.py", "--data_dir", "seq", "--num_iters", "24", "--i_weight", "5", "--i_cache",
                                 "40000", "--coupling_width", "32", *TINY), last_checkpoint),
    Stage("checkpoint writing", ("seq",), ("train.py", "--data_dir", "seq", "--num_iters", "10", "--i_weight", "1",
                                           "--coupling_width", "128", *TINY), last_checkpoint),
    Stage("evaluation", ("seq", "out"), ("eval.py", "--data_dir", "seq", "--annotations", "seq/annotations.npz",
                                         "--query_mode", "first", "--baselines", "static,chain", "--device", "cpu"),
          scores),
    Stage("benchmark", ("small.pkl",), ("eval.py", *QUICK_VIDEO), benchmark_scores),
]


def make_inputs(folder: Path, needed: tuple[str, ...] = ("seq", "small.pkl", "out")) -> None:
    """Write inputs of the stages: a sequence with correspondences (seq), a small benchmark (small.pkl), a run that is
    trained on the sequence (out), and always a clip and query files. Does nothing if they exist."""
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    train_argv = next(stage.argv for stage in STAGES if stage.name == "training")
    for name, argv in (
            ("seq", ("preprocessing", "synthetic", "--data_dir", "seq", "--scene", "easy", "--size", "64", "64",
                     "--num_frames", "8", "--num_points", "16")),
            ("small.pkl", ("preprocessing", "tapvid", "--out", "small.pkl", "--scenes", "easy,occlusion", "--size",
                           "64", "64", "--num_frames", "6", "--num_points", "8")),
            ("seq", ("preprocessing", "--data_dir", "seq")), ("out", train_argv)):
        if name in needed and (outcome := run(argv, folder)).code:
            sys.exit(f"{' '.join(argv)} fails:\n{outcome.text}")

    def clip() -> None:
        write_video(folder / "clip.mp4", open_sequence(folder / "seq").frames())
        save_queries(folder / "queries.npz", np.array([[0, 20, 20], [3, 30, 40]], np.float32), (64, 64))
        (folder / "queries.csv").write_text("t,y,x\n0,20,20\n3,30,40\n")
    in_child(clip)
    (folder / "done").touch()


def fresh(stage: Stage, inputs: Path, folder: Path) -> Path:
    """Empty `folder` and copy the stage's inputs into it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in dict.fromkeys(stage.inputs):
        source = inputs / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copyfile(source, folder / name)
    return folder


def limit_file_size(length: int) -> Callable[[], None]:
    """A `prepare` function that limits the size of files to `length` bytes; longer writes fail, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (length, length))


def damage(data: bytes, random: Random) -> bytes:
    """`data` truncated at a random position, or with one to eight flipped bits."""
    if random.random() < 0.4:
        return data[: random.randrange(len(data))]
    out = bytearray(data)
    for _ in range(random.randrange(1, 9)):
        at = random.randrange(min(len(out), 300)) if random.random() < 0.5 else random.randrange(len(out))
        out[at] ^= 1 << random.randrange(8)
    return bytes(out)
