"""The options of `python -m preprocessing`. No import here needs PyTorch, whose import takes seconds."""

import argparse
import os

from common.cli import Flag, Parser, at_least, positive, share
from common.files import MAX_PIXELS
from preprocessing.features import FEATURE_EXTRACTORS
from preprocessing.flow import FLOW_MODELS
from preprocessing.synthetic.scenes import RECIPES

COORDINATES = ("source", "frames")
DEPTHS = ("depth_anything", "midas", "npz")
LAYOUTS = ("store", "omnimotion")
RULES = ("trusted", "unfiltered")  # of chains, see preprocessing/chaining.py
CORRESPONDENCE_OPTIONS = ("flow", "flow_frames", "tracks", "features", "cycle_th", "pairs", "keep", "layout", "chain",
                          "find_scenes")


def parse(argv: list[str]) -> tuple[str, argparse.Namespace]:
    """The command that `argv` names ("synthetic", "tapvid", "flow", "convert", or "" without a name) and its options.

    SystemExit 2 for a mistake, after one line on stderr."""
    command = argv[0] if argv and argv[0] in COMMANDS else ""
    return command, COMMANDS[command]().parse_args(argv[1:] if command else argv)


def main_parser() -> Parser:
    """Options of the command that makes a sequence folder."""
    out = Parser(prog="python -m preprocessing",
                 description="Video -> sequence folder with correspondences. Other commands: `synthetic` renders a "
                             "sequence with ground truth, `tapvid` a benchmark file of such scenes, `flow` computes "
                             "the flow of one pair, `convert` changes the layout (each has --help).")
    add = out.add_argument
    add("--data_dir", required=True, help="sequence folder to make, or one that has color/ already")
    frames = out.add_argument_group("frames (with --video)")
    add = frames.add_argument
    add("--video", help="video file or folder of images; without it the frames in DATA_DIR/color are used")
    size = frames.add_mutually_exclusive_group()
    size.add_argument("--resize", type=at_least(16), nargs=2, metavar=("H", "W"), help="frame size, in pixels")
    size.add_argument("--short_side", type=at_least(16), help="shorter side of the frames, in pixels; aspect kept")
    add("--start", type=at_least(0), default=0, help="first frame")
    add("--stop", type=at_least(1), help="frame to stop before")
    add("--stride", type=at_least(1), default=1, help="take every STRIDE-th frame")
    add("--max_frames", type=at_least(2), help="stop after so many frames")
    add("--scene", type=at_least(0), metavar="N", help="of a video with cuts, take the frames of scene N only, counted "
        "from 0 (without --scene, a message lists the scenes)")
    add("--flow_frames", action=Flag, default=True, help="compute flow from images of up to 512 pixels "
        "of the shorter side (flow_frames/), if the frames have fewer pixels than the video; "
        "--no-flow_frames: from the frames")
    add("--allow_gaps", action=Flag, nargs=0, help="accept a damaged video, in which frames are missing or corrupt")
    add("--value_range", type=float, nargs=2, metavar=("A", "B"), help="frames of more than 8 bits per value (16-bit "
        "counts, floating-point TIFF, OpenEXR; also in DATA_DIR/color): values that become black and white (default: "
        "percentiles of the whole clip)")
    add_pixel_limit(frames)
    add = out.add_argument_group("correspondences").add_argument
    add("--flow", choices=[*FLOW_MODELS, "cotracker"], default="dis", help="optical flow, or CoTracker's tracks")
    add("--tracks", nargs="+", metavar="FILE", help="tracks of any tracker instead of flow, as .npz, .npy or .pt of "
        "positions and visibility")
    add("--visible_th", type=share, default=0.5, help="probability above which points of --tracks are visible")
    add("--coordinates", choices=COORDINATES, default="source", help="pixels of --tracks without a frame size: those "
        "of the source video, if it is known, or of the frames")
    add("--features", choices=list(FEATURE_EXTRACTORS), default="sift", help="features of the appearance check")
    add("--cycle_th", type=positive, default=3.0, help="largest forward-backward error of valid flow, in pixels")
    add("--pairs", default="log", help="pairs of frames: log (1, 2, 4, 8, 16, ... frames apart; only some of the "
        "pairs more than 64 apart), all, or window:K (at most K frames apart)")
    add("--density", "--keep", dest="keep", choices=("auto", "all", "half"), default="auto", help="correspondences to "
        "store of pairs that are not adjacent: all, or half (a checkerboard), which halves the disk space; auto: half "
        "from 256x256 pixels on")
    add("--layout", choices=LAYOUTS, default="store", help="store, or OmniMotion's folders, which its code can read")
    add("--chain", nargs="?", const="trusted", default="trusted", type=chain_rule, choices=RULES, help="also "
        "correspondences chained over adjacent frames. trusted: prefer unbroken chains to direct flow; unfiltered "
        "(formerly: published): use chains only where direct flow fails, as OmniMotion does")
    add("--no-chain", dest="chain", action="store_const", const="", default=argparse.SUPPRESS, help="direct flow "
        "only")
    add("--find_scenes", action=Flag, default=True, help="find cuts, and make pairs within scenes only; "
        "--no-find_scenes: the video is one scene")
    add("--resume", action=Flag, nargs=0, help="continue unfinished work instead of starting again")
    add("--num_workers", type=at_least(1), default=os.cpu_count(), help="threads")
    add("--memory_gib", "--max_memory", dest="max_memory", type=positive, default=2.0, metavar="GIB", help="limit of "
        "main memory")
    add_model_options(out)
    add = out.add_argument_group("depth, a prior for training").add_argument
    add("--depth", choices=DEPTHS, help="also write a depth map of every frame, from a model or from files (npz)")
    add("--depth_dir", help="with --depth npz: folder of .npy maps (H, W), one a frame, or an .npz with "
        "`depth` (T, H, W)")
    add("--depth_is_disparity", action=Flag, nargs=0, help="larger values in these files are nearer")
    add("--depth_model", default="", help="another model of the same kind: a name on the Hugging Face hub, or a folder")
    add = out.add_argument_group("CoTracker").add_argument
    add("--cotracker", metavar="DIR", help="needed with --flow cotracker, which runs the code of "
        "facebookresearch/co-tracker with all your permissions: a local checkout that you trust, or `github` to "
        "download the current code and run it")
    add("--grid", type=at_least(1), default=4, help="pixels between query points")
    add("--query_every", type=at_least(1), default=8, help="frames between the frames with query points")
    return out


