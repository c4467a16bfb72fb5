"""Fault-injection tests (make faults): python -m tests.robustness.faults [--kills 200] [--inputs 20000] [--minutes M]

parts:
  kills   SIGKILL at random times during preprocessing, training, checkpoint writing, evaluation, and a benchmark. The
          same command is run again, and possibly killed again, until it finishes. Its result must equal the result of
          an uninterrupted run, byte for byte. After every kill, all files with a final name must be readable.
  disk    A full disk (a small tmpfs where mounting is permitted, otherwise a limit on the file size), and a read-only
          disk. The command must print one clear error line, and files saved earlier must be intact. After the disk is
          restored, the command must resume and give the same result.
  vanish  The sequence folder is renamed during the run. The command must finish or print one clear error line.
  files   Input files that are truncated or have flipped bits. The command must finish or print one clear error line.
  fuzz    Fuzz tests of the file readers (tests/robustness/fuzz.py).

The whole campaign takes hours. The same command resumes it where it stopped; --fresh starts a new one. The report is
OUT/faults.md; OUT/events has one JSON object for each test. The exit code is 1 if a test failed.
"""

import argparse
import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # fixed summation order; must be set before PyTorch is imported

from tests.robustness import fault_runs as runs
from tests.robustness import fuzz
from tests.robustness.fault_runs import STAGES, Stage
from tests.robustness.fuzz_kinds import KINDS

log = logging.getLogger("faults")
SHARES = {"preprocessing": 30, "training": 25, "checkpoint writing": 22, "evaluation": 20, "benchmark": 3}  # percent
ROOMS = (0.02, 0.2, 0.5, 0.8, 0.95)  # disk sizes, as fractions of the bytes that a stage writes
FILES = {  # file to damage -> the stage, or the options of eval.py, that read it
    "clip.mp4": "preprocessing", "seq/color/00003.png": "training", "seq/correspondences/meta.json": "training",
    "seq/correspondences/00002.row": "training", "seq/annotations.npz": "evaluation",
    "queries.npz": ("--queries", "queries.npz", "--out", "t.npz"), "queries.csv": ("--queries", "queries.csv"),
    "small.pkl": ("--tapvid", "small.pkl", "--no-score_model", "--baselines", "static"),
    "out/default_seq/model_000024.pth": "evaluation",
    "out/default_seq/args.txt": ("--config", "out/default_seq/args.txt", "--queries", "queries.csv")}


