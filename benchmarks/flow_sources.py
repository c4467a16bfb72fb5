"""Compare optical-flow methods: python -m benchmarks.flow_sources --video V --annotations A --work_dir DIR

Preprocesses the video with each flow method of SOURCES, with unfiltered chains. Ctrl-C stops preprocessing; the same
command resumes it. Prints Markdown tables:
    wall time, CPU time of all cores, peak memory, disk space of the correspondences
    share of pixels with a valid correspondence, by interval (distance of the two frames)
    share of annotated points that are within 4 px (at 256x256) of the annotation in the other frame, by interval, over
    all ordered pairs of frames:
        still    the point stays at its position
        direct   flow computed between the two frames, without a validity check
        chained  sum of the flows between adjacent frames, without a validity check
        stored   stored correspondence, and the share of points in stored pairs that have one
--picture draws the direct, chained and stored flow of each method for a few pairs of frames.
"""

import argparse
import json
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from common.cli import Parser
from common.files import write_text
from common.geometry import sample
from drawing.colors import flow_colors, full_saturation
from loaders.correspondences import CorrespondenceStore, open_correspondences
from loaders.sequence import VideoSequence, open_sequence
from loaders.track_files import Annotations, load_annotations
from preprocessing.flow import FLOW_MODELS, FlowModel, ModelOptions

SOURCES = {"DIS": ["--flow", "dis"], "RAFT small": ["--flow", "raft", "--raft_weights", "raft-small.pth"]}
BINS = ((1, 5), (6, 10), (11, 20), (21, 40), (41, 1000))  # ranges of intervals, frames
NEAR = 4.0  # pixels at 256x256


def preprocess(folder: Path, arguments: list[str]) -> dict:
    """Run `python -m preprocessing` to its end; returns seconds, CPU seconds and peak bytes, over all resumed runs."""
    path = folder / "cost.json"
    cost = json.loads(path.read_text()) if path.is_file() else {"seconds": 0.0, "cpu": 0.0, "bytes": 0}
    if (folder / "correspondences" / "meta.json").is_file():
        return cost
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.Popen([sys.executable, "-m", "preprocessing", "--data_dir", str(folder), "--resume", *arguments])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the child saves and exits, and its cost is written
    code = child.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cost["seconds"] += time.perf_counter() - begin
    cost["cpu"] += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    cost["bytes"] = max(cost["bytes"], after.ru_maxrss * 1024)
    write_text(path, json.dumps(cost))
    if code:
        sys.exit(code)
    return cost


def first_frames(annotations: Annotations, num_frames: int) -> Annotations:
    """The annotations of the first `num_frames` frames."""
    kept = {name: array[:, :num_frames] for name in ("points", "occluded", "evaluated")
            if (array := getattr(annotations, name)) is not None}
    return replace(annotations, **kept, query_points=None)


def frame_pairs(annotations: Annotations) -> list[tuple[int, int, np.ndarray]]:
    """Ordered pairs of frames (i, j), and the indices `(n,)` of the points that are annotated as visible in both."""
    seen = ~annotations.occluded
    if annotations.evaluated is not None:
        seen &= annotations.evaluated
    pairs = [(i, j, np.flatnonzero(seen[:, i] & seen[:, j])) for i, j in permutations(np.flatnonzero(seen.any(0)), 2)]
    return [(int(i), int(j), rows) for i, j, rows in pairs if len(rows)]


def chains(store: CorrespondenceStore, annotations: Annotations, i: int) -> dict[int, np.ndarray]:
    """Positions `(N, 2)` of all points of frame i in every other frame, by chaining the flows of adjacent frames."""
    out, T = {}, store.num_frames
    for step, frames in ((1, range(i, T - 1)), (-1, range(i, 0, -1))):
        points = annotations.points[:, i].copy()
        for t in frames:
            points = points + sample(store.dense(t, t + step).flow, points)
            out[t + step] = points
    return out


