"""Check that preprocessing resumes to identical files: python -m tests.robustness.check_resume --video V

A short, downscaled version of the video is preprocessed without interruption, and again with SIGKILL at random times
and a resume after each. All correspondence files must be equal, byte for byte. With --weights_dir, the check also runs
for RAFT, with the best of RAFT's released weights in that folder. Options after -- are passed on to
`python -m preprocessing`.
"""

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Check every flow source; exit code 1 if the files differ for one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", required=True, help="video or folder of images")
    parser.add_argument("--weights_dir", help="also check RAFT, with the weights in this folder")
    parser.add_argument("--folder", default="out/check_resume", help="working folder; emptied first")
    parser.add_argument("--kills", type=int, default=5, help="number of kills per flow source")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the times of the kills")
    parser.add_argument("--frames", type=int, default=12, help="number of frames")
    parser.add_argument("--side", type=int, default=96, help="side of the square frames, in pixels")
    parser.add_argument("options", nargs="*", help="options of `python -m preprocessing`, after --")
    args = parser.parse_args()
    folder = Path(args.folder).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    sources = {"dis": []}
    if args.weights_dir:
        sources["raft"] = ["--weights_dir", str(Path(args.weights_dir).resolve()), "--offline"]
    same = []
    for flow, options in sources.items():
        command = [sys.executable, "-m", "preprocessing", "--video", str(Path(args.video).resolve()), "--max_frames",
                   str(args.frames), "--resize", str(args.side), str(args.side), "--flow", flow, "--resume",
                   *options, *args.options]
        equal, line = check(command, folder / flow, args.kills, args.seed)
        same.append(equal)
        print(f"{flow}: {line}", flush=True)
    sys.exit(not all(same))


def check(command: list[str], folder: Path, kills: int, seed: int) -> tuple[bool, str]:
    """Run preprocessing in FOLDER/whole without interruption, and in FOLDER/killed with `kills` kills.

    command: the command line without --data_dir. Returns whether all files are equal, and a line of report."""
    whole, killed = folder / "whole", folder / "killed"
    process = start_and_wait([*command, "--data_dir", str(whole)], whole)
    begin = time.monotonic()
    finish(process)
    working = time.monotonic() - begin
    dice = random.Random(seed)
    while (moments := kill([*command, "--data_dir", str(killed)], killed, kills, dice, working)) is None:
        shutil.rmtree(killed)
        working /= 2
    stores = [contents(path / "correspondences") for path in (whole, killed)]
    equal = stores[0] == stores[1]
    verdict = "all the same" if equal else "DIFFERENT"
    return equal, f"killed after {', '.join(moments)}; {len(stores[0])} files, {verdict}"


def start(command: list[str]) -> subprocess.Popen:
    """Start a command. The test suite replaces this function by one that forks, to save imports."""
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


def start_and_wait(command: list[str], folder: Path) -> subprocess.Popen:
    """Start a run and wait until it has written a file of correspondences."""
    begin = time.time()
    process = start(command)
    while process.poll() is None and newest(folder / "correspondences") < begin:
        time.sleep(0.01)
    return process


def newest(store: Path) -> float:
    """Time at which the newest flow or row was written; 0 if there is none."""
    times = [0.0]
    for path in [*store.glob("parts/0*/*[0-9].*"), *store.glob("*.row")]:
        try:
            times.append(path.stat().st_mtime)
        except FileNotFoundError:  # moved into a row file after the glob
            continue
    return max(times)


def finish(process: subprocess.Popen) -> None:
    """Wait for the end of the run; exit if it failed."""
    if process.wait():
        sys.exit(f"failed: {' '.join(process.args)}")


def kill(command: list[str], folder: Path, times: int, dice: random.Random,
         working: float) -> list[str] | None:
    """Kill the run `times` times at random times, resume it after each, and let it finish.

    working: seconds of work of an uninterrupted run. Returns, for each kill, the counts of files written so far; None
    if the run ended before a kill."""
    cuts = sorted(dice.uniform(0, 0.7 * working) for _ in range(times))  # only the first 70%: this run may be faster
    moments = []
    for begin, end in zip([0.0, *cuts], cuts, strict=False):
        process = start_and_wait(command, folder)
        time.sleep(end - begin)
        process.kill()
        if process.wait() == 0:
            return None
        store = folder / "correspondences"
        flows, rows = (len(list(store.glob(pattern))) for pattern in ("parts/0*/*.pair", "*.row"))
        moments.append(f"{flows} flows + {rows} rows")
    finish(start_and_wait(command, folder))
    return moments


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files of finished correspondences, by relative path."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


if __name__ == "__main__":
    main()
