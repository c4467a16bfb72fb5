"""Time, memory and disk of every stage of tracking a clip: python -m benchmarks.clip

For each clip, a rendered one and folders with color/ and annotations.npz, these commands run one after the other:

    decode, features, flow, chain   parts of `python -m preprocessing`: reading and resizing the frames; features of
                                    all frames; flow of all pairs and its filters; chains and writing of the store
    train                           train.py
    track                           eval.py --queries, NUM_POINTS points
    video, page                     viz.py --what tracks, and page

Measured for each: seconds, CPU seconds of all threads, peak memory (resident, MiB), and the disk space that the stage
adds or, while it runs, needs at most. The tracks of the annotations' points are then scored in the mode `first`.

--rev REV runs every command also with another revision of the project, in turns, so that both see the same load.
--growth renders one scene with 40, 80, 160, and 320 frames; the table clip_growth.json has these as columns.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.cli import Parser, at_least, run
from common.errors import UserError
from common.files import read_json, write_json
from evaluation.tables import COLUMNS, markdown
from loaders.track_files import save_queries

ROOT = Path(__file__).resolve().parents[1]
DAVIS = ROOT.parent / "shared/data/davis/breakdance"
NUM_POINTS = 1_000
GROWTH = (40, 80, 160, 320)  # frames
WARM_UP_STEPS = 2            # of training, before anything of it is timed
POLL_SECONDS = 0.1           # between two readings of memory
DISK_SECONDS = 1.0           # between two readings of disk space
COLUMNS_OF_TABLE = ("clip", "stage", "seconds", "CPU seconds", "peak memory, MiB", "disk, MiB")
STAGES = ("decode", "features", "flow", "chain", "train", "track", "video", "page")
# The parts of preprocessing, in order, and what it prints when a part is done. The last one ends with the process.
PARTS = {"decode": re.compile(r"\d+ frames of \d+x\d+ in "), "features": re.compile("features: 100%"),
         "flow": re.compile("flow: 100%"), "chain": None}
METRICS = {key: title for key, title in COLUMNS.items() if title in ("AJ", "delta_avg")}


@dataclass
class Usage:
    """What one stage needed."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory: float = 0.0  # peak, MiB
    disk: float = 0.0    # peak growth of the stage's folder, MiB

    def plus(self, other: "Usage") -> "Usage":
        """This stage and another one after it."""
        return Usage(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds,
                     max(self.memory, other.memory), max(self.disk, other.disk))


@dataclass
class Side:
    """One revision of the project and its results on a clip."""
    name: str
    project: Path
    preprocessing: list[str]
    num_iters: int
    stages: dict[str, Usage] = field(default_factory=dict)
    store: float = 0.0  # MiB of the finished correspondences
    metrics: dict[str, float] = field(default_factory=dict)


