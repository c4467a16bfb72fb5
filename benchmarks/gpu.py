"""Everything that is to be measured on a GPU, in at most 8 minutes: python -m benchmarks.gpu

    sequence       a rendered scene and its correspondences, for the steps
    matrix rate    TFLOP/s of a large matrix product
    step: NAME     a training step of `original`, `default` (plain, fused, Triton, compiled) and `fast`
                   (benchmarks/step.py), with the share of the measured bf16 matrix rate that its products reach
    outputs: NAME  outputs and gradients of a model against those of the same model on the CPU, in float32
    demo           `make demo` from start to end, with its metrics
    dense tracks   every pixel of a frame of 480p through 60 frames

Each part runs in a process of its own and is stopped after a time of its own. If one fails, its row has the error, and
the others go on. The results so far are written after each part. The exit code is 1 if a part failed.
docs/gpu.md says how to bring the packages to a machine without network.
"""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu_parts import PARTS, Setting
from common.cli import Parser, positive, run
from common.errors import UserError
from common.files import read_json, write_json
from evaluation.tables import markdown
from inference.processes import ROOT, exit_name
from models.factory import pick_device
from training.run_metadata import cpu_name, versions

log = logging.getLogger("gpu")
COLUMNS = ("part", "result", "peak memory, GiB", "TFLOP/s", "share of the bf16 matrix rate", "seconds in all")
LAST_CHARACTERS = 2_000  # of the output of a part that failed
LEAST_SECONDS = 5        # a part is not started with less time than this


def run_part(name: str, setting: Setting, seconds: float, command: list[str] | None = None) -> dict:
    """Run a part in a process of its own, for at most `seconds`: the content of its Found, or {"error", "details"}.

    command: replaces the part's command, which gets the name, the setting, and the file for the result."""
    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        result = Path(temporary) / "result.json"
        output = Path(temporary) / "output.txt"
        words = [*(command or [sys.executable, "-m", "benchmarks.gpu_parts"]), name, json.dumps(asdict(setting)),
                 str(result)]
        with open(output, "wb") as file:
            process = subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:  # also what the part started, and on Ctrl-C
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code == 0 and result.is_file():
            found = read_json(result, "run it again")
            if "error" not in found:
                return found
        else:
            found = {"error": f"stopped after {seconds:.0f} s" if code is None else f"ended with {exit_name(code)}"}
        end = output.read_text(errors="replace")[-LAST_CHARACTERS:]
        return found | {"details": found.get("details", "") + end}


def benchmark(names: list[str], setting: Setting, minutes: float, out: Path, command: str) -> list[dict]:
    """Run the parts, print a line for each, and write `out` after each: a table as benchmarks.results reads it, and the
    parts' values."""
    end = time.monotonic() + 60 * minutes
    device = torch.cuda.get_device_name() if setting.device == "cuda" else cpu_name()
    parts = []
    for name in names:
        part = PARTS[name]
        start = time.monotonic()
        seconds = min(part.seconds, end - start)
        if part.cuda_only and setting.device != "cuda":
            found = {"skipped": "needs CUDA"}
        elif seconds < LEAST_SECONDS:
            found = {"error": f"not started: the {minutes:g} minutes are over"}
        else:
            found = run_part(name, setting, seconds)
        parts.append({"part": name, **found, "seconds_in_all": round(time.monotonic() - start, 1)})
        rate = next((done["values"]["bf16_tflops"] for done in parts
                     if done["part"] == "matrix rate" and "values" in done), None)
        rows = [row_of(done, rate) for done in parts]
        log.info("%s", " | ".join(cell for cell in rows[-1] if cell))
        write_json(out, {"title": device + (", small sizes (--quick)" if setting.quick else ""), "columns": COLUMNS,
                         "rows": rows, "command": command, "versions": versions(), "parts": parts})
    print(f"{device}\n\n{markdown(COLUMNS, rows)}")
    return parts


def row_of(part: dict, rate: float | None) -> list[str]:
    """A row of the table. rate: measured TFLOP/s of bf16 matrix products, if it is known."""
    if "text" not in part:
        failed = f"failed: {part['error']}" if "error" in part else part["skipped"]
        return [part["part"], failed.replace("|", "/"), "", "", "", f"{part['seconds_in_all']:.0f}"]
    memory = "" if part["peak_gib"] is None else f"{part['peak_gib']:.2f}"
    tflops = share = ""
    if "gflop" in part["values"]:
        value = part["values"]["gflop"] / part["values"]["seconds"] / 1e3
        tflops = f"{value:.3g}"
        share = f"{value / rate:.1%}" if rate else ""
    return [part["part"], part["text"], memory, tflops, share, f"{part['seconds_in_all']:.0f}"]


def chosen_parts(text: str) -> list[str]:
    """The parts whose names begin with one of the comma-separated texts; all for an empty one. UserError if a text is
    the beginning of none."""
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    for word in wanted:
        if not any(name.startswith(word) for name in PARTS):
            raise UserError(f"--parts: no part begins with '{word}': choose among {', '.join(PARTS)}")
    return [name for name in PARTS if not wanted or any(name.startswith(word) for word in wanted)]


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to compute on")
    parser.add_argument("--quick", action="store_true", help="small sizes, to test the command")
    parser.add_argument("--parts", default="", help="comma-separated beginnings of names of parts; empty: all")
    parser.add_argument("--minutes", type=positive, default=8.0, help="time for all parts together")
    parser.add_argument("--out", default="out/bench/gpu.json", help="file for the results")
    args = parser.parse_args()
    names = chosen_parts(args.parts)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the part, too
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        setting = Setting(pick_device(args.device).type, folder, args.quick)
        command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
        parts = benchmark(names, setting, args.minutes, Path(args.out), command)
    sys.exit(any("error" in part for part in parts))


if __name__ == "__main__":
    run(main)