def chooses_correspondences(argv: list[str]) -> bool:
    """Whether the command line `argv` has an option that decides which correspondences are stored."""
    parser = main_parser()
    parser.set_defaults(**dict.fromkeys(CORRESPONDENCE_OPTIONS))  # None, which no given option sets
    args = parser.parse_args(argv)
    return any(getattr(args, name) is not None for name in CORRESPONDENCE_OPTIONS)


def chain_rule(name: str) -> str:
    """The rule of a given name, which may be the older name "published" of "unfiltered"."""
    return "unfiltered" if name == "published" else name


def add_pixel_limit(out) -> None:
    """The option that limits the size of images, for the commands that read images."""
    out.add_argument("--max_pixels", type=at_least(1), default=MAX_PIXELS, help="refuse larger images and video frames")


def add_model_options(out: argparse.ArgumentParser) -> None:
    """Options of the models."""
    add = out.add_argument_group("models").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute; auto: CUDA if it is there")
    add("--weights_dir", help="folder of weights; missing ones are downloaded to it (default: the user's cache)")
    add("--offline", action=Flag, nargs=0, help="download nothing")
    add("--feature_model", default="", help="a DINO or DINOv2 model instead of ViT-S/16 or ViT-S/14: a name on the "
        "Hugging Face hub, such as facebook/dinov2-base or facebook/dinov2-with-registers-small, or a folder")
    add("--feature_side", type=at_least(32), default=480, help="shorter side of the images given to DINO, in pixels")
    add("--raft_weights", default="", help="file in WEIGHTS_DIR (default: raft-things.pth, else the best one there)")
    add("--raft_iterations", type=at_least(1), default=20, help="RAFT's updates of a flow")
    add("--correlation", choices=("auto", "all_pairs", "on_demand"), default="auto", help="compute "
        "RAFT's correlations of all pixel pairs first, or on demand, which gives the same flow with less memory; auto: "
        "all_pairs if MEMORY_GIB allows it")
    add("--raft_precision", "--precision", dest="precision", choices=("float32", "bfloat16", "float16"),
        default="float32", help="precision of RAFT's networks")
    add("--cold_start", action=Flag, nargs=0, help="start RAFT from zero flow, not from the flow of the previous pair")
    add("--batch", type=at_least(1), default=8, help="pairs per call of RAFT on CUDA")