def stored_ends(store: CorrespondenceStore, i: int, j: int, p: np.ndarray) -> np.ndarray:
    """Stored correspondences `(n, 2)` in frame j of points p `(n, 2)` of frame i; NaN where none is stored."""
    pair = store.dense(i, j)
    x, y = np.rint(p).astype(int).T.clip(0, np.array(store.size[::-1])[:, None] - 1)
    valid = (pair.cycle | pair.occlusion)[y, x]
    return np.where(valid[:, None], p + pair.flow[y, x], np.nan)


def flow_model(name: str, weights_dir: Path | None, size: tuple[int, int]) -> FlowModel:
    """The flow model of a source, for frames of `size` (H, W)."""
    weights = dict(zip(SOURCES[name][::2], SOURCES[name][1::2], strict=True)).get("--raft_weights", "")
    return FLOW_MODELS[SOURCES[name][1]](ModelOptions(weights=weights, weights_dir=weights_dir), size, 1 << 30)


def errors(name: str, weights_dir: Path | None, sequence: VideoSequence, store: CorrespondenceStore,
           annotations: Annotations) -> np.ndarray:
    """Rows (interval, still, direct, chained, stored), one a point and pair of frames; errors in pixels at 256x256.

    `stored` is NaN where the point has no correspondence, and infinite where the pair of frames is not stored."""
    model = flow_model(name, weights_dir, sequence.size)
    pairs = frame_pairs(annotations)
    frames = sorted({i for i, _, _ in pairs})
    encodings = {t: model.encode(sequence.frame(t)) for t in frames}
    chained, scale = {i: chains(store, annotations, i) for i in frames}, 256 / np.array(store.size[::-1])
    stored_pairs, out = set(map(tuple, store.pairs.tolist())), []
    for i, j, joints in tqdm(pairs, desc=f"{name}, annotated pairs"):
        p, truth = annotations.points[joints, i], annotations.points[joints, j]
        [(flow, _)] = model.flow([encodings[i]], [encodings[j]], [None], abs(i - j) == 1)
        found = [p, p + sample(flow, p), chained[i][j][joints], np.full_like(p, np.inf)]
        if (i, j) in stored_pairs:
            found[3] = stored_ends(store, i, j, p)
        distance = [np.linalg.norm((q - truth) * scale, axis=-1) for q in found]
        out.append(np.stack([np.full(len(p), abs(i - j)), *distance], axis=-1))
    return np.concatenate(out)


def report(name: str, cost: dict, store: CorrespondenceStore, rows: np.ndarray) -> list[str]:
    """Markdown rows of a flow method: its row of the first table, then its rows of the second."""
    interval = np.abs(store.pairs[:, 0] - store.pairs[:, 1])
    share = store.counts[store.pairs[:, 0], store.pairs[:, 1]] / np.prod(store.size)
    share = np.where((interval > 1) & (store.meta["method"].get("keep") == "half"), 2 * share, share)
    disk = sum(path.stat().st_size for path in store.root.iterdir())
    valid = [share[(interval >= low) & (interval <= high)] for low, high in BINS]
    lines = [f"| {name} | {cost['seconds'] / 60:.1f} min | {cost['cpu'] / 60:.1f} min | {cost['bytes'] / 2**30:.2f} "
             f"GiB | {disk / 2**20:.0f} MiB | "
             + " | ".join(f"{x.mean():.0%}" if len(x) else "-" for x in valid) + " |"]
    for k, kind in enumerate(("still", "direct", "chained", "stored"), 1):
        cells = []
        for low, high in (*BINS, (1, 1000)):
            e = rows[(rows[:, 0] >= low) & (rows[:, 0] <= high), k]
            e = e[e != np.inf]
            covered = ~np.isnan(e)
            good = f"{(e[covered] < NEAR).mean():.0%}" if covered.any() else "-"
            cells.append(f"{good} of {covered.mean():.0%}" if kind == "stored" and len(e) else good)
        lines.append(f"| {name}, {kind} | " + " | ".join(cells) + " |")
    return lines


