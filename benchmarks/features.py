"""Compare the features of the appearance check: python -m benchmarks.features --video V --annotations A

Takes DIS flow at 256x256 between annotated frames 3 or more apart, at the annotated points where it passes the
forward-backward check. A flow is correct if it ends within 4 px of the annotation, and wrong if it ends more than 8 px
away. Writes the table docs/results/features.json (or --out): area under the ROC curve of the similarity of the two
ends; percentiles of this similarity; the shares of flows above the two thresholds; CPU time of a thread per frame.
"""

import argparse
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.flow_sources import frame_pairs
from benchmarks.results import ROOT, result_text
from common.cli import Parser, run
from common.files import write_json
from common.geometry import sample, similarity
from loaders.track_files import Annotations, load_annotations
from loaders.video import read_video
from preprocessing.features import FEATURE_EXTRACTORS, FeatureExtractor
from preprocessing.filtering import APPEARANCE_INTERVAL, cycle_flags
from preprocessing.flow import ModelOptions
from third_party.dis import DisFlow

SIDE = 256      # pixels of the frames' sides
CYCLE_TH = 3.0  # pixels, as the default of preprocessing
CORRECT_ERROR = 4.0  # pixels: largest error of a correct flow
WRONG_ERROR = 8.0    # pixels: smallest error of a wrong flow
COLUMNS = ["features", "AUC", "correct flows: percentiles 5, 10, 50", "wrong flows: 25, 50, 75", "random points: 50",
           "correct and wrong flows above the threshold", "above that of chains", "CPU s of a frame, 854x480"]


def consistent_flows(frames: list[np.ndarray], annotations: Annotations) -> dict[tuple[int, int], np.ndarray]:
    """Pair (i, j) -> rows (x, y, end x, end y, error), `(n, 5)` in pixels, of its cycle-consistent annotated points."""
    pairs = [pair for pair in frame_pairs(annotations) if abs(pair[0] - pair[1]) >= APPEARANCE_INTERVAL]
    flow = DisFlow()
    grays = [flow.gray(frame) for frame in frames]
    flows = {(i, j): flow(grays[i], grays[j]) for i, j, _ in tqdm(pairs, "flow")}
    found = {}
    for i, j, points in pairs:
        cycle, _ = cycle_flags(torch.from_numpy(flows[i, j]), torch.from_numpy(flows[j, i]), CYCLE_TH)
        p = annotations.points[points, i]  # (n, 2)
        x, y = np.rint(p).astype(int).T.clip(0, SIDE - 1)
        end = p + sample(flows[i, j], p)
        error = np.linalg.norm(end - annotations.points[points, j], axis=-1, keepdims=True)
        found[i, j] = np.concatenate([p, end, error], axis=-1)[cycle.numpy()[y, x]]
    return found


def area(correct: np.ndarray, wrong: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a correct flow is more similar than a wrong one."""
    return float((correct[:, None] > wrong).mean() + (correct[:, None] == wrong).mean() / 2)


def cpu_seconds(extract: FeatureExtractor, image: np.ndarray) -> float:
    """CPU seconds of this thread for the features of an image; median of three."""
    seconds = []
    for _ in range(3):
        begin = time.thread_time()
        extract(image)
        seconds.append(time.thread_time() - begin)
    return sorted(seconds)[1]


def row(name: str, extract: FeatureExtractor, frames: list[np.ndarray],
        flows: dict[tuple[int, int], np.ndarray]) -> list:
    """The cells of COLUMNS."""
    features = {t: torch.from_numpy(extract(frames[t])) for t in tqdm(sorted({i for i, _ in flows}), name)}

    def similar(i: int, j: int, p: np.ndarray, q: np.ndarray) -> np.ndarray:
        p, q = torch.from_numpy(p).float(), torch.from_numpy(q).float()
        return similarity(features[i].float(), features[j].float(), p, q, (SIDE, SIDE)).numpy()

    found = np.concatenate([similar(*pair, rows[:, :2], rows[:, 2:4]) for pair, rows in flows.items()])
    error = np.concatenate([rows[:, 4] for rows in flows.values()])
    correct, wrong = found[error < CORRECT_ERROR], found[error > WRONG_ERROR]
    random = similar(min(features), max(features), *np.random.default_rng(0).uniform(0, SIDE - 1, (2, 5000, 2)))
    percentiles = [", ".join(f"{value:.2f}" for value in np.percentile(values, shares)) for values, shares in (
        (correct, (5, 10, 50)), (wrong, (25, 50, 75)), (random, (50,)))]
    above = [f"{threshold}: {np.mean(correct > threshold):.1%}, {np.mean(wrong > threshold):.1%}"
             for threshold in (extract.threshold, extract.chain_threshold)]
    return [name, area(correct, wrong), *percentiles, *above, cpu_seconds(extract, cv2.resize(frames[0], (854, 480)))]


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", required=True)
    parser.add_argument("--annotations", required=True)
    parser.add_argument("--weights_dir", type=Path)
    parser.add_argument("--features", nargs="+", choices=list(FEATURE_EXTRACTORS), default=["sift", "aliked", "xfeat"])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/features.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    frames = [cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for frame in read_video(args.video)]
    flows = consistent_flows(frames, load_annotations(args.annotations, len(frames)).resized((SIDE, SIDE)))
    options = ModelOptions(weights_dir=args.weights_dir)
    rows = [row(name, FEATURE_EXTRACTORS[name](options), frames, flows) for name in args.features]
    command = "python -m benchmarks.features --video bear.mp4 --annotations annotations.npz --weights_dir weights"
    result = {"title": "", "columns": COLUMNS, "rows": rows, "digits": [0, 3, 0, 0, 0, 0, 0, 2], "command": command}
    print(result_text(result))
    write_json(args.out, result)


if __name__ == "__main__":
    run(main)
