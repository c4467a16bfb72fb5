"""What each rule of --follow_flow is worth on real clips: python -m benchmarks.tracking_rules --clips FOLDER

Takes the runs of benchmarks.real_clips, with the same FOLDER, OUT and EXPNAME, which must have finished. The annotated
points are tracked again with one rule left out at a time, and labels are propagated. AJ, delta_avg, OA and the IoU of
labels are means over the clips; a paired bootstrap over the points gives each difference of the first three from all
rules its 90% interval. Writes OUT/tracking_rules.json.
"""

import argparse
import shlex
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.real_clips import (
    METRICS,
    bench_options,
    bootstrap,
    clip_options,
    label_queries,
    propagated_iou,
)
from common.cli import Parser, run
from common.errors import UserError
from common.files import write_json
from evaluation.benchmark import benchmark_name, sequences_folder
from evaluation.scoring import score
from evaluation.tables import markdown
from inference.flow_guided_tracker import ModelProposal, StoredFlow, guide
from inference.frame_colors import FrameColors
from inference.load_run import load_run
from inference.multi_interval_flow import follow_intervals
from inference.tracker import Tracks
from loaders.correspondences import CorrespondenceStore, open_correspondences
from loaders.images import image_files, read_masks
from loaders.track_files import Annotations, PointTracks, load_annotations, sample_queries

# name of a row -> arguments of `tracked` that leave out a rule
RULES = {"all": {}, "without differences in color and tentative flow": {"compare_colors": False},
         "without the model's decision about occlusion": {"model_occludes": False},
         "without the model": {"use_model": False}}


def tracked(queries: np.ndarray, model: Tracks, store: CorrespondenceStore, colors: FrameColors,
            compare_colors: bool = True, model_occludes: bool = True, use_model: bool = True) -> PointTracks:
    """Tracks of queries `(M, 3)` of a video of one scene, as `--follow_flow` finds them, or without some of its rules.

    model:          the model's tracks of the queries, visible where `--occlusion_th` says so
    compare_colors: False: only flow that passes the comparison of features, at the cost of its forward-backward error
    model_occludes: False: the model's position is a candidate, but the model never decides that a point is occluded
    use_model:      False: stored flow only, and the model's position where no flow leads to a frame"""
    flow = StoredFlow(store, 0, colors if compare_colors else None)
    if not use_model:
        paths = follow_intervals(queries, model.tracks.shape[1], store.size, flow.step)
        tracks = np.where(np.isnan(paths.tracks), model.tracks, paths.tracks)
        return PointTracks(tracks, paths.visible, queries, store.size)
    proposal = ModelProposal(model.tracks, model.visible, max(store.size))
    if not model_occludes:
        proposal.trusted = -1.0  # no distance is that small
    paths = guide(queries, flow, proposal)
    return PointTracks(paths.tracks, paths.visible, queries, store.size)


@dataclass
class ClipTracks:
    """The tracks of a clip by each of RULES, its annotations, and the annotation row of each query."""
    tracks: dict[str, PointTracks]
    truth: Annotations
    rows: np.ndarray
    iou: dict[str, float]  # of label propagation by each of RULES; NaN without masks


def tracks_of_clip(options: Namespace, root: Path, clip: str) -> ClipTracks:
    """Track the annotated points and the queries of label propagation. UserError if the run has not finished."""
    sequence = sequences_folder(options) / clip
    loaded = load_run(clip_options(options, sequence, root, False))
    truth = load_annotations(sequence / "annotations.npz")
    queries, rows = sample_queries(truth, options.query_mode)
    context = open_correspondences(loaded.sequence), FrameColors(loaded.sequence.frame)
    model = loaded.tracker.track(queries)
    tracks = {name: tracked(queries, model, *context, **rule) for name, rule in RULES.items()}
    iou = dict.fromkeys(RULES, np.nan)
    if files := image_files(Path(options.tapvid) / clip / "mask"):
        masks = read_masks(files, loaded.sequence.size, options.max_pixels)
        queries = label_queries(loaded.sequence.size, len(loaded.sequence))
        model = loaded.tracker.track(queries)
        for name, rule in RULES.items():
            found = tracked(queries, model, *context, **rule)
            iou[name] = propagated_iou(queries, found.tracks[:, 0], found.visible[:, 0], masks)
    return ClipTracks(tracks, truth, rows, iou)


def table(clips: list[ClipTracks]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table."""
    rows = []
    for name in RULES:
        metrics = [score(clip.tracks[name], clip.truth, clip.rows, "first") for clip in clips]
        row = [name, *(f"{np.mean([found[key] for found in metrics]):.3f}" for key in METRICS),
               f"{np.nanmean([clip.iou[name] for clip in clips]):.3f}"]
        if name == "all":
            row += [""] * len(METRICS)
        else:
            pairs = [(clip.tracks[name], clip.tracks["all"], clip.truth, clip.rows) for clip in clips]
            row += [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" for mean, low, high in bootstrap(pairs).values()]
        rows.append(row)
    titles = list(METRICS.values())
    return ["rules", *titles, "IoU of labels", *(f"{title} against all" for title in titles)], rows


def main() -> None:
    parser = Parser(prog="python -m benchmarks.tracking_rules", description=__doc__.split("\n")[0],
                    epilog=__doc__.split("\n\n")[1], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", required=True, help="folder of clips")
    parser.add_argument("--out", default="out/real_clips", help="folder of the results of benchmarks.real_clips")
    parser.add_argument("--expname", default="fast", help="name of the experiment")
    parser.add_argument("--config", default="configs/fast.txt", help="config file of the runs")
    args = parser.parse_args()
    options = bench_options(Namespace(**vars(args), preprocessing="", device="cpu", quick=False, num_iters=0))
    root = Path(args.out).resolve() / f"{args.expname}_{benchmark_name(args.clips)}"
    names = sorted(path.stem for path in (root / options.query_mode / "model").glob("*.npz"))
    if not names:
        raise UserError(f"no finished run in {root}: run benchmarks.real_clips with the same options first")
    columns, rows = table([tracks_of_clip(options, root, clip) for clip in tqdm(names, desc="clips")])
    write_json(Path(args.out) / "tracking_rules.json", {
        "title": f"Mean over {len(names)} clips, and the difference with its 90% interval", "columns": columns,
        "rows": rows, "command": shlex.join(["python", "-m", "benchmarks.tracking_rules", *sys.argv[1:]])})
    print(markdown(columns, rows))


if __name__ == "__main__":
    run(main)