@dataclass
class Campaign:
    """A campaign's folder, its deadline (`time.monotonic` seconds) and its recorded events.

    An event is a dictionary with "fault" (kind of fault), "what" (stage or file), "lost" (description of lost or wrong
    data, empty if none) and "unclear" (unclear error output, empty if none)."""
    folder: Path
    deadline: float

    @property
    def events(self) -> list[dict]:
        """All events recorded so far."""
        path = self.folder / "events"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def add(self, fault: str, what: str, lost: str = "", unclear: str = "", **more) -> None:
        """Append an event to the events file, and log it if the test failed."""
        with open(self.folder / "events", "a") as file:
            file.write(json.dumps({"fault": fault, "what": what, "lost": lost, "unclear": unclear, **more}) + "\n")
        if lost or unclear:
            log.error("%s, %s: %s", fault, what, lost or unclear)

    def count(self, fault: str, what: str = "") -> int:
        """Number of events of a fault whose "what" begins with `what`."""
        return sum(event["fault"] == fault and event["what"].startswith(what) for event in self.events)

    def out_of_time(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() > self.deadline


def reference(campaign: Campaign, stage: Stage) -> dict:
    """Result, seconds and written bytes of an uninterrupted run of the stage; computed once and cached in a file."""
    path = campaign.folder / f"reference-{stage.name.replace(' ', '-')}.json"
    if not path.exists():
        folder = runs.fresh(stage, campaign.folder / "inputs", campaign.folder / "reference")
        before = used(folder)
        outcome = runs.run(stage.argv, folder)
        if outcome.code:
            sys.exit(f"the uninterrupted run of {stage.name} fails:\n{outcome.text}")
        result = runs.in_child(lambda: stage.result(folder))
        path.write_text(json.dumps({"result": result, "seconds": outcome.seconds, "bytes": used(folder) - before}))
    return json.loads(path.read_text())


def kills(campaign: Campaign, stage: Stage, wanted: int, random: Random) -> None:
    """Kill and resume runs of the stage until `wanted` kills are recorded.

    Each run is killed at most 6 times, then it finishes."""
    expected = reference(campaign, stage)
    most = min(wanted, 6)
    while campaign.count("kill", stage.name) < wanted and not campaign.out_of_time():
        folder, killed, step = runs.fresh(stage, campaign.folder / "inputs", campaign.folder / "work"), 0, 0
        while True:
            after = random.uniform(0.0, 0.8) * expected["seconds"] if killed < most else None
            outcome = runs.run(stage.argv, folder, after)
            if outcome.code != -9:
                break
            killed += 1
            wrong = {name: why for name, why in runs.in_child(lambda f=folder: runs.saved_files(f)).items() if why}
            now = runs.newest_step(folder)
            lost = f"damaged: {wrong}" if wrong else f"step {now} after {step}" if now < step else ""
            campaign.add("kill", stage.name, lost, after=after)
            step = now
        if killed:
            finish(campaign, "kill, then the end", stage, folder, outcome, expected)


def finish(campaign: Campaign, fault: str, stage: Stage, folder: Path, outcome: runs.Outcome, expected: dict) -> None:
    """Record whether the final run succeeded with the same result as an uninterrupted run."""
    if outcome.code:
        campaign.add(fault, stage.name, "no result", "" if outcome.is_clear() else tail(outcome))
        return
    result = runs.in_child(lambda: stage.result(folder))
    other = sorted(key for key in expected["result"].keys() | result.keys()
                   if expected["result"].get(key) != result.get(key))
    campaign.add(fault, stage.name, f"another result: {', '.join(other)}" if other else "")


def full_disk(campaign: Campaign, stage: Stage, rooms: tuple[float, ...] = ROOMS) -> None:
    """Run the stage on disks that are too small, one for each of `rooms`; then enlarge the disk and run it again."""
    expected = reference(campaign, stage)
    for share in rooms:
        what = f"{stage.name}, room for {share:.0%}"
        if campaign.count("full disk", what) or campaign.out_of_time():
            continue
        with small_disk(campaign.folder / "disk") as disk:
            folder = runs.fresh(stage, campaign.folder / "inputs", disk.path / "work")
            room = used(folder) + int(share * expected["bytes"])
            disk.resize(room)
            limit = runs.limit_file_size(max(int(share * largest(campaign, stage)), 1)) if not disk.mounted else None
            outcome = runs.run(stage.argv, folder, prepare=limit or (lambda: None))
            judge(campaign, "full disk", what, folder, outcome, must_fail=False)
            disk.resize(1 << 30)
            finish(campaign, "full disk, then room", stage, folder, runs.run(stage.argv, folder), expected)


def read_only(campaign: Campaign, stage: Stage) -> None:
    """Run the stage on a disk that is read-only from the start, or from one second after the start."""
    expected = reference(campaign, stage)
    for what, later in ((f"{stage.name}, from the start", False), (f"{stage.name}, from a second on", True)):
        if campaign.count("read-only disk", what) or campaign.out_of_time():
            continue
        with small_disk(campaign.folder / "disk") as disk:
            if not disk.mounted:
                log.warning("read-only: mounting is not permitted here; left out")
                return
            folder = runs.fresh(stage, campaign.folder / "inputs", disk.path / "work")
            (folder / "log.txt").touch()
            if not later:
                disk.read_only(True)
            log_folder = campaign.folder / "log"
            log_folder.mkdir(exist_ok=True)
            outcome = runs.run(stage.argv, folder, meanwhile=(lambda d=disk: d.read_only(True)) if later else None,
                               log=log_folder / "log.txt")
            disk.read_only(False)
            judge(campaign, "read-only disk", what, folder, outcome, must_fail=not later)
            finish(campaign, "read-only disk, then writable", stage, folder, runs.run(stage.argv, folder), expected)


def vanishing(campaign: Campaign, random: Random, count: int) -> None:
    """Rename the sequence folder while the command runs; `count` tests."""
    for k in range(campaign.count("vanishing sequence"), count):
        if campaign.out_of_time():
            return
        stage = [stage for stage in STAGES if "seq" in stage.inputs][k % 3]
        folder = runs.fresh(stage, campaign.folder / "inputs", campaign.folder / "work")
        outcome = runs.run(stage.argv, folder, meanwhile=lambda f=folder: (f / "seq").rename(f / "gone"),
                           delay=random.uniform(0, 0.8) * reference(campaign, stage)["seconds"])
        judge(campaign, "vanishing sequence", stage.name, folder, outcome, must_fail=False)


def damaged_files(campaign: Campaign, random: Random, each: int, files: dict = FILES) -> None:
    """Damage each of `files` in `each` random ways, and run the command that reads it."""
    stages = {stage.name: stage for stage in STAGES}
    for name, reader in files.items():
        while campaign.count("damaged file", name) < each and not campaign.out_of_time():
            stage = stages.get(reader) if isinstance(reader, str) else Stage(
                name, ("seq", "out", name.partition("/")[0], "queries.csv"),
                ("eval.py", "--data_dir", "seq", "--device", "cpu", "--num_iters", "24", *reader), dict)
            folder = runs.fresh(stage, campaign.folder / "inputs", campaign.folder / "work")
            path = folder / name
            path.write_bytes(runs.damage(path.read_bytes(), random))
            outcome = runs.run(stage.argv, folder)
            campaign.add("damaged file", name, unclear="" if outcome.is_clear() or said(outcome) else tail(outcome),
                         code=outcome.code)


def fuzzing(campaign: Campaign, inputs: int, seed: int) -> None:
    """Fuzz every kind of file, with `inputs` inputs in total."""
    total = sum(kind.share for kind in KINDS)
    for kind in KINDS:
        if campaign.count("fuzz", kind.name) or campaign.out_of_time():
            continue
        shutil.rmtree(campaign.folder / "fuzz" / kind.name, ignore_errors=True)
        tally = fuzz.fuzz_apart(kind, -(-inputs * kind.share // total), seed, campaign.folder / "fuzz" / kind.name)
        campaign.add("fuzz", kind.name, unclear="; ".join(tally.failures), inputs=tally.inputs, read=tally.read,
                     refused=tally.refused)


def judge(campaign: Campaign, fault: str, what: str, folder: Path, outcome: runs.Outcome, must_fail: bool) -> None:
    """Record whether the command ended with one clear error line and all files with a final name are intact."""
    wrong = {name: why for name, why in runs.in_child(lambda: runs.saved_files(folder)).items() if why}
    unclear = "" if outcome.is_clear() or said(outcome) else tail(outcome)
    if must_fail and outcome.code == 0:
        unclear = "exit code 0 although the disk was read-only"
    campaign.add(fault, what, f"damaged: {wrong}" if wrong else "", unclear, code=outcome.code)


def said(outcome: runs.Outcome) -> bool:
    """Whether this is a benchmark that reported a failed video, continued with the others and exited with code 1."""
    return outcome.code == 1 and "Traceback" not in outcome.text and "failed" in outcome.text


def tail(outcome: runs.Outcome) -> str:
    """The exit code and the last lines of the output."""
    return f"code {outcome.code}: " + " / ".join(outcome.text.strip().splitlines()[-3:])[-500:]


def used(folder: Path) -> int:
    """Bytes that the files of a folder occupy on a tmpfs, which allocates pages of 4096 bytes."""
    return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in folder.rglob("*"))


def largest(campaign: Campaign, stage: Stage) -> int:
    """Bytes of the largest file in the folder of the latest uninterrupted run."""
    return max(path.stat().st_size for path in (campaign.folder / "reference").rglob("*") if path.is_file())


class small_disk:  # noqa: N801  a context manager
    """A tmpfs mounted at `path`; a plain folder where mounting is not permitted (then `mounted` is False)."""

    def __init__(self, path: Path):
        self.path, self.mounted = path, False

    def __enter__(self) -> "small_disk":
        if os.path.ismount(self.path):  # left by a campaign that was killed
            subprocess.run(["umount", "-l", str(self.path)], check=True)
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        self.mounted = self._mount("-t", "tmpfs", "-o", "size=1g", "tmpfs")
        return self

    def resize(self, length: int) -> None:
        """Set the total size of the disk to `length` bytes."""
        if self.mounted:
            self._mount("-o", f"remount,rw,size={max(length, 4096)}")

    def read_only(self, on: bool) -> None:
        """Remount the disk read-only (`on`) or writable."""
        self._mount("-o", f"remount,{'ro' if on else 'rw'}")

    def __exit__(self, *error: object) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.path)], check=True)

    def _mount(self, *arguments: str) -> bool:
        if shutil.which("mount") is None:
            return False
        return subprocess.run(["mount", *arguments, str(self.path)], capture_output=True, check=False).returncode == 0


