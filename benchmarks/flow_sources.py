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
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from common.cli import Parser
from common.files import write_json
from common.geometry import pixel_grid, sample
from drawing.colors import flow_colors, full_saturation
from evaluation.tables import markdown
from loaders.correspondence_format import DensePair
from loaders.correspondences import CorrespondenceStore, open_correspondences
from loaders.sequence import VideoSequence, open_sequence
from loaders.track_files import Annotations, load_annotations
from preprocessing.flow import FLOW_MODELS, FlowModel, ModelOptions, flow_between, resize_flow

SOURCES = {"DIS": ("dis", ""), "RAFT small": ("raft", "raft-small.pth")}  # --flow and --raft_weights
BINS = ((1, 5), (6, 10), (11, 20), (21, 40), (41, 1000))  # ranges of intervals, frames; 1000: no upper end
CORRECT_ERROR = 4.0  # pixels at 256x256: largest error of a correct position
MEMORY = 1 << 30  # bytes that a flow model may use


def preprocess(folder: Path, arguments: list[str]) -> dict:
    """Run `python -m preprocessing` to its end; returns seconds, CPU seconds and peak bytes, over all resumed runs."""
    path = folder / "cost.json"
    cost = json.loads(path.read_text()) if path.is_file() else {"seconds": 0.0, "cpu": 0.0, "bytes": 0}
    if (folder / "correspondences" / "meta.json").is_file():
        return cost
    begin = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.Popen([sys.executable, "-m", "preprocessing", "--data_dir", str(folder), "--resume", *arguments])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the child saves and exits, and its cost is written
    code = child.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cost["seconds"] += time.perf_counter() - begin
    cost["cpu"] += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    cost["bytes"] = max(cost["bytes"], after.ru_maxrss * 1024)
    write_json(path, cost)
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


def chained(store: CorrespondenceStore, points: np.ndarray, frames: Iterable[int]) -> dict[int, np.ndarray]:
    """Positions of points `(N, 2)` of the first of `frames` in all following ones, by chaining the flows of adjacent
    frames. `frames` are consecutive, in either direction."""
    out = {}
    for a, b in pairwise(frames):
        points = points + sample(store.dense(a, b).flow, points)
        out[b] = points
    return out


def stored_ends(store: CorrespondenceStore, i: int, j: int, p: np.ndarray) -> np.ndarray:
    """Stored correspondences `(n, 2)` in frame j of points p `(n, 2)` of frame i; NaN where none is stored."""
    pair = store.dense(i, j)
    x, y = np.rint(p).astype(int).T.clip(0, np.array(store.size[::-1])[:, None] - 1)
    valid = (pair.cycle | pair.occlusion)[y, x]
    return np.where(valid[:, None], p + pair.flow[y, x], np.nan)


def flow_model(name: str, weights_dir: Path | None, size: tuple[int, int]) -> FlowModel:
    """The flow model of a source, for frames of `size` (H, W)."""
    method, weights = SOURCES[name]
    return FLOW_MODELS[method](ModelOptions(weights=weights, weights_dir=weights_dir), size, MEMORY)


def errors(model: FlowModel, sequence: VideoSequence, store: CorrespondenceStore,
           annotations: Annotations) -> np.ndarray:
    """Rows (interval, still, direct, chained, stored), one a point and pair of frames; errors in pixels at 256x256.

    `stored` is NaN where the point has no correspondence, and infinite where the pair of frames is not stored."""
    pairs = frame_pairs(annotations)
    frames = sorted({i for i, _, _ in pairs})
    encodings = {t: model.encode(sequence.frame(t)) for t in frames}
    chains = {i: chained(store, annotations.points[:, i], range(i, store.num_frames))
              | chained(store, annotations.points[:, i], range(i, -1, -1)) for i in frames}
    scale = 256 / np.array(store.size[::-1])
    stored_pairs = set(map(tuple, store.pairs.tolist()))
    out = []
    for i, j, joints in tqdm(pairs, desc="annotated pairs"):
        p, truth = annotations.points[joints, i], annotations.points[joints, j]  # (n, 2)
        [(flow, _)] = model.flow([encodings[i]], [encodings[j]], [None], abs(i - j) == 1)
        flow = resize_flow(flow, sequence.size)
        stored = stored_ends(store, i, j, p) if (i, j) in stored_pairs else np.full_like(p, np.inf)
        ends = np.stack([p, p + sample(flow, p), chains[i][j][joints], stored])  # (4, n, 2)
        distances = np.linalg.norm((ends - truth) * scale, axis=-1)  # (4, n)
        out.append(np.column_stack([np.full(len(p), abs(i - j)), *distances]))
    return np.concatenate(out)


def interval_names(bins: Iterable[tuple[int, int]]) -> list[str]:
    """Column titles of ranges of intervals."""
    return [str(low) if low == high else f"{low}-{high}" if high < 1000 else f"{low}+" for low, high in bins]


def by_interval(interval: np.ndarray, values: np.ndarray, bins: Iterable[tuple[int, int]]) -> list[np.ndarray]:
    """The values `(n,)` whose interval `(n,)` is in each range."""
    return [values[(interval >= low) & (interval <= high)] for low, high in bins]


