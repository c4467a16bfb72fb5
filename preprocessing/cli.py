"""The commands of `python -m preprocessing` and their options."""

import argparse
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch

from common.cli import Flag, Parser, at_least, positive, share
from common.errors import UserError, os_error_line
from common.files import MAX_PIXELS
from common.locks import lock_folder
from loaders.clip_files import COORDINATES
from loaders.correspondences import CorrespondenceStore
from loaders.images import find_range, read_image
from loaders.npy import save_npy
from loaders.omnimotion_layout import has_omnimotion_layout
from loaders.sequence import VideoSequence, open_sequence
from loaders.video import read_video
from preprocessing.chaining import RULES, chain_rule
from preprocessing.convert import convert
from preprocessing.depth_priors import DEPTHS, write_depth
from preprocessing.extract_frames import check_sides, extract_frames, use_color
from preprocessing.features import FEATURE_EXTRACTORS
from preprocessing.flow import FLOW_MODELS, FlowModel, ModelOptions
from preprocessing.pipeline import Method, build_store, summary
from preprocessing.scenes import find_scenes
from preprocessing.synthetic import render, tapvid
from preprocessing.track_correspondences import TrackerOptions, build_from_cotracker, build_from_files

log = logging.getLogger(__name__)
LAYOUTS = ("store", "omnimotion")
VIDEO_DEFAULTS = {"start": 0, "stride": 1, "allow_gaps": False}  # of the options that need --video; others: None
SYNTHETIC = {"synthetic": (render, "Render a sequence with exact ground truth."),
             "tapvid": (tapvid, "Render a synthetic benchmark as a TAP-Vid file.")}


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
    add("--cycle_th", type=positive, default=3.0, help="largest forward-backward error, in pixels")
    add("--pairs", default="all", help="pairs of frames: all, window:K (at most K frames apart), or log (1, 2, 3, "
        "4, 6, 8, 12, 16, ... frames apart, for long videos)")
    add("--density", "--keep", dest="keep", choices=("auto", "all", "half"), default="auto", help="correspondences to "
        "store of pairs that are not adjacent: all, or half (a checkerboard), which halves the disk space; auto: half "
        "above 256x256 pixels")
    add("--layout", choices=LAYOUTS, default="store", help="store, or OmniMotion's folders, which its code can read")
    add("--chain", nargs="?", const="trusted", type=chain_rule, choices=RULES, help="also correspondences chained over "
        "adjacent frames. trusted (the value of --chain alone): prefer unbroken chains to direct flow; unfiltered "
        "(formerly: published): use chains only where direct flow fails, as OmniMotion does")
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


def model_options(args: argparse.Namespace) -> ModelOptions:
    """The ModelOptions of the parsed `add_model_options`. UserError if CUDA is asked for and missing."""
    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise UserError("--device cuda: PyTorch finds no CUDA device here; say --device cpu, or install a CUDA build")
    device = "cuda" if cuda and args.device != "cpu" else "cpu"
    weights_dir = Path(args.weights_dir) if args.weights_dir else None
    return ModelOptions(device=device, weights=args.raft_weights, weights_dir=weights_dir, offline=args.offline,
                        iterations=args.raft_iterations, correlation=args.correlation, precision=args.precision,
                        warm=not args.cold_start, batch=args.batch, feature_model=args.feature_model,
                        feature_side=args.feature_side)


def flow_model(options: str, size: tuple[int, int]) -> FlowModel:
    """The flow model that `options` of `python -m preprocessing`, one string, choose for frames of `size` (H, W).

    UserError if they choose none; SystemExit 2 for wrong options."""
    args = main_parser().parse_args(["--data_dir", "", *shlex.split(options)])
    if args.flow not in FLOW_MODELS:
        raise UserError(f"--flow {args.flow} computes no optical flow: choose {' or '.join(FLOW_MODELS)}")
    return FLOW_MODELS[args.flow](model_options(args), size, int(args.max_memory * 2**30))


