"""Calibrates the decision about occlusion on rendered scenes: python -m benchmarks.occlusion

A preset is trained on each scene, and the model tracks points whose occlusion is known. Compared are decisions of the
form: a point is occluded where the model's occlusion score is above --occlusion_th, or where it is above s and the
color at the model's position differs by more than d from that of the query point (inference/flow_guided_tracker.py).
Counted are the frames in which the model is close to the true position, as the decision is the model's only there.

Prints two tables, each a mean over the scenes, and writes them to OUT as JSON:
    occlusion_errors    share of wrong decisions for pairs of s and d
    occlusion_decision  share of wrong decisions, precision and recall of "occluded" for the threshold alone, and for
                        the decision of the tracker

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
from inference.flow_guided_tracker import LIKELY_OCCLUDED, OTHER_COLOR, color_differences
from inference.frame_colors import FrameColors
from inference.load_run import new_tracker
from inference.multi_interval_flow import MAX_ERROR
from loaders.npy import ArrayFile
from loaders.sequence import open_sequence
from preprocessing.pipeline import Method, build_store
from preprocessing.synthetic.render import write_scene
from training.trainer import Trainer

SCENES = ("easy", "occlusion", "fast", "travel")
SCORES = (0.5, 0.6, 0.7, 0.8, 0.9)           # s
DIFFERENCES = (0.0, 4.0, 6.0, 8.0, 12.0, 16.0)  # d, CIELAB units
POINTS = 400  # of a scene


def entries(root: Path, scene: str, seed: int, args: Namespace) -> dict[str, np.ndarray]:
    """Of a scene: occlusion `score`, color `difference` and whether it is `occluded`, `(K,)` each.

    They are kept in a file of the folder `root`, which is made if it is missing."""
    name = f"{scene}_{args.size}x{args.num_frames}_{seed}_{args.num_iters}"
    path = root / f"{name}.npz"
    if not path.is_file():
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **_measured(root / "sequences" / name, scene, seed, args))
    file = ArrayFile(path, "remove it, then it is made again")
    return {key: file[key] for key in file.names}


def _measured(folder: Path, scene: str, seed: int, args: Namespace) -> dict[str, np.ndarray]:
    """`entries`, by rendering, preprocessing, training and tracking."""
    if not (folder / "annotations.npz").is_file():
        write_scene(folder, scene, (args.size, args.size), args.num_frames, seed, POINTS)
    sequence = open_sequence(folder)
    build_store(sequence, Method(), resume=True, num_workers=args.num_workers)
    options = parse("train", ["--config", args.config, "--data_dir", str(folder), "--seed", str(seed), "--num_iters",
                              str(args.num_iters), "--device", "cpu"])
    trainer = Trainer(options)
    while trainer.step < options.num_iters:
        trainer.train_step()
    truth, queries, rows = ground_truth(sequence)
    alone = Namespace(**vars(options) | {"follow_flow": False})
    found = new_tracker(trainer.model, sequence, alone).track(queries)
    points = truth.points[rows]
    close = np.linalg.norm(found.tracks - points, axis=-1) <= MAX_ERROR * max(sequence.size)
    counted = close & inside(points, sequence.size) & inside(found.tracks, sequence.size)
    counted &= queries[:, :1] != np.arange(len(sequence))
    difference = color_differences(queries, found.tracks, counted, 0, FrameColors(sequence.frame))
    return {"score": found.occlusion_score[counted], "difference": difference[counted],
            "occluded": truth.occluded[rows][counted]}


def errors(scene: dict[str, np.ndarray], threshold: float) -> np.ndarray:
    """Share of wrong decisions of one scene `(len(SCORES), len(DIFFERENCES))`."""
    return np.array([[np.mean(decision(scene, threshold, s, d) != scene["occluded"]) for d in DIFFERENCES]
                     for s in SCORES])


def decision(scene: dict[str, np.ndarray], threshold: float, s: float, d: float) -> np.ndarray:
    """Whether each entry of a scene is called occluded, `(K,)`."""
    return (scene["score"] > threshold) | ((scene["score"] > s) & (scene["difference"] > d))


def quality(scenes: list[dict[str, np.ndarray]], threshold: float, s: float, d: float) -> list[float]:
    """Share of wrong decisions, precision, and recall, in which each scene has the same weight."""
    wrong, right, called, occluded = 0.0, 0.0, 0.0, 0.0
    for scene in scenes:
        said = decision(scene, threshold, s, d)
        wrong += np.mean(said != scene["occluded"])
        right += np.mean(said & scene["occluded"])
        called += np.mean(said)
        occluded += np.mean(scene["occluded"])
    return [wrong / len(scenes), right / max(called, 1e-9), right / max(occluded, 1e-9)]


def main() -> None:
    parser = Parser(prog="python -m benchmarks.occlusion", description=__doc__.split("\n")[0],
                    epilog=__doc__.split("\n\n", 1)[1], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/fast.txt", help="preset that is trained")
    parser.add_argument("--num_iters", type=int, default=1000, help="training steps")
    parser.add_argument("--size", type=int, default=256, help="side of the rendered scenes")
    parser.add_argument("--num_frames", type=int, default=48, help="frames of the rendered scenes")
    parser.add_argument("--seeds", type=int, default=2, help="scenes of each kind")
    parser.add_argument("--num_workers", type=int, default=2, help="threads of preprocessing")
    parser.add_argument("--out", default="out/occlusion", help="folder of the results; a second run completes them")
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # as train.py does
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    kinds = [(scene, seed) for seed in range(args.seeds) for scene in SCENES]
    scenes = [entries(out, *kind, args) for kind in tqdm(kinds, desc="scenes")]
    threshold = parse("eval", ["--config", args.config]).occlusion_th
    title = f"Mean over {len(scenes)} rendered scenes"
    tables = {
        "occlusion_errors": (["s", *(f"d = {d:g}" for d in DIFFERENCES)], [
            [f"{s:g}", *(f"{value:.2%}" for value in row)]
            for s, row in zip(SCORES, np.mean([errors(scene, threshold) for scene in scenes], axis=0), strict=True)]),
        "occlusion_decision": (["decision", "wrong", "precision", "recall"], [
            [name, *(f"{value:.2%}" for value in quality(scenes, threshold, *decides))]
            for name, decides in ((f"score above {threshold:g}", (threshold, 0)),
                                  (f"or score above {LIKELY_OCCLUDED:g} and another color",
                                   (LIKELY_OCCLUDED, OTHER_COLOR)))])}
    for name, (columns, rows) in tables.items():
        write_json(out / f"{name}.json", {
            "title": title, "columns": columns, "rows": rows,
            "command": shlex.join(["python", "-m", "benchmarks.occlusion", *sys.argv[1:]])})
        print(markdown(columns, rows), end="\n\n")


if __name__ == "__main__":
    run(main)
