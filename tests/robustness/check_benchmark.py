"""Check that benchmark results do not depend on how it was run: python -m tests.robustness.check_benchmark [--ray]

Runs the benchmark on a small TAP-Vid file of four synthetic scenes: (1) without interruption; (2) killed half way
(SIGKILL to all processes) and run again; (3) with --ray, on two local Ray workers, one of which is killed. The metrics
of all videos must be exactly equal. Options after -- are passed on to eval.py.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--config configs/small.txt --num_iters 40 --num_pairs 4 --coupling_width 32 --affine_width 16 "
         "--field_width 32 --i_img 0 --query_mode first --baselines static,chain --preprocessing=").split()


def main() -> None:
    """Run the benchmark in each way and compare the metrics; exit code 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="out/check_benchmark", help="working folder; emptied first")
    parser.add_argument("--ray", action="store_true", help="also run on Ray (pip install -r requirements-ray.txt)")
    parser.add_argument("options", nargs="*", help="options of eval.py, after --")
    args = parser.parse_args()
    folder = Path(args.folder).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    file = folder / "synthetic.pkl"
    options = [*QUICK, *args.options]
    run([sys.executable, "-m", "preprocessing", "tapvid", "--out", str(file)])

    ways = {"in one go": lambda out: run(command(file, out, options)),
            "killed, run again": lambda out: killed(file, out, options)}
    if args.ray:
        ways["Ray, a worker killed"] = lambda out: on_ray(file, out, options)
    metrics = {}
    for name, way in ways.items():
        print(f"== {name}", flush=True)
        out = folder / name.replace(",", "").replace(" ", "_")
        way(out)
        metrics[name] = read_metrics(out)
    report(metrics)


def command(file: Path, out: Path, options: list[str]) -> list[str]:
    """The benchmark's command line."""
    return [sys.executable, "eval.py", "--tapvid", str(file), "--save_dir", str(out), *options]


def start(arguments: list[str]) -> subprocess.Popen:
    """Start a command in its own process group. The test suite replaces this function by one that forks."""
    return subprocess.Popen(arguments, cwd=ROOT, start_new_session=True)


def run(arguments: list[str]) -> None:
    """Run a command to its end; exit if it fails."""
    if code := start(arguments).wait():
        sys.exit(f"exit code {code}: {' '.join(arguments)}")


def killed(file: Path, out: Path, options: list[str], done: int = 2) -> None:
    """Send SIGKILL to the process group while a video is being trained, with `done` videos finished; then run the same
    command again. Results of finished videos must not be written again."""
    process = start(command(file, out, options))
    wait_for(lambda: len(results(out)) >= done and under_way(out, "train"), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.read_bytes() for path in results(out)}
    print(f"== killed with {len(finished)} videos done; again", flush=True)
    run(command(file, out, options))
    if rewritten := [path.stem for path, content in finished.items() if path.read_bytes() != content]:
        sys.exit(f"results of finished videos changed: {', '.join(rewritten)}")


def on_ray(file: Path, out: Path, options: list[str]) -> None:
    """Run the benchmark on two local Ray workers, and kill one of them during training."""
    process = subprocess.Popen([*command(file, out, options), "--ray"], cwd=ROOT)
    wait_for(lambda: under_way(out, "train"), process)
    victim = under_way(out, "train")[0]
    os.kill(victim["pid"], signal.SIGKILL)
    print(f"\n== killed Ray's worker {victim['pid']}, which trained {victim['video']}", flush=True)
    if process.wait():
        sys.exit("the run on Ray failed")


def results(out: Path) -> list[Path]:
    """The result files of the model, one for each finished video."""
    return [path for path in out.glob("*/first/model/*.json") if path.name != "settings.json"]


def under_way(out: Path, stage: str) -> list[dict]:
    """The contents of the running files of the videos that are in `stage`."""
    try:
        states = [json.loads(path.read_text()) for path in out.glob("*/first/*.running")]
    except FileNotFoundError:  # a video finished after the glob
        return []
    return [state for state in states if state["stage"] == stage]


def wait_for(condition, process: subprocess.Popen) -> None:
    """Wait until `condition()` is true; exit if the process ends first."""
    while not condition():
        if process.poll() is not None:
            sys.exit("the run ended before it could be disturbed: give more --num_iters")
        time.sleep(0.05)


def read_metrics(out: Path) -> dict:
    """Metrics of results.json, by tracker and video."""
    (path,) = out.glob("*/first/results.json")
    trackers = json.loads(path.read_text())["trackers"]
    return {name: {video: record["metrics"] for video, record in tracker["videos"].items()}
            for name, tracker in trackers.items()}


def report(metrics: dict[str, dict]) -> None:
    """Print the model's average Jaccard of every video and whether all metrics are equal; exit code 1 if not."""
    reference = next(iter(metrics.values()))
    for name, found in metrics.items():
        cells = "  ".join(f"{video} {row['average_jaccard']:.6f}" for video, row in found["model"].items())
        print(f"{name:22}{cells}  {'all metrics the same' if found == reference else 'DIFFERENT'}")
    sys.exit(any(found != reference for found in metrics.values()))


if __name__ == "__main__":
    main()