def main(argv: list[str]) -> None:
    """Run `python -m preprocessing ARGV`. UserError for a user's mistake; SystemExit 2 for wrong options."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if argv[:1] and argv[0] in SYNTHETIC:
        module, description = SYNTHETIC[argv[0]]
        parser = Parser(prog=f"python -m preprocessing {argv[0]}", description=description)
        module.add_arguments(parser)
        module.main(parser.parse_args(argv[1:]))
    elif argv[:1] == ["flow"]:
        flow_of_pair(flow_parser().parse_args(argv[1:]))
    elif argv[:1] == ["convert"]:
        args = convert_parser().parse_args(argv[1:])
        with resumable(args.data_dir), lock_folder(args.data_dir):
            convert(open_sequence(args.data_dir, None, args.max_pixels), args.to, args.resume)
        log.info("%s has its correspondences as %s", args.data_dir, args.to)
    else:
        preprocess(main_parser().parse_args(argv))


def preprocess(args: argparse.Namespace) -> None:
    """Video -> sequence folder."""
    models = model_options(args)
    with resumable(args.data_dir), lock_folder(args.data_dir, make=bool(args.video)):
        sequence = _sequence(args)
        if args.depth:
            write_depth(sequence, args.depth, models, Path(args.depth_dir) if args.depth_dir else None,
                        args.depth_model, args.depth_is_disparity)
        if args.layout == "omnimotion" and has_omnimotion_layout(sequence.root):
            log.info("%s has OmniMotion's folders already: left as they are", sequence.root)
            return
        store = _correspondences(args, sequence, models)
        log.info("%s: %s", store.root, summary(store, store.root))
        if args.layout == "omnimotion":
            convert(sequence, "omnimotion", args.resume)
            shutil.rmtree(store.root)
            log.info("%s has OmniMotion's folders now", sequence.root)


def _correspondences(args: argparse.Namespace, sequence: VideoSequence, models: ModelOptions) -> CorrespondenceStore:
    """The store, from the source of correspondences that the options name."""
    if args.tracks:
        paths = [Path(path) for path in args.tracks]
        return build_from_files(sequence, paths, args.pairs, args.resume, args.visible_th, args.find_scenes,
                                args.coordinates)
    if args.flow == "cotracker":
        if not args.cotracker:
            raise UserError("--flow cotracker runs the code of facebookresearch/co-tracker with all your permissions: "
                            "give --cotracker DIR, a checkout that you trust, or --cotracker github to download it")
        checkout = None if args.cotracker == "github" else Path(args.cotracker)
        tracker = TrackerOptions(checkout, args.grid, args.query_every)
        return build_from_cotracker(sequence, tracker, models, args.pairs, args.resume, args.find_scenes)
    keep = "all" if args.keep == "auto" and args.layout == "omnimotion" else args.keep
    method = Method(args.flow, args.features, args.cycle_th, args.chain or "", args.pairs, keep,
                    args.find_scenes)
    return build_store(sequence, method, args.resume, args.num_workers, models, int(args.max_memory * 2**30))


@contextmanager
def resumable(data_dir: str) -> Iterator[None]:
    """Report Ctrl-C and a full or read-only disk in one line. Files that are written stay; --resume continues."""
    try:
        yield
    except KeyboardInterrupt:
        log.info("stopped: the same command with --resume continues from here")
        sys.exit(130)
    except OSError as error:
        raise UserError(f"{os_error_line(error, data_dir)}; files that are written stay, the same command with "
                        "--resume continues from here") from error


def _sequence(args: argparse.Namespace) -> VideoSequence:
    if args.video:
        if args.scene is not None:
            choose_scene(args)
        return extract_frames(args.video, Path(args.data_dir), args.start, args.stop, args.stride, args.max_frames,
                              args.resize and tuple(args.resize), args.short_side, args.max_pixels,
                              _value_range(args), args.allow_gaps)
    for name in ("resize", "short_side", "start", "stop", "max_frames", "stride", "scene", "allow_gaps"):
        if getattr(args, name) != VIDEO_DEFAULTS.get(name):
            raise UserError(f"--{name} needs --video: the frames in {args.data_dir}/color are used as they are")
    return use_color(Path(args.data_dir), args.max_pixels, _value_range(args))


def _value_range(args: argparse.Namespace) -> tuple[float, float] | None:
    """The option --value_range. UserError unless it is two ascending finite numbers."""
    if args.value_range is None:
        return None
    low, high = args.value_range
    if not -1e30 < low < high < 1e30:
        raise UserError(f"--value_range {low:g} {high:g}: give the smaller value, then the larger one")
    return low, high


def choose_scene(args: argparse.Namespace) -> None:
    """Set --start and --max_frames to the frames of --scene. UserError if the video has no such scene."""
    if not args.find_scenes:
        raise UserError("--scene needs the scenes: leave out --no-find_scenes")
    frames = read_video(args.video, args.start, args.stop, args.stride, args.max_pixels, allow_gaps=args.allow_gaps)
    scenes = find_scenes(islice(frames, args.max_frames))
    first, end = scenes.frames_of(args.scene)
    log.info("scene %d of %d: frames %d to %d", args.scene, scenes.count, first, end - 1)
    args.start += first * args.stride
    args.max_frames = end - first


def flow_of_pair(args: argparse.Namespace) -> None:
    """Flow of one pair of image files."""
    paths = [Path(path) for path in args.images]
    values = find_range(paths, args.max_pixels)
    a, b = (read_image(path, args.max_pixels, values) for path in paths)
    if a.shape != b.shape:
        raise UserError(f"{args.images[0]} is {a.shape[1]}x{a.shape[0]}, {args.images[1]} is {b.shape[1]}x{b.shape[0]}:"
                        " flow needs two images of one size")
    model = FLOW_MODELS[args.flow](model_options(args), a.shape[:2], 4 << 30)
    check_sides(a.shape[:2], args.images[0])
    [(flow, _)] = model.flow([model.encode(a)], [model.encode(b)], [None], True)
    save_npy(args.out, flow)
    log.info("%s: flow from %s to %s", args.out, *args.images)