def cost_cells(cost: dict, store: CorrespondenceStore) -> list[str]:
    """Row of the first table: time, CPU time, memory, disk space, and share of valid correspondences by interval."""
    interval = np.abs(store.pairs[:, 0] - store.pairs[:, 1])
    share = store.counts[store.pairs[:, 0], store.pairs[:, 1]] / np.prod(store.size)
    share = np.where((interval > 1) & (store.meta["method"].get("keep") == "half"), 2 * share, share)
    disk = sum(path.stat().st_size for path in store.root.iterdir())
    valid = [f"{part.mean():.0%}" if len(part) else "-" for part in by_interval(interval, share, BINS)]
    return [f"{cost['seconds'] / 60:.1f} min", f"{cost['cpu'] / 60:.1f} min", f"{cost['bytes'] / 2**30:.2f} GiB",
            f"{disk / 2**20:.0f} MiB", *valid]


def near_cell(error: np.ndarray) -> str:
    """Share of errors below CORRECT_ERROR, and the share of points that have a correspondence if that is not all."""
    error = error[error != np.inf]
    known = error[~np.isnan(error)]
    if not len(known):
        return "-"
    good = f"{(known < CORRECT_ERROR).mean():.0%}"
    return good if len(known) == len(error) else f"{good} of {len(known) / len(error):.0%}"


def stored_image(pair: DensePair, longest: float) -> np.ndarray:
    """Colors `(H, W, 3)` of stored flow: pixels without a correspondence are gray, occluded pixels are darker."""
    image = flow_colors(pair.flow, longest)
    image[pair.occlusion] //= 2
    image[~(pair.cycle | pair.occlusion)] = 128
    return image


def picture(folders: dict[str, Path], weights_dir: Path | None, path: Path) -> None:
    """Draw three stored pairs of frame 0 (the nearest, a middle and the farthest frame), one in each row.

    Columns: the two frames; then, for each flow method, the direct, the chained and the stored flow."""
    sequence = open_sequence(next(iter(folders.values())), None)
    targets = [j for i, j in open_correspondences(sequence).pairs.tolist() if i == 0]
    targets = [targets[0], targets[len(targets) // 2], targets[-1]]
    height = len(targets) * (2 * sequence.size[0] / sequence.size[1] + 0.25)  # inches
    figure = Figure((2 * (2 + 3 * len(folders)), height), dpi=90, layout="constrained")
    grid = figure.subplots(len(targets), 2 + 3 * len(folders))
    for row, j in zip(grid, targets, strict=True):
        images = {"frame 0": sequence.frame(0), f"frame {j}": sequence.frame(j)}
        longest = None  # flow in pixels that is drawn at full saturation: the first method's, for all of a row
        for name, folder in folders.items():
            store = open_correspondences(open_sequence(folder, None))
            model = flow_model(name, weights_dir, store.size)
            direct, _ = flow_between(model, sequence.frame(0), sequence.frame(j), j == 1, store.size)
            pixels = pixel_grid(store.size).numpy().reshape(-1, 2)  # (H * W, 2)
            chain = (chained(store, pixels, range(j + 1))[j] - pixels).reshape(*store.size, 2)
            longest = longest or full_saturation(chain)
            images[f"{name}, direct"] = flow_colors(direct, longest)
            images[f"{name}, chained"] = flow_colors(chain, longest)
            images[f"{name}, stored"] = stored_image(store.dense(0, j), longest)
        for axes, (title, image) in zip(row, images.items(), strict=True):
            axes.imshow(image)
            axes.set_title(title, fontsize=10)
            axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


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
    weights_dir = ["--weights_dir", str(args.weights_dir)] if args.weights_dir else []
    folders = {name: args.work_dir / name.replace(" ", "_") for name in args.sources}
    costs, joints = [], []
    for name, folder in folders.items():
        method, weights = SOURCES[name]
        cost = preprocess(folder, ["--video", args.video, "--chain", "unfiltered", "--flow", method,
                                   *(["--raft_weights", weights] if weights else []), *weights_dir,
                                   *args.preprocessing])
        sequence = open_sequence(folder, None)
        store = open_correspondences(sequence)
        annotations = first_frames(load_annotations(args.annotations), len(sequence)).resized(sequence.size)
        costs.append([name, *cost_cells(cost, store)])
        rows = errors(flow_model(name, args.weights_dir, sequence.size), sequence, store, annotations)
        for k, kind in enumerate(("still", "direct", "chained", "stored"), 1):
            parts = by_interval(rows[:, 0], rows[:, k], (*BINS, (1, 1000)))
            joints.append([f"{name}, {kind}", *map(near_cell, parts)])
    first, *others = interval_names(BINS)
    print(markdown(["source", "time", "CPU time", "peak memory", "disk", f"valid at intervals of {first}", *others],
                   costs))
    print()
    print(markdown(["joints within 4 px", first, *others, "all"], joints))
    if args.picture:
        picture(folders, args.weights_dir, args.picture)


if __name__ == "__main__":
    main()
