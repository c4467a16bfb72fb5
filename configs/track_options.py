"""The options of track.py."""

import argparse
import math
from argparse import Namespace
from pathlib import Path

from common.cli import Parser, at_least


def parser() -> Parser:
    """The parser of track.py."""
    out = Parser(prog="track.py", allow_abbrev=False, description="Track points of a clip: tracks, a video of the "
                 "tracks, and an interactive page. Run again, it computes only what is missing.")
    add = out.add_argument
    add("clip", help="video file or folder of images")
    add("--out", default="", metavar="FILE", help="tracks to write; the ending selects the format: .npz .csv .pt .nuke "
        ".ae .blender.py .rrd. Video and page get the same name (default: out/CLIP_tracks.npz)")
    points = out.add_argument_group("points to track (default: a grid in frame 0), in pixels and frame numbers of the "
                                    "clip").add_mutually_exclusive_group()
    points.add_argument("--queries", metavar="FILE", help="query points: .csv with the header t,y,x, or .npz")
    points.add_argument("--query", type=point, action="append", metavar='"FRAME,X,Y"', help="one query point; may be "
                        "given several times")
    points.add_argument("--grid", type=at_least(1), metavar="N", help="points of frame 0, N pixels apart")
    points.add_argument("--every_pixel", type=at_least(0), metavar="FRAME", help="every pixel of a frame, at the size "
                        "at which the clip is processed")
    add = out.add_argument_group("training").add_argument
    add("--config", default="", help="preset (default: configs/fast.txt, on a GPU configs/default.txt)")
    add("--num_iters", type=at_least(1), metavar="N", help="training steps (default: the preset's)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to compute on; auto: CUDA if "
        "available")
    add("--keep_work", default="", metavar="DIR", help="folder of frames, correspondences and trained model, for later "
        "calls (default: CLIP_work beside the tracks)")
    return out


def parse(argv: list[str] | None = None) -> Namespace:
    """The options from the command line, with defaults of `out` and `keep_work`. SystemExit 2 for a mistake, after one
    line on stderr."""
    options = parser().parse_args(argv)
    clip = Path(options.clip)
    name = clip.resolve().stem if not clip.is_dir() else clip.resolve().name
    options.out = options.out or f"out/{name}_tracks.npz"
    options.keep_work = options.keep_work or str(Path(options.out).parent / f"{name}_work")
    return options


def point(text: str) -> tuple[int, float, float]:
    """Type of an option: a query point "frame,x,y"."""
    try:
        frame, x, y = text.split(",")
        values = int(frame), float(x), float(y)
    except ValueError:
        values = -1, math.nan, math.nan
    if values[0] < 0 or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text!r} is not FRAME,X,Y, for example 0,120.5,64")
    return values
