"""Check that a benchmark's numbers do not depend on how it was run: python -m tests.robustness.check_benchmark [--ray]

A small TAP-Vid file of four synthetic scenes is scored (1) in one go, (2) killed half way (SIGKILL, to all processes)
and started again, and with --ray (3) on two local Ray workers, one of which is killed. The metrics of all videos must
be equal to the last digit. Options after -- are passed on to eval.py.
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
    """Run all ways and compare; exit code 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="out/check_benchmark", help="where to work; emptied first")
    parser.add_argument("--ray", action="store_true", help="also on Ray (pip install -r requirements-ray.txt)")
    parser.add_argument("options", nargs="*", help="options of eval.py, after --")
    args = parser.parse_args()
    folder = Path(args.folder).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    file = folder / "synthetic.pkl"
    run([sys.executable, "-m", "preprocessing", "tapvid", "--out", str(file)])

    ways = {"in one go": lambda out: run(command(file, out, args.options)),
            "killed, run again": lambda out: killed(file, out, args.options)}
    if args.ray:
        ways["Ray, a worker killed"] = lambda out: on_ray(file, out, args.options)
    metrics = {}
    for name, way in ways.items():
        print(f"== {name}", flush=True)
        out = folder / name.replace(",", "").replace(" ", "_")
        way(out)
        metrics[name] = read_metrics(out)
    report(metrics)


def command(file: Path, out: Path, options: list[str]) -> list[str]:
    """The benchmark's command line."""
    return [sys.executable, "eval.py", "--tapvid", str(file), "--save_dir", str(out), *QUICK, *options]


def run(arguments: list[str]) -> None:
    """Run to the end, or stop this check."""
    if code := subprocess.run(arguments, cwd=ROOT).returncode:
        sys.exit(f"exit code {code}: {' '.join(arguments)}")


def killed(file: Path, out: Path, options: list[str]) -> None:
    """SIGKILL to the whole process group while the third video is in training, then the same command."""
    process = subprocess.Popen(command(file, out, options), cwd=ROOT, start_new_session=True)
    wait_for(lambda: len(results(out)) >= 2 and under_way(out, "train"), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    print(f"== killed with {len(results(out))} of 4 videos done; again", flush=True)
    run(command(file, out, options))


def on_ray(file: Path, out: Path, options: list[str]) -> None:
    """Two workers on this machine, one of them killed in training."""
    process = subprocess.Popen([*command(file, out, options), "--ray"], cwd=ROOT)
    wait_for(lambda: under_way(out, "train"), process)
    victim = under_way(out, "train")[0]
    os.kill(victim["pid"], signal.SIGKILL)
    print(f"\n== killed Ray's worker {victim['pid']}, which trained {victim['video']}", flush=True)
    if process.wait():
        sys.exit("the run on Ray failed")


def results(out: Path) -> list[Path]:
    """The model's finished videos."""
    return [path for path in out.glob("*/first/model/*.json") if path.name != "settings.json"]


def under_way(out: Path, stage: str) -> list[dict]:
    """What the videos say that are in a stage now."""
    try:
        states = [json.loads(path.read_text()) for path in out.glob("*/first/*.running")]
    except FileNotFoundError:  # it ended meanwhile
        return []
    return [state for state in states if state["stage"] == stage]


def wait_for(condition, process: subprocess.Popen) -> None:
    """Until the condition holds; stops this check if the process ends before."""
    while not condition():
        if process.poll() is not None:
            sys.exit("the run ended before it could be disturbed: give more --num_iters")
        time.sleep(0.05)


def read_metrics(out: Path) -> dict:
    """Metrics by tracker and video."""
    (path,) = out.glob("*/first/results.json")
    trackers = json.loads(path.read_text())["trackers"]
    return {name: {video: record["metrics"] for video, record in tracker["videos"].items()}
            for name, tracker in trackers.items()}


def report(metrics: dict[str, dict]) -> None:
    """The model's average Jaccard of every video, and whether all metrics are the same."""
    reference = next(iter(metrics.values()))
    for name, found in metrics.items():
        cells = "  ".join(f"{video} {row['average_jaccard']:.6f}" for video, row in found["model"].items())
        print(f"{name:22}{cells}  {'all metrics the same' if found == reference else 'DIFFERENT'}")
    sys.exit(any(found != reference for found in metrics.values()))


if __name__ == "__main__":
    main()