def rows(events: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """The rows of the report: (title, events), one for each fault and stage. Fuzz events are left out."""
    names = {"kill": "SIGKILL", "kill, then the end": "SIGKILL, resumed to the end"}
    for fault in dict.fromkeys(event["fault"] for event in events):
        if fault == "fuzz":
            continue
        own = [event for event in events if event["fault"] == fault]
        for what in dict.fromkeys(event["what"].partition(",")[0] for event in own):
            yield f"{names.get(fault, fault)}: {what}", [e for e in own if e["what"].partition(",")[0] == what]


def code_hash() -> str:
    """Hash of the project's code. Cached reference results are valid only for the code that produced them."""
    paths = sorted(path for path in runs.ROOT.rglob("*.py") if not {".venv", "out"} & set(path.parts))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def report(campaign: Campaign) -> str:
    """The report: the tables in Markdown."""
    events = campaign.events
    lines = ["| fault | runs | survived | lost data | no clear message |", "|---|---|---|---|---|"]
    total = [0, 0, 0, 0]
    for name, own in rows(events):
        lost, unclear = sum(bool(e["lost"]) for e in own), sum(bool(e["unclear"]) for e in own)
        cells = [len(own), sum(not e["lost"] and not e["unclear"] for e in own), lost, unclear]
        total = [a + b for a, b in zip(total, cells, strict=True)]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    lines.append(f"| all | {' | '.join(map(str, total))} |")
    tallies = [fuzz.Tally(e["what"], e["inputs"], e["read"], e["refused"], list(filter(None, [e["unclear"]])))
               for e in events if e["fault"] == "fuzz"]
    killed = sum(event["fault"] == "kill" for event in events)
    return "\n".join([f"{killed} kills.", "", *lines, "", fuzz.table(tallies), ""])


def main() -> None:
    """Start or resume the campaign; exit code 1 if any test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="number of kills over all stages (200)")
    parser.add_argument("--inputs", type=int, default=20_000, help="number of fuzz inputs over all readers (20000)")
    parser.add_argument("--files", type=int, default=8, help="number of times each file is damaged (8)")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time; the same command resumes")
    parser.add_argument("--parts", default="kills,disk,vanish,files,fuzz",
                        help="comma-separated parts to run (all)")
    parser.add_argument("--stages", default=",".join(SHARES),
                        help=f"comma-separated stages for kills and disk: {', '.join(SHARES)} (all)")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--out", default="out/faults", help="folder of the campaign (out/faults)")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier campaign in OUT first")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder, parts = Path(args.out).resolve(), args.parts.split(",")
    if args.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if (code := folder / "code").exists() and code.read_text() != code_hash():
        sys.exit(f"the campaign in {folder} was started with other code: --fresh starts a new one")
    code.write_text(code_hash())
    campaign = Campaign(folder, time.monotonic() + 60 * args.minutes)
    alone = open(folder / "lock", "w")  # kept open, and so locked, until the process exits
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"another campaign is running in {folder}: give another --out")
    if parts != ["fuzz"]:
        runs.make_inputs(folder / "inputs")
    random = Random(args.seed + len(campaign.events))
    for stage in (stage for stage in STAGES if stage.name in args.stages.split(",")):
        if "kills" in parts:
            kills(campaign, stage, args.kills * SHARES[stage.name] // 100, random)
        if "disk" in parts:
            full_disk(campaign, stage)
            read_only(campaign, stage)
        log.info("%s: %d kills", stage.name, campaign.count("kill", stage.name))
    if "vanish" in parts:
        vanishing(campaign, random, 12)
    if "files" in parts:
        damaged_files(campaign, random, args.files)
    if "fuzz" in parts:
        fuzzing(campaign, args.inputs, args.seed)
    (folder / "faults.md").write_text(text := report(campaign))
    sys.stdout.write(text)
    sys.exit(any(event["lost"] or event["unclear"] for event in campaign.events))


if __name__ == "__main__":
    main()
