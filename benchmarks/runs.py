"""Runs of train.py, one process each, and their scores; a run that is there already is not trained again."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common.files import write_text

METRICS = {"average_jaccard": "AJ", "average_pts_within_thresh": "delta_avg", "occlusion_accuracy": "OA",
           "temporal_coherence": "TC"}


def train_and_score(arguments: list[str], folder: Path, annotations: str = "") -> dict:
    """Metrics of a run, what it found of itself ("diagnosis"), and its training time in seconds, from its folder if
    they are there; without annotations no metrics. A run that was interrupted goes on from its checkpoint."""
    result = folder / "result.json"
    if not result.is_file():
        start = time.perf_counter()
        subprocess.run([sys.executable, "train.py", *arguments, "--i_img", "0", "--no_tensorboard"], check=True)
        out = {"seconds": time.perf_counter() - start}
        if annotations:
            subprocess.run([sys.executable, "eval.py", *arguments, "--annotations", annotations, "--query_mode",
                            "first", "--out", str(folder / "metrics.json")], check=True)
            out |= json.loads((folder / "metrics.json").read_text())
        diagnosis = folder / "diagnosis.json"
        out["diagnosis"] = json.loads(diagnosis.read_text())[-1] if diagnosis.is_file() else None
        write_text(result, json.dumps(out))
    return json.loads(result.read_text())


def run_folder(save_dir: str, name: str, data_dir: str) -> Path:
    """Where train.py puts a run."""
    return Path(save_dir) / f"{name}_{Path(data_dir).resolve().name}"


def spread(values: list[float], digits: int = 3) -> str:
    """Mean, and the smallest and the largest value."""
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
