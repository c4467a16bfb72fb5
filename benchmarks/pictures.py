"""Make the pictures in docs/images. Those of the demo, from the frames that `viz.py` draws:

    make demo
    python viz.py --config configs/demo.txt --data_dir seqs/demo --what all --formats png
    python -m benchmarks.pictures

real_clips.png, from results of benchmarks.real_clips; it shows positions only, no frames:

    python -m benchmarks.real_clips --clips ../shared/data/davis
    python -m benchmarks.pictures --real_clips out/real_clips/fast_davis
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from common.cli import Parser, run
from common.errors import UserError
from common.files import atomic_path
from common.geometry import inside
from evaluation.metrics import RESOLUTION
from evaluation.scoring import score
from loaders.predicted_tracks import load_tracks
from loaders.track_files import Annotations, PointTracks, load_annotations, sample_queries

ROOT = Path(__file__).resolve().parents[1]
DRAWN = ROOT / "out/demo_demo"
IMAGES = ROOT / "docs/images"
FRAMES = {"tracks": "tracks_00000/00012", "trails": "trails_00000/00016", "occlusion": "occlusion_00000/00008",
          "depth": "depth/00008", "flow": "flow/00008", "color": "color/00008", "errors": "errors/00008",
          "canonical": "canonical/00008", "pairs": "pairs_00000_00012"}
MAX_WIDTH = 900  # pixels
GIF_WIDTH = 320
GIF_COLORS = 96
GIF_MILLISECONDS = 110  # a frame

CLIPS = "dance-twirl,car-shadow,bmx-trees,paragliding-launch"
TRACKERS = {"first/multiflow": "multi-interval flow", "alone": "model alone", "first/model": "tracks"}  # by folder
NEAR = 8  # pixels at 256x256
GREEN, RED, GRAY = "#1f9e6b", "#c8322b", "#8c8c8c"
LEGEND = {"true position": {"color": "black", "marker": ".", "markersize": 5},
          f"predicted within {NEAR} px of it (at {RESOLUTION}x{RESOLUTION})": {"color": GREEN, "marker": "o"},
          "predicted farther away": {"color": RED, "marker": "o", "linestyle": "-"},
          "predicted outside the frame": {"color": RED, "marker": r"$\rightarrow$", "markersize": 13},
          "predicted hidden": {"color": RED, "marker": "o", "markerfacecolor": "white"},
          "truly hidden; true position unknown": {"color": GRAY, "marker": "o"}}


def resized(path: Path, width: int) -> Image.Image:
    """The picture, reduced to a width of at most `width` pixels."""
    image = Image.open(path).convert("RGB")
    height = round(image.height * width / image.width)
    return image if image.width <= width else image.resize((width, height), Image.Resampling.LANCZOS)


def draw_demo() -> None:
    """Write the pictures of the demo."""
    if missing := [frame for frame in FRAMES.values() if not (DRAWN / f"{frame}.png").is_file()]:
        raise UserError(f"no file {DRAWN / missing[0]}.png: run the commands at the top of benchmarks/pictures.py")
    for name, frame in FRAMES.items():
        resized(DRAWN / f"{frame}.png", MAX_WIDTH).save(IMAGES / f"{name}.jpg", quality=88)
    frames = [resized(path, GIF_WIDTH) for path in sorted((DRAWN / "tracks_00000").glob("*.png"))]
    palette = frames[len(frames) // 3].quantize(GIF_COLORS)  # one for all frames, so that still parts stay the same
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    first.save(IMAGES / "tracks.gif", save_all=True, append_images=others, duration=GIF_MILLISECONDS, loop=0)


def sequences_of(results: Path) -> Path:
    """OUT/sequences/BENCHMARK, the sequence folders of the results in OUT/EXPNAME_BENCHMARK. UserError if missing."""
    if not results.is_dir():
        raise UserError(f"no folder {results}: give results of benchmarks.real_clips, as out/real_clips/fast_davis")
    folders = (results.parent / "sequences").glob("*")
    found = [folder for folder in folders if results.name.endswith(f"_{folder.name}")]
    if not found:
        raise UserError(f"{results.parent / 'sequences'} has no sequences of {results.name}: keep both folders where "
                        "benchmarks.real_clips wrote them")
    return max(found, key=lambda folder: len(folder.name))


def draw_real_clips(results: Path, clips: list[str], path: Path) -> None:
    """Draw the last frame of the clips (rows) for each of TRACKERS (columns), without images, and write it to `path`.

    results: folder OUT/EXPNAME_BENCHMARK of benchmarks.real_clips. UserError if a file is missing or damaged."""
    size = (RESOLUTION, RESOLUTION)
    sequences = sequences_of(results)
    with matplotlib.rc_context({"font.size": 9, "lines.markersize": 4}):
        figure = Figure((9, 0.6 + 3.05 * len(clips)), dpi=100, layout="constrained")
        for clip, row in zip(clips, figure.subplots(len(clips), len(TRACKERS), squeeze=False), strict=True):
            truth = load_annotations(sequences / clip / "annotations.npz").resized(size)
            _, rows = sample_queries(truth, "first")
            for axes, (folder, title) in zip(row, TRACKERS.items(), strict=True):
                tracks = load_tracks(results / folder / f"{clip}.npz").resized(size)
                accuracy = score(tracks, truth, rows, "first")["average_pts_within_thresh"]
                draw_ends(axes, tracks, truth, rows)
                axes.set_title(f"{title}: delta_avg {accuracy:.3f}", fontsize=9)
            row[0].set_ylabel(clip, fontsize=11)
        lines = [Line2D([], [], label=label, **{"linestyle": "", **style}) for label, style in LEGEND.items()]
        figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False)
        with atomic_path(path) as temporary:
            figure.savefig(temporary)


def draw_ends(axes: Axes, tracks: PointTracks, truth: Annotations, rows: np.ndarray) -> None:
    """Draw the true and the predicted positions in the last frame, and lines between them.

    Both have frames of 256x256. rows `(M,)`: the ground-truth row of each track."""
    axes.set(xlim=(-0.5, RESOLUTION - 0.5), ylim=(RESOLUTION - 0.5, -0.5), xticks=[], yticks=[], aspect="equal")
    for track, row in enumerate(rows):
        if truth.evaluated is not None and not truth.evaluated[row, -1]:
            continue
        end, true = tracks.tracks[track, -1], truth.points[row, -1]
        color = GREEN if np.linalg.norm(end - true) < NEAR else RED
        if truth.occluded[row, -1]:  # then its true position is undefined
            color, true = GRAY, np.clip(end, 10, RESOLUTION - 11)  # a short arrow, if it points out of the frame
        else:
            axes.plot(*true, "k.", markersize=3, zorder=3)
        if not inside(end, tracks.frame_size):
            axes.annotate("", border(true, end), true, arrowprops={
                "arrowstyle": "->", "color": color, "shrinkA": 0, "shrinkB": 0, "linewidth": 0.8})
            continue
        if color != GRAY:
            axes.plot(*zip(true, end, strict=True), color=color, linewidth=0.8, zorder=1)
        axes.plot(*end, "o", color=color, markerfacecolor=color if tracks.visible[track, -1] else "white", zorder=2)


def border(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Where the line from `start` `(2,)` within a frame of 256x256 to `end` outside of it leaves the frame."""
    step = end - start
    limit = np.where(step > 0, RESOLUTION - 0.5, -0.5)
    return start + np.min((limit - start)[step != 0] / step[step != 0]) * step


def main() -> None:
    parser = Parser(prog="python -m benchmarks.pictures", description=__doc__.split("\n")[0].split(".")[0])
    parser.add_argument("--real_clips", help="results of benchmarks.real_clips, OUT/EXPNAME_CLIPS: only write "
                        "real_clips.png, the ends of the tracks")
    parser.add_argument("--clips", default=CLIPS, help="clips in real_clips.png")
    parser.add_argument("--out", default="docs/images", help="folder of real_clips.png")
    args = parser.parse_args()
    if args.real_clips is None:
        draw_demo()
    else:
        draw_real_clips(Path(args.real_clips).resolve(), args.clips.split(","), Path(args.out) / "real_clips.png")


if __name__ == "__main__":
    run(main)