def picture(folders: dict[str, Path], weights_dir: Path | None, path: Path) -> None:
    """Draw three stored pairs of frame 0 (the nearest, a middle and the farthest frame), one in each row.

    Columns: the two frames; then, for each flow method, the direct, the chained and the stored flow. In the stored
    flow, pixels without a correspondence are gray and occluded pixels are darker."""
    sequence = open_sequence(next(iter(folders.values())), None)
    targets = [j for i, j in open_correspondences(sequence).pairs.tolist() if i == 0]
    targets = [targets[0], targets[len(targets) // 2], targets[-1]]
    height = len(targets) * (2 * sequence.size[0] / sequence.size[1] + 0.25)
    figure = Figure((2 * (2 + 3 * len(folders)), height), dpi=90, layout="constrained")
    grid = figure.subplots(len(targets), 2 + 3 * len(folders))
    for row, j in zip(grid, targets, strict=True):
        cells, longest = {"frame 0": sequence.frame(0), f"frame {j}": sequence.frame(j)}, None
        for name, folder in folders.items():
            store = open_correspondences(open_sequence(folder, None))
            model = flow_model(name, weights_dir, store.size)
            [(direct, _)] = model.flow(
                [model.encode(sequence.frame(0))], [model.encode(sequence.frame(j))], [None], j == 1)
            pair, chained = store.dense(0, j), chained_flow(store, 0, j)
            longest = longest or full_saturation(chained)
            stored = flow_colors(pair.flow, longest)
            stored[pair.occlusion] //= 2
            stored[~(pair.cycle | pair.occlusion)] = 128
            cells |= {f"{name}, direct": flow_colors(direct, longest), f"{name}, chained": flow_colors(
                chained, longest), f"{name}, stored": stored}
        for axes, (title, image) in zip(row, cells.items(), strict=True):
            axes.imshow(image)
            axes.set_title(title, fontsize=10)
            axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def chained_flow(store: CorrespondenceStore, i: int, j: int) -> np.ndarray:
    """Flow `(H, W, 2)` from every pixel of frame i to frame j, the sum of adjacent flows along its path."""
    H, W = store.size
    y, x = np.mgrid[:H, :W]
    start = np.stack([x, y], axis=-1).reshape(-1, 2).astype(np.float32)
    points, step = start.copy(), 1 if j > i else -1
    for t in range(i, j, step):
        points = points + sample(store.dense(t, t + step).flow, points)
    return (points - start).reshape(H, W, 2)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", required=True)
    parser.add_argument("--annotations", required=True)
    parser.add_argument("--work_dir", required=True, type=Path)
    parser.add_argument("--weights_dir", type=Path)
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("preprocessing", nargs="*", help="more options of `python -m preprocessing`, after --")
    args = parser.parse_args()
    weights = ["--weights_dir", str(args.weights_dir)] if args.weights_dir else []
    names = [f"{low}-{high}" if high < 1000 else f"{low}+" for low, high in BINS]
    folders, costs, consistency = {}, [], []
    for name in args.sources:
        options = SOURCES[name]
        folder = folders[name] = args.work_dir / name.replace(" ", "_")
        cost = preprocess(folder, ["--video", args.video, "--chain", "unfiltered", *options, *weights,
                                   *args.preprocessing])
        sequence = open_sequence(folder, None)
        store = open_correspondences(sequence)
        annotations = first_frames(load_annotations(args.annotations), len(sequence)).resized(sequence.size)
        line, *more = report(name, cost, store, errors(name, args.weights_dir, sequence, store, annotations))
        costs.append(line)
        consistency += more
    print("| source | time | CPU time | peak memory | disk | valid at intervals of " + " | ".join(names) + " |")
    print("|---" * (5 + len(BINS)) + "|", *costs, sep="\n")
    print("\n| joints within 4 px | " + " | ".join(names) + " | all |\n" + "|---" * (2 + len(BINS)) + "|",
          *consistency, sep="\n")
    if args.picture:
        picture(folders, args.weights_dir, args.picture)


if __name__ == "__main__":
    main()
