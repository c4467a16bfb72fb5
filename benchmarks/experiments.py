"""Short runs of presets on small clips, one process each. Used by benchmarks.ablation and benchmarks.convergence.

Notation
    clip     a sequence folder with correspondences and annotations.npz; the folder's name is its name
    preset   a config file; options that it does not set are taken from a base config file
    cell     one run: a preset on a clip with a seed, for a number of steps or seconds
    curve    training seconds and metrics of a cell at a few equally spaced steps; the last is the end of the run
Each result is a file, OUT/cells/NAME.json; only missing cells are computed.
"""

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import configargparse
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.timing import seconds_of
from common.files import write_json, write_text
from configs.options import parse
from evaluation.scoring import as_point_tracks, score
from inference.load_run import new_tracker
from loaders.correspondences import open_correspondences
from loaders.sequence import VideoSequence, open_sequence
from loaders.track_files import Annotations, load_annotations, sample_queries
from preprocessing.options import RULES, chain_rule
from preprocessing.pipeline import Method, build_store
from preprocessing.synthetic.render import write_scene
from preprocessing.synthetic.scenes import RECIPES
from training.run_metadata import versions
from training.trainer import Trainer

log = logging.getLogger(__name__)
WARM_UP = 3  # steps that are not timed, before those that are
TIMED = 8  # steps that are timed to estimate how many fit into a given time
FOLLOWED = "followed_"  # prefix of metrics of tracks that follow optical flow (--follow_flow 1)
POINTS = 128  # number of ground-truth points of a rendered clip


@dataclass(frozen=True)
class Cell:
    """One run. `preset` and `base` are config files, `clip` is a folder. One of `steps` and `seconds` is 0."""
    preset: str
    base: str
    clip: str
    seed: int
    steps: int = 0
    seconds: float = 0.0
    looks: int = 1  # number of points of the curve

    @property
    def name(self) -> str:
        length = f"{self.steps}steps" if self.steps else f"{self.seconds:g}s"
        return f"{Path(self.preset).stem}-{Path(self.clip).name}-{self.seed}-{length}"


def cell_options(cell: Cell) -> Namespace:
    """Training options of the cell: the base's, overridden by the preset's."""
    argv = [f"--{name}={value}" for name, value in preset_options(cell).items()]
    return parse("train", [*argv, "--data_dir", cell.clip, "--seed", str(cell.seed), "--device", "cpu"])


def preset_options(cell: Cell) -> dict[str, str]:
    """Options in the base file, overridden by those in the preset file."""
    return file_options(cell.base) | file_options(cell.preset)


def file_options(path: str) -> dict[str, str]:
    """The `name = value` lines of a config file."""
    with open(path, encoding="utf-8") as stream:
        return dict(configargparse.DefaultConfigFileParser().parse(stream))


def run_cell(cell: Cell) -> dict:
    """Train and score a cell; returns the content of its result file."""
    options = cell_options(cell)
    with TemporaryDirectory() as folder:  # not among the user's runs
        options.save_dir = folder
        options.num_iters = cell.steps or steps_within(options, cell.seconds)
        trainer = Trainer(options)
        scored = {round(options.num_iters * k / cell.looks) for k in range(1, cell.looks + 1)}
        seconds, curve = 0.0, []
        while trainer.step < options.num_iters:
            seconds += seconds_of(trainer.train_step, trainer.device)
            if trainer.step in scored:
                curve.append({"step": trainer.step, "seconds": seconds, **metrics_now(trainer)})
    return {"cell": asdict(cell), "options": preset_options(cell), "steps": options.num_iters, "seconds": seconds,
            "curve": curve, "correspondences": correspondences(cell),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "threads": torch.get_num_threads(), "versions": versions()}


def steps_within(options: Namespace, seconds: float) -> int:
    """Number of training steps that fit into `seconds`, from the median time of TIMED steps; at least 1."""
    trainer = Trainer(options)
    times = [seconds_of(trainer.train_step, trainer.device) for _ in range(WARM_UP + TIMED)]
    return max(round(seconds / statistics.median(times[WARM_UP:])), 1)


def metrics_now(trainer: Trainer) -> dict[str, float]:
    """Metrics of the model at the current step, in the query mode `first`.

    Keys with the prefix FOLLOWED are for tracks that follow optical flow (--follow_flow 1)."""
    options, sequence = trainer.options, trainer.sequence
    truth, queries, rows = ground_truth(sequence)
    out = {}
    for follow_flow, prefix in ((0, ""), (1, FOLLOWED)):
        tracker = new_tracker(trainer.model, sequence, Namespace(**vars(options) | {"follow_flow": follow_flow}))
        found = score(as_point_tracks(tracker.track(queries), queries, sequence.size), truth, rows, "first")
        out |= {prefix + name: value for name, value in found.items()}
    return out