def flow_parser() -> Parser:
    """Options of the command that computes the flow of one pair."""
    out = Parser(prog="python -m preprocessing flow",
                 description="Optical flow from image A to image B as (H, W, 2) float32 pixels.")
    out.add_argument("images", nargs=2, metavar=("A", "B"), help="two images of one size")
    out.add_argument("--flow", choices=list(FLOW_MODELS), default="dis", help="optical flow")
    out.add_argument("--out", required=True, help="file to write (.npy)")
    add_pixel_limit(out)
    add_model_options(out)
    return out


def convert_parser() -> Parser:
    """Options of the command that converts between layouts."""
    out = Parser(prog="python -m preprocessing convert",
                 description="Convert the correspondences of a sequence folder to the other layout; both are kept.")
    out.add_argument("--data_dir", required=True, help="sequence folder")
    out.add_argument("--to", required=True, choices=LAYOUTS, help="store: correspondences/, 16 bits a flow component; "
                     "omnimotion: raft_exhaustive/, raft_masks/, count_maps/, flow_stats.json")
    out.add_argument("--resume", action=Flag, nargs=0, help="continue unfinished work")
    add_pixel_limit(out)
    return out


def synthetic_parser() -> Parser:
    """Options of the command that renders a sequence."""
    out = Parser(prog="python -m preprocessing synthetic", description="Render a sequence with exact ground truth.")
    out.add_argument("--data_dir", required=True, help="sequence folder to write")
    out.add_argument("--scene", choices=list(RECIPES), default="demo", help="layout and motion")
    add_scene_options(out, side=192, num_points=256)
    return out


def tapvid_parser() -> Parser:
    """Options of the command that renders a benchmark."""
    out = Parser(prog="python -m preprocessing tapvid", description="Render a synthetic benchmark as a TAP-Vid file.")
    out.add_argument("--out", required=True, help="file to write (.pkl)")
    out.add_argument("--scenes", default=",".join(RECIPES), help="comma-separated scenes, one per video")
    out.add_argument("--layout", choices=["dict", "list", "jpeg"], default="dict",
                     help="dict: as in TAP-Vid-DAVIS and RoboTAP; list: RGB-Stacking; jpeg: Kinetics (JPEG frames)")
    add_scene_options(out, side=256, num_points=64)
    return out


def add_scene_options(out: argparse.ArgumentParser, side: int, num_points: int) -> None:
    """Options that `synthetic` and `tapvid` share, with their defaults of frame size and points."""
    add = out.add_argument
    add("--size", type=int, nargs=2, metavar=("H", "W"), default=(side, side), help="frame size in pixels")
    add("--num_frames", type=int, default=24, help="number of frames")
    add("--seed", type=int, default=0, help="seed of textures, placement and points")
    add("--num_points", type=int, default=num_points, help="number of ground-truth points per scene")


COMMANDS = {"": main_parser, "synthetic": synthetic_parser, "tapvid": tapvid_parser, "flow": flow_parser,
            "convert": convert_parser}