class Watch:
    """A running command: splits its time, memory and disk space into parts, by what it prints."""

    def __init__(self, process: subprocess.Popen, parts: dict[str, re.Pattern | None], folder: Path):
        self.process = process
        self.parts = parts
        self.folder = folder
        self.names = iter(parts)
        self.output = ""
        self.usage: dict[str, Usage] = {}
        self.name = next(self.names)
        self.begin = time.perf_counter()
        self.begin_cpu = 0.0
        self.begin_disk = disk_mib(folder)
        self.memory = 0.0
        self.disk = 0.0
        self.lock = threading.Lock()

    def follow(self) -> None:
        """Wait for the end of the command. UserError with its last line if it failed."""
        poll = threading.Thread(target=self._poll, daemon=True)
        poll.start()
        part = ""
        with self.process.stderr as stream:
            while data := stream.read1(1 << 14):
                text = data.decode(errors="replace")
                self.output = (self.output + text)[-20_000:]
                part += text
                while (done := self.parts[self.name]) and (found := done.search(part)):
                    part = part[found.end():]
                    self._end(*self._read())
                    self.name = next(self.names)
                part = part[-2_000:]
        _, status, rusage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.process.returncode:
            raise UserError(f"{' '.join(self.process.args)} failed: {self.output.strip().splitlines()[-1]}")
        self.memory = max(self.memory, rusage.ru_maxrss / 1024 if len(self.parts) == 1 else 0)
        self._end(rusage.ru_utime + rusage.ru_stime, 0.0)
        poll.join()

    def _end(self, cpu: float, memory: float) -> None:
        with self.lock:
            now = time.perf_counter()
            self.disk = max(self.disk, disk_mib(self.folder) - self.begin_disk)
            self.usage[self.name] = Usage(now - self.begin, cpu - self.begin_cpu, max(self.memory, memory), self.disk)
            self.begin = now
            self.begin_cpu = cpu
            self.begin_disk = disk_mib(self.folder)
            self.memory = self.disk = 0.0

    def _read(self) -> tuple[float, float]:
        """CPU seconds so far, and the memory in MiB now; zeros if the process is gone."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0.0, 0.0
        cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return cpu, pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def _poll(self) -> None:
        next_disk = 0.0
        while self.process.returncode is None:
            memory = self._read()[1]
            disk = None
            if time.perf_counter() > next_disk:
                disk = disk_mib(self.folder)
                next_disk = time.perf_counter() + DISK_SECONDS
            with self.lock:
                self.memory = max(self.memory, memory)
                if disk is not None:
                    self.disk = max(self.disk, disk - self.begin_disk)
            time.sleep(POLL_SECONDS)


def disk_mib(folder: Path) -> float:
    """MiB of all files in a folder, 0 if there is none. Files that vanish meanwhile do not count."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:
                continue
    return total / 2**20


def measure(project: Path, words: list[str], folder: Path, parts: dict | None = None) -> dict[str, Usage]:
    """Run `python WORDS` in a project. folder: where it writes. Usage of the parts, by default of one called "all".

    UserError if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen([sys.executable, *words], cwd=project, env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    watch = Watch(process, parts or {"all": None}, folder)
    watch.follow()
    return watch.usage


@dataclass(frozen=True)
class Clip:
    """A clip: folder with color/ and annotations.npz."""
    name: str
    folder: Path

    def num_frames(self) -> int:
        return len(list((self.folder / "color").iterdir()))


def run_stages(clip: Clip, sides: list[Side], args: argparse.Namespace, out: Path) -> None:
    """Run and measure all stages of all sides on a clip, in turns."""
    queries = out / "queries.npz"
    size = tuple(args.size)
    rng = np.random.default_rng(0)
    save_queries(queries, np.column_stack([rng.integers(0, clip.num_frames(), NUM_POINTS), *(
        rng.uniform(0, side - 1, NUM_POINTS) for side in size)]).astype(np.float32), size)
    for side in sides:
        measure_into(side, out / side.name / "seq", PARTS, ["-m", "preprocessing", "--video", clip.folder / "color",
                     "--data_dir", out / side.name / "seq", "--resize", *size, *side.preprocessing])
        side.store = disk_mib(out / side.name / "seq/correspondences")
    for side in sides:  # C++ kernels are compiled once on a machine, which is not timed
        folder = out / side.name
        measure(side.project, as_text(["train.py", "--config", side.project / args.config, "--data_dir",
                folder / "seq", "--save_dir", folder / "warm_up", "--num_iters", WARM_UP_STEPS]), folder)
    for stage in ("train", "track", "video", "page"):
        for side in sides:
            folder = out / side.name
            common = ["--config", side.project / args.config, "--data_dir", folder / "seq", "--save_dir",
                      folder / "runs", "--expname", "clip", "--num_imgs", clip.num_frames()]
            words = {"train": ["train.py", *common, "--num_iters", side.num_iters],
                     "track": ["eval.py", *common, "--queries", queries, "--coordinates", "frames", "--out",
                               folder / "tracks/tracks.npz"],
                     "video": ["viz.py", *common, "--what", "tracks", "--out_dir", folder / "video"],
                     "page": ["viz.py", *common, "--what", "page", "--out_dir", folder / "page"]}[stage]
            written = {"train": "runs", "track": "tracks", "video": "video", "page": "page"}[stage]
            measure_into(side, folder / written, {stage: None}, words)
    for side in sides:
        folder = out / side.name
        metrics = folder / "metrics.json"
        measure(side.project, as_text(["eval.py", "--config", side.project / args.config, "--data_dir", folder / "seq",
                "--save_dir", folder / "runs", "--expname", "clip", "--num_imgs", clip.num_frames(), "--query_mode",
                "first", "--annotations",
                clip.folder / "annotations.npz", "--out", metrics]), folder)
        found = read_json(metrics, "remove it")
        side.metrics = {title: found[key] for key, title in METRICS.items()}


def measure_into(side: Side, folder: Path, parts: dict, words: list) -> None:
    """Run a command of a side and add its parts to the side's stages."""
    side.stages |= measure(side.project, as_text(words), folder, parts)
    for name in parts:
        usage = side.stages[name]
        print(f"{side.name:12} {name:9} {usage.seconds:8.1f} s {usage.cpu_seconds:8.1f} CPU s {usage.memory:7.0f} MiB "
              f"memory {usage.disk:8.1f} MiB disk", flush=True)