def ground_truth(sequence: VideoSequence) -> tuple[Annotations, np.ndarray, np.ndarray]:
    """A clip's annotations at its frame size, its queries `(M, 3)` in mode `first`, and their annotation rows."""
    truth = load_annotations(sequence.root / "annotations.npz", len(sequence)).resized(sequence.size)
    return truth, *sample_queries(truth, "first")


def run_missing(cells: list[Cell], folder: Path) -> tuple[list[dict], list[str]]:
    """Compute missing cells, one process each; returns the records of all cells and the names of those that failed."""
    records, failed = [], []
    bar = tqdm(cells, "cells", dynamic_ncols=True)
    for cell in bar:
        bar.set_postfix_str(cell.name)
        path = folder / "cells" / f"{cell.name}.json"
        if path.is_file() and not _same(json.loads(path.read_text()), cell):
            log.warning("%s was made with other options and is made again", path)
            path.unlink()
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "benchmarks.experiments", json.dumps(asdict(cell)), str(path)]
            subprocess.run(command, check=False)
        if path.is_file():
            records.append(json.loads(path.read_text()))
        else:
            failed.append(cell.name)
            log.error("%s failed; the same command tries it again", cell.name)
    return records, failed


def values(records: list[dict], key: str) -> dict[tuple[str, int], float]:
    """A metric at the end of each run, or its "seconds", "steps" or "peak_bytes", by (clip, seed)."""
    return {(record["cell"]["clip"], record["cell"]["seed"]): record.get(key, record["curve"][-1].get(key))
            for record in records if key in record or key in record["curve"][-1]}


def on_clip(records: list[dict], key: str, clip: str) -> list[float]:
    """`values` of the runs on one clip, in the order of their seeds."""
    return [value for (name, _), value in sorted(values(records, key).items()) if name == clip]


def means_of_seeds(by_clip_and_seed: dict[tuple[str, int], float]) -> list[float]:
    """The mean over the clips, for each seed."""
    seeds = sorted({seed for _, seed in by_clip_and_seed})
    return [statistics.mean(v for (_, s), v in by_clip_and_seed.items() if s == seed) for seed in seeds]


def _same(record: dict, cell: Cell) -> bool:
    """Whether a record matches the cell, its preset's current options and its clip's current correspondences."""
    found = correspondences(cell)
    return (record["cell"] == asdict(cell) and record.get("options") == preset_options(cell)
            and record.get("correspondences", found) == found)


def correspondences(cell: Cell) -> dict:
    """Preprocessing settings of the correspondences of the cell's clip."""
    return open_correspondences(open_sequence(cell.clip)).meta.get("method", {})


def add_clip_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that ablation and convergence share."""
    parser.add_argument("--scenes", default="easy,occlusion,fast", help=f"rendered clips: {', '.join(RECIPES)}")
    parser.add_argument("--clips", nargs="*", default=[], help="more sequence folders, with annotations.npz")
    parser.add_argument("--size", type=int, default=128, help="side of the rendered clips")
    parser.add_argument("--num_frames", type=int, default=24, help="frames of the rendered clips")
    parser.add_argument("--chain", default="trusted", type=chain_rule, choices=("", *RULES),
                        help="rule of preprocessing's chains; empty: no chains")
    parser.add_argument("--seeds", type=int, default=3, help="runs of a preset on a clip")


def clips_of(args: argparse.Namespace) -> list[str]:
    """Folders of all clips that the arguments name. Rendered clips and correspondences that are missing are made.

    UserError if existing correspondences have other settings."""
    out = []
    for name in filter(None, args.scenes.split(",")):
        root = Path(args.out) / "sequences" / f"{name}_{args.size}x{args.num_frames}"
        if not (root / "annotations.npz").is_file():
            write_scene(root, name, (args.size, args.size), args.num_frames, 0, POINTS)
        build_store(open_sequence(root), Method(pairs="all", chain=args.chain))
        out.append(str(root))
    return out + args.clips


def finish(parser: argparse.ArgumentParser, tables: list[str], path: Path, failed: list[str]) -> None:
    """Write the tables to a file, print them, and exit with 1 if a cell failed."""
    text = "\n\n".join(tables)
    write_text(path, text + "\n")
    print(text)
    parser.exit(1 if failed else 0, f"failed: {', '.join(failed)}\n" if failed else "")


def main() -> None:
    torch.set_flush_denormal(True)  # as train.py does
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    cell, path = Cell(**json.loads(sys.argv[1])), Path(sys.argv[2])
    write_json(path, run_cell(cell))


if __name__ == "__main__":
    main()
