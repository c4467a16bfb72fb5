"""Calibrates --occlusion_th on rendered scenes: python -m benchmarks.occlusion

A preset is trained on each scene, and the model tracks points whose occlusion is known. A point is called occluded
where the model's occlusion score is above --occlusion_th. Only frames in which the model is close to the true position
are counted, because the model decides only there.

Prints two tables with the share of wrong decisions, precision and recall of "occluded", and writes them to OUT as JSON:
    occlusion_errors    of several thresholds, on the scenes of seed 0
    occlusion_decision  of the preset's threshold and OmniMotion's, and of the tracks of --follow_flow, on the scenes of
                        the other seeds

Notation
    K        entries: a point in a frame other than its query's
"""

import argparse
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.experiments import ground_truth
from common.cli import Parser, run
from common.files import atomic_path, write_json
from common.geometry import inside
from configs.options import parse
from evaluation.tables import markdown
from inference.load_run import new_tracker
from inference.multi_interval_flow import MAX_ERROR
from loaders.npy import ArrayFile
from loaders.sequence import open_sequence
from preprocessing.pipeline import Method, build_store
from preprocessing.synthetic.render import write_scene
from training.trainer import Trainer

SCENES = ("easy", "occlusion", "fast", "travel")
OMNIMOTION = 0.99  # threshold in OmniMotion's code
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, OMNIMOTION)
POINTS = 400  # of a scene

Scene = dict[str, np.ndarray]  # names of `measure` -> values


def measured(root: Path, kind: str, seed: int, args: Namespace) -> Scene:
    """`measure` of a scene of a kind, kept in a file of the folder `root`. The scene is rendered and preprocessed if it
    is missing."""
    name = f"{kind}_{args.size}x{args.num_frames}_{seed}"
    path = root / f"{name}_{Path(args.config).stem}_{args.num_iters}.npz"
    if not path.is_file():
        folder = root / "sequences" / name
        if not (folder / "annotations.npz").is_file():
            write_scene(folder, kind, (args.size, args.size), args.num_frames, seed, POINTS)
        build_store(open_sequence(folder), Method(), resume=True, num_workers=args.num_workers)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **measure(folder, seed, args))
    file = ArrayFile(path, "remove it, then it is made again")
    return {key: file[key] for key in file.names}


def measure(folder: Path, seed: int, args: Namespace) -> Scene:
    """Train on the scene in `folder` and track its points.

    Returns `(K,)` each: the model's occlusion `score`, whether the point is `hidden` in the tracks of --follow_flow,
    and whether it is `occluded`."""
    options = parse("train", ["--config", args.config, "--data_dir", str(folder), "--seed", str(seed), "--num_iters",
                              str(args.num_iters), "--device", "cpu"])
    trainer = Trainer(options)
    while trainer.step < options.num_iters:
        trainer.train_step()
    sequence = trainer.sequence
    truth, queries, rows = ground_truth(sequence)
    model, guided = (new_tracker(trainer.model, sequence, Namespace(**vars(options) | {"follow_flow": follow_flow}))
                     for follow_flow in (False, True))
    found = model.track(queries)
    points = truth.points[rows]
    counted = np.linalg.norm(found.tracks - points, axis=-1) <= MAX_ERROR * max(sequence.size)
    counted &= inside(points, sequence.size) & inside(found.tracks, sequence.size)
    counted &= queries[:, :1] != np.arange(len(sequence))
    values = {"score": found.occlusion_score, "hidden": ~guided.track(queries).visible,
              "occluded": truth.occluded[rows]}
    return {name: value[counted] for name, value in values.items()}


def quality(predicted: list[np.ndarray], occluded: list[np.ndarray]) -> list[float]:
    """Share of wrong predictions, precision, and recall. Both lists hold `(K,)` bool for each scene; scenes have the
    same weight."""
    def mean(shares) -> float:
        return float(np.mean([share.mean() for share in shares]))

    pairs = list(zip(predicted, occluded, strict=True))
    true_positive = mean(p & o for p, o in pairs)
    return [mean(p != o for p, o in pairs), true_positive / max(mean(predicted), 1e-9),
            true_positive / max(mean(occluded), 1e-9)]


def table(scenes: list[Scene], thresholds: tuple[float, ...], with_tracks: bool) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table of `quality`: of the model with each threshold and, if asked for, of the tracks."""
    decisions = {f"model, score above {threshold:g}": [scene["score"] > threshold for scene in scenes]
                 for threshold in thresholds}
    if with_tracks:
        decisions["tracks"] = [scene["hidden"] for scene in scenes]
    occluded = [scene["occluded"] for scene in scenes]
    rows = [[name, *(f"{value:.2%}" for value in quality(called, occluded))] for name, called in decisions.items()]
    return ["called occluded", "wrong", "precision", "recall"], rows


def main() -> None:
    parser = Parser(prog="python -m benchmarks.occlusion", description=__doc__.split("\n")[0],
                    epilog=__doc__.split("\n\n", 1)[1], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/fast.txt", help="preset that is trained")
    parser.add_argument("--num_iters", type=int, default=1000, help="training steps")
    parser.add_argument("--size", type=int, default=256, help="side of the rendered scenes")
    parser.add_argument("--num_frames", type=int, default=48, help="frames of the rendered scenes")
    parser.add_argument("--seeds", type=int, default=3, help="scenes of each kind, at least 2")
    parser.add_argument("--num_workers", type=int, default=2, help="threads of preprocessing")
    parser.add_argument("--out", default="out/occlusion", help="folder of the results; a second run completes them")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: thresholds are compared on one seed and judged on the others")
    torch.set_flush_denormal(True)  # as train.py does
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    threshold = parse("eval", ["--config", args.config]).occlusion_th
    kinds = [(kind, seed) for seed in range(args.seeds) for kind in SCENES]
    scenes = [measured(out, *kind, args) for kind in tqdm(kinds, desc="scenes")]
    first, others = scenes[:len(SCENES)], scenes[len(SCENES):]
    tables = {"occlusion_errors": (f"Mean over {len(first)} rendered scenes", *table(first, THRESHOLDS, False)),
              "occlusion_decision": (f"Mean over {len(others)} other scenes",
                                     *table(others, (threshold, OMNIMOTION), True))}
    for name, (title, columns, rows) in tables.items():
        write_json(out / f"{name}.json", {
            "title": title, "columns": columns, "rows": rows,
            "command": shlex.join(["python", "-m", "benchmarks.occlusion", *sys.argv[1:]])})
        print(f"{title}\n\n{markdown(columns, rows)}\n")


if __name__ == "__main__":
    run(main)