def as_text(words: list) -> list[str]:
    """Words of a command line."""
    return [str(word) for word in words]


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A temporary git worktree of a revision of this project. UserError if there is no such revision."""
    with tempfile.TemporaryDirectory(prefix="clip-") as parent:
        path = Path(parent) / "project"
        made = subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(path), revision],
                              capture_output=True, text=True)
        if made.returncode:
            raise UserError(f"--rev {revision}: {made.stderr.strip().splitlines()[-1]}")
        try:
            yield path
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(path)], capture_output=True)


def rendered(out: Path, num_frames: int, args: argparse.Namespace) -> Clip:
    """A rendered clip."""
    folder = out / f"{args.scene}_{num_frames}"
    measure(ROOT, as_text(["-m", "preprocessing", "synthetic", "--data_dir", folder, "--scene", args.scene, "--size",
                           *args.size, "--num_frames", num_frames]), folder)
    return Clip(f"`{args.scene}`, {num_frames} frames", folder)


def given(folder: str) -> Clip:
    """A clip of the user. UserError if it lacks frames or annotations."""
    path = Path(folder).resolve()
    if not (path / "color").is_dir() or not (path / "annotations.npz").is_file():
        raise UserError(f"{folder} has no color/ and annotations.npz: give a folder of a clip")
    clip = Clip(path.name, path)
    return Clip(f"{path.name}, {clip.num_frames()} frames", path)


def rows_of(clip: Clip, sides: list[Side]) -> list[list[str]]:
    """Rows of the table: the stages of a clip, the whole, and the metrics. Values of two sides stand in one cell."""
    whole = []
    for side in sides:
        total = Usage()
        for name in STAGES:
            total = total.plus(side.stages[name])
        total.disk = side.store
        whole.append(total)
    measured = {name: [side.stages[name] for side in sides] for name in STAGES} | {"whole, finished store": whole}
    rows = [[clip.name, name, *(" → ".join(f"{value:.{digits}f}" for value in values) for values, digits in (
        ([usage.seconds for usage in usages], 1), ([usage.cpu_seconds for usage in usages], 1),
        ([usage.memory for usage in usages], 0), ([usage.disk for usage in usages], 0)))]
        for name, usages in measured.items()]
    scores = (" → ".join(f"{side.metrics[title]:.3f}" for side in sides) for title in METRICS.values())
    return [*rows, [clip.name, "AJ; delta_avg", *scores, "", ""]]


def growth_table(sides: list[Side], args: argparse.Namespace) -> dict:
    """The table clip_growth, from one side for each number of frames in GROWTH."""
    def row(name: str, value: Callable[[Side], float]) -> list[str]:
        values = [value(side) for side in sides]
        return [name, *(f"{v:.0f}" for v in values), f"{values[-1] / values[1]:.1f}"]

    def seconds(*stages: str) -> Callable[[Side], float]:
        return lambda side: sum(side.stages[name].seconds for name in stages)

    rows = [row("preprocessing, seconds", seconds(*PARTS)),
            *(row(f"{name}, seconds", seconds(name)) for name in STAGES if name not in PARTS),
            row("all stages, seconds", seconds(*STAGES)),
            row("all stages, CPU seconds", lambda side: sum(usage.cpu_seconds for usage in side.stages.values())),
            row("preprocessing, peak memory, MiB", lambda side: max(side.stages[name].memory for name in PARTS)),
            row("train, peak memory, MiB", lambda side: side.stages["train"].memory),
            row("preprocessing, peak disk, MiB", lambda side: max(side.stages[name].disk for name in PARTS))]
    first, *others = map(str, GROWTH)
    return {"title": f"Rendered scene `{args.scene}`, {args.size[1]}x{args.size[0]}, {args.num_iters:,} training steps",
            "columns": ["", f"{first} frames", *others, f"{GROWTH[-1]} / {GROWTH[1]}"], "rows": rows}


def benchmark(args: argparse.Namespace, out: Path) -> list[tuple[Clip, list[Side]]]:
    """Run everything: the sides of each clip. Folders of the same clips in `out` are deleted first."""
    clips = [given(folder) for folder in args.clips]
    clips += [rendered(out, num_frames, args) for num_frames in args.frames]
    now = ("now", ROOT, shlex.split(args.preprocessing), args.num_iters)
    found = []
    with worktree(args.rev) if args.rev else nullcontext() as project:
        before = ("before", project, shlex.split(args.rev_preprocessing), args.rev_num_iters)
        for clip in clips:
            sides = [Side(*settings) for settings in ([before, now] if project else [now])]
            print(clip.name, flush=True)
            folder = out / "work" / clip.name.split(",")[0].strip("`")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            run_stages(clip, sides, args, folder)
            found.append((clip, sides))
            if not args.keep_work:
                shutil.rmtree(folder)
    return found


def main() -> None:
    parser = Parser(prog="python -m benchmarks.clip", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--clips", nargs="*", default=[str(DAVIS)] if DAVIS.is_dir() else [], help="folders of clips besides the "
        "rendered one")
    add("--scene", default="occlusion", help="rendered scene")
    add("--frames", type=at_least(2), nargs="*", default=[80], help="numbers of frames of the rendered scene; none: "
        "no rendered scene")
    add("--growth", action="store_true", help=f"the rendered scene only, with {', '.join(map(str, GROWTH))} frames")
    add("--size", type=at_least(48), nargs=2, metavar=("H", "W"), default=(256, 256), help="frame size in pixels")
    add("--config", default="configs/fast.txt", help="preset; each revision uses its own")
    add("--num_iters", type=at_least(1), default=1_000, help="training steps")
    add("--preprocessing", default="", help="options of python -m preprocessing")
    add("--rev", default="", help="another revision to compare with")
    add("--rev_preprocessing", help="its options of python -m preprocessing (default: those of --preprocessing)")
    add("--rev_num_iters", type=at_least(1), help="its training steps (default: those of --num_iters)")
    add("--out", default="out/clip", help="folder of the clips, the work and clip.json")
    add("--keep_work", action="store_true", help="keep the sequences and runs")
    args = parser.parse_args()
    if args.growth:
        args.clips = []
        args.frames = GROWTH
    if args.rev_preprocessing is None:
        args.rev_preprocessing = args.preprocessing
    args.rev_num_iters = args.rev_num_iters or args.num_iters
    found = benchmark(args, Path(args.out).resolve())
    rows = [row for clip, sides in found for row in rows_of(clip, sides)]
    steps = f"{args.rev_num_iters} → " if args.rev and args.rev_num_iters != args.num_iters else ""
    title = f"{args.size[1]}x{args.size[0]}, {steps}{args.num_iters} training steps"
    if args.rev:
        title += f"; commit {args.rev} → this one"
    command = shlex.join(["python", "-m", "benchmarks.clip", *sys.argv[1:]])
    write_json(Path(args.out) / "clip.json", {"title": title, "columns": COLUMNS_OF_TABLE, "rows": rows,
                                              "command": command})
    print(markdown(COLUMNS_OF_TABLE, rows))
    if args.growth:
        table = growth_table([sides[-1] for _, sides in found], args)
        write_json(Path(args.out) / "clip_growth.json", table | {"command": command})
        print(f"\n{markdown(table['columns'], table['rows'])}")


if __name__ == "__main__":
    run(main)
