"""Real clips, against flow without a model: python -m benchmarks.real_clips --clips ../shared/data/davis

CLIPS holds one folder a clip, as `eval.py --tapvid` reads them: color/, annotations.npz, and mask/ with a mask of the
main object in every frame. Every clip is preprocessed, trained on, and tracked; a second run computes only what is
missing. Reported for each clip, and as the mean over the clips:

    AJ, delta_avg, OA   TAP-Vid's metrics in the query mode `first`
    IoU                 label propagation: every 4th pixel of every 5th frame is tracked back to frame 0 and takes the
                        mask's label there, background if it is hidden or outside; intersection over union with the
                        mask of its own frame, mean over the frames
    seconds             of preprocessing, training and tracking

for five trackers: points that do not move (`static`), flow from frame to frame (`chain`), flow over several intervals
(`multiflow`), the model alone (`model`), and the run's tracks (`tracks`). A paired bootstrap over the points gives the
difference between `tracks` and `multiflow` its 90% interval. A second table has the precision and recall of
"occluded"; its means are over the clips in which they are defined.
"""

import argparse
import shlex
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.results import result_text
from common.cli import Flag, Parser, run
from common.errors import UserError
from common.files import read_json, write_json
from common.geometry import regular_grid
from configs.options import parse
from evaluation.benchmark import benchmark_name, check_settings, run_benchmark, sequences_folder, tracker_settings
from evaluation.scoring import as_point_tracks, baseline_tracks, score
from evaluation.tables import COLUMNS, OCCLUSION_COLUMNS
from inference.load_run import load_run
from loaders.images import image_files, read_masks
from loaders.predicted_tracks import load_tracks
from loaders.sequence import open_sequence
from loaders.track_files import (
    Annotations,
    PointTracks,
    load_annotations,
    sample_queries,
    save_tracks,
)

TRACKERS = ("static", "chain", "multiflow", "model", "tracks")
METRICS = {key: title for key, title in COLUMNS.items() if key != "temporal_coherence"}
QUICK_CLIPS = ("breakdance", "car-shadow", "dance-twirl", "kite-surf")
QUICK_STEPS = 600
PIXEL_STRIDE = 4   # pixels between the queries of label propagation
FRAME_STRIDE = 5   # frames between its query frames
DRAWS = 1_000      # of the bootstrap
INTERVAL = (5, 95)  # percentiles


def bench_options(args: argparse.Namespace) -> Namespace:
    """Options of eval.py for all clips."""
    words = ["--config", args.config, "--expname", args.expname, "--save_dir", args.out, "--tapvid", args.clips,
             "--query_mode", "first", "--baselines", "static,chain,multiflow",
             f"--preprocessing={args.preprocessing}", "--device", args.device]
    if args.quick:
        words += ["--videos", ",".join(QUICK_CLIPS), "--num_iters", str(QUICK_STEPS)]
    if args.num_iters:
        words += ["--num_iters", str(args.num_iters)]
    return parse("eval", words)


def clip_options(options: Namespace, sequence: Path, root: Path, follow_flow: bool) -> Namespace:
    """Options of eval.py for the run of one clip."""
    return Namespace(**vars(options) | {"data_dir": str(sequence), "save_dir": str(root / "runs"),
                                        "follow_flow": follow_flow})


def saved_tracks(name: str, clip: str, root: Path, options: Namespace) -> PointTracks:
    """A tracker's tracks of the annotations' queries. Those of the model alone are computed if they are missing.

    eval.py calls the run's tracks "model", so those of the model without flow are in the folder "alone"."""
    folders = {"tracks": root / options.query_mode / "model", "model": root / "alone"}
    path = folders.get(name, root / options.query_mode / name) / f"{clip}.npz"
    if name == "model" and not path.is_file():
        sequence = sequences_folder(options) / clip
        run_ = load_run(clip_options(options, sequence, root, False))
        queries, _ = sample_queries(load_annotations(sequence / "annotations.npz"), options.query_mode)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tracks(path, as_point_tracks(run_.tracker.track(queries), queries, run_.sequence.size))
    return load_tracks(path)


def label_queries(size: tuple[int, int], num_frames: int) -> np.ndarray:
    """Queries (t, y, x) `(M, 3)` float32 of label propagation."""
    grid = regular_grid(size, PIXEL_STRIDE, PIXEL_STRIDE // 2).reshape(-1, 2)
    frames = range(FRAME_STRIDE, num_frames, FRAME_STRIDE)
    return np.concatenate([np.column_stack([np.full(len(grid), t), grid[:, ::-1]]) for t in frames]).astype(np.float32)


def propagated_iou(queries: np.ndarray, ends: np.ndarray, visible: np.ndarray, masks: np.ndarray) -> float:
    """Mean intersection over union of propagated labels and masks.

    queries `(M, 3)`; ends `(M, 2)`: positions in frame 0, pixels; visible `(M,)` bool: there; masks `(T, H, W)` bool.
    Frames whose mask has none of the queries are left out; NaN if there is no other."""
    H, W = masks.shape[1:]
    x, y = np.rint(np.nan_to_num(ends)).astype(int).T
    within = visible & (x >= 0) & (x < W) & (y >= 0) & (y < H)
    label = within & masks[0, y.clip(0, H - 1), x.clip(0, W - 1)]
    t, rows, columns = queries.astype(int).T
    truth = masks[t, rows, columns]
    ratios = [(label & truth)[t == frame].sum() / (label | truth)[t == frame].sum()
              for frame in np.unique(t) if truth[t == frame].any()]
    return float(np.mean(ratios)) if ratios else float("nan")


def label_propagation(name: str, clip: str, root: Path, options: Namespace) -> float:
    """IoU of a tracker on a clip; NaN if the clip has no masks."""
    path = root / "labels" / name / f"{clip}.json"
    if path.is_file():
        return read_json(path, "remove it")["iou"]
    folder = sequences_folder(options) / clip
    sequence = open_sequence(folder, None)
    files = image_files(Path(options.tapvid) / clip / "mask")
    if not files:
        return float("nan")
    masks = read_masks(files, sequence.size, options.max_pixels)
    queries = label_queries(sequence.size, len(sequence))
    if name in ("model", "tracks"):
        tracker = load_run(clip_options(options, folder, root, name == "tracks" and options.follow_flow)).tracker
        found = tracker.track(queries, [0])
    else:
        found = baseline_tracks(name, sequence, queries, options.preprocessing)
    iou = propagated_iou(queries, found.tracks[:, 0], found.visible[:, 0], masks)
    write_json(path, {"iou": iou})
    return iou


def bootstrap(pairs: list[tuple[PointTracks, PointTracks, Annotations, np.ndarray]],
              draws: int = DRAWS) -> dict[str, tuple[float, float, float]]:
    """For each of METRICS, the mean over the clips of its difference between two trackers, and its interval.

    pairs: for each clip (tracks, other tracks, ground truth, ground-truth row of each query). Points are drawn with
    replacement within each clip, the same for both trackers."""
    rng = np.random.default_rng(0)

    def differences(chosen: list[np.ndarray]) -> np.ndarray:
        """Mean difference of each metric `(len(METRICS),)` for the chosen points of each clip."""
        values = []
        for (tracks, other, truth, rows), some in zip(pairs, chosen, strict=True):
            try:
                ours = score(subset(tracks, some), truth, rows[some], "first")
                theirs = score(subset(other, some), truth, rows[some], "first")
            except UserError:  # none of the drawn points is visible
                continue
            values.append([ours[key] - theirs[key] for key in METRICS])
        return np.mean(values, axis=0)

    sizes = [len(rows) for *_, rows in pairs]
    drawn = [differences([rng.integers(0, n, n) for n in sizes]) for _ in tqdm(range(draws), desc="bootstrap")]
    means = differences([np.arange(n) for n in sizes])
    low, high = np.percentile(drawn, INTERVAL, axis=0)
    return {key: (float(means[k]), float(low[k]), float(high[k])) for k, key in enumerate(METRICS)}


def subset(tracks: PointTracks, rows: np.ndarray) -> PointTracks:
    """Some of the tracks."""
    return PointTracks(tracks.tracks[rows], tracks.visible[rows], tracks.query_points[rows], tracks.frame_size)


def clip_seconds(root: Path, options: Namespace, clip: str) -> dict[str, float]:
    """Seconds of the stages of a clip: preprocessing, training, tracking."""
    return read_json(root / options.query_mode / "model" / f"{clip}.json", "remove it")["seconds"]


def report(options: Namespace, root: Path, out: Path, propagate: bool, command: str) -> None:
    """Score all trackers on all clips that are done, print the tables and write them to `out`, as benchmarks.results
    reads them.

    propagate: also measure label propagation. command: what is named in the file of results."""
    done = sorted(path.stem for path in (root / options.query_mode / "model").glob("*.npz"))
    if not done:
        raise UserError(f"no clip in {options.tapvid} could be tracked")
    for folder in ("labels", "alone"):
        check_settings(root / folder, "*", tracker_settings(options, "model"))
    pairs, frames, seconds = [], [], []
    values = {name: [] for name in TRACKERS}
    occlusion = {name: [] for name in TRACKERS}
    for clip in tqdm(done, desc="clips"):
        truth = load_annotations(sequences_folder(options) / clip / "annotations.npz")
        _, annotation_rows = sample_queries(truth, options.query_mode)
        tracks = {name: saved_tracks(name, clip, root, options) for name in TRACKERS}
        pairs.append((tracks["tracks"], tracks["multiflow"], truth, annotation_rows))
        frames.append(truth.points.shape[1])
        seconds.append(sum(clip_seconds(root, options, clip).values()))
        for name in TRACKERS:
            metrics = score(tracks[name], truth, annotation_rows, options.query_mode)
            iou = label_propagation(name, clip, root, options) if propagate else np.nan
            values[name].append([*(metrics[key] for key in METRICS), iou])
            occlusion[name].append([metrics.get(key, np.nan) for key in OCCLUSION_COLUMNS])
    found = {name: np.array(of_clips) for name, of_clips in values.items()}  # (clips, 4) each
    tables = {"real_clips": metrics_table(done, frames, found),
              "real_clips_occlusion": occlusion_table(done, occlusion),
              "real_clips_difference": difference_table(bootstrap(pairs))}
    if propagate:
        tables["real_clips_labels"] = labels_table(done, found)
    for name, table in tables.items():
        write_json(out / f"{name}.json", table | {"command": command})
        print(result_text(table), end="\n\n")
    print("Seconds:", ", ".join(f"{clip} {value:.0f}" for clip, value in zip(done, seconds, strict=True)))


def metrics_table(clips: list[str], frames: list[int], values: dict[str, np.ndarray]) -> dict:
    """Table of AJ, delta_avg and OA; title, columns and rows as benchmarks.results reads them.

    values: for each tracker METRICS and the IoU of label propagation `(clips, 4)`"""
    rows = [[clip, count, *(cell(values[name][k, :-1]) for name in TRACKERS)]
            for k, (clip, count) in enumerate(zip(clips, frames, strict=True))]
    return {"title": " / ".join(METRICS.values()), "columns": ["clip", "frames", *TRACKERS],
            "rows": [*rows, ["mean", None, *(cell(values[name][:, :-1].mean(axis=0)) for name in TRACKERS)]]}


def labels_table(clips: list[str], values: dict[str, np.ndarray]) -> dict:
    """Table of label propagation. Arguments and result as of `metrics_table`. Clips without masks are left out."""
    iou = np.stack([values[name][:, -1] for name in TRACKERS], axis=1)  # (clips, trackers)
    rows = [[clip, *map(float, of_clip)] for clip, of_clip in zip(clips, iou, strict=True)
            if not np.isnan(of_clip).any()]
    mean = np.ma.masked_invalid(iou).mean(axis=0).tolist()
    return {"title": "Intersection over union of propagated labels with the human masks",
            "columns": ["clip", *TRACKERS], "rows": [*rows, ["mean", *mean]]}


def difference_table(differences: dict[str, tuple[float, float, float]]) -> dict:
    """Table of `bootstrap`, as `metrics_table`."""
    return {"title": "Mean over the clips of the difference between `tracks` and `multiflow`, and its "
                     f"{INTERVAL[1] - INTERVAL[0]}% interval (bootstrap over the points)",
            "columns": ["metric", "difference", "from", "to"],
            "rows": [[METRICS[key], *values] for key, values in differences.items()]}


def occlusion_table(clips: list[str], values: dict[str, list[list[float]]]) -> dict:
    """Table of the precision and recall of "occluded"; title, columns and rows as benchmarks.results reads them.

    values: for each tracker one pair for each clip, NaN where it is not defined. Means are over the other clips."""
    rows = [[clip, *(cell(pairs[k]) for pairs in values.values())] for k, clip in enumerate(clips)]
    means = [np.ma.masked_invalid(pairs).mean(axis=0).filled(np.nan) for pairs in values.values()]
    return {"title": "Precision / recall of \"occluded\"; -: nothing is predicted occluded / nothing is occluded",
            "columns": ["clip", *values], "rows": [*rows, ["mean where defined", *map(cell, means)]]}


def cell(values) -> str:
    """One tracker's numbers as a table cell; "-" for NaN."""
    return " / ".join("-" if np.isnan(value) else f"{value:.3f}" for value in values)


def main() -> None:
    parser = Parser(prog="python -m benchmarks.real_clips", description=__doc__.split("\n")[0])
    parser.add_argument("--clips", required=True, help="folder of clips")
    parser.add_argument("--out", default="out/real_clips", help="folder of all results")
    parser.add_argument("--expname", default="fast", help="name of the experiment; results go to OUT/EXPNAME_CLIPS")
    parser.add_argument("--config", default="configs/fast.txt", help="config file of train.py")
    parser.add_argument("--num_iters", type=int, default=0, help="training steps; 0: the config's")
    parser.add_argument("--preprocessing", default="--chain --pairs log", help="options of python -m preprocessing")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="device to compute on")
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK_CLIPS)} clips, {QUICK_STEPS} steps")
    parser.add_argument("--propagation", action=Flag, default=True, help="measure label propagation, which takes as "
                        "long as training")
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # as train.py does
    options = bench_options(args)
    try:
        run_benchmark(options)
    except SystemExit as stop:
        if stop.code != 1:  # 1: some clips failed and were named; the others are reported
            raise
    root = Path(args.out).resolve() / f"{args.expname}_{benchmark_name(args.clips)}"
    command = f"python -m benchmarks.real_clips --clips {Path(args.clips).name} --config {args.config}"
    if args.num_iters:
        command += f" --num_iters {args.num_iters}"
    if args.preprocessing != parser.get_default("preprocessing"):
        command += f" --preprocessing={shlex.quote(args.preprocessing)}"
    report(options, root, Path(args.out), args.propagation, command)


if __name__ == "__main__":
    run(main)
