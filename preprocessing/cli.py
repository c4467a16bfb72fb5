"""The commands of `python -m preprocessing`; preprocessing/options.py has their options."""

import argparse
import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from common.cli import start_logging
from common.errors import UserError, os_error_line
from common.locks import lock_folder
from loaders.correspondences import CorrespondenceStore, open_correspondences
from loaders.images import find_range, read_image
from loaders.npy import save_npy
from loaders.omnimotion_layout import has_omnimotion_layout
from loaders.sequence import VideoSequence, open_sequence
from loaders.video import read_video
from preprocessing.convert import convert
from preprocessing.depth_priors import write_depth
from preprocessing.extract_frames import check_sides, extract_frames, use_color
from preprocessing.flow import FLOW_MODELS, FlowModel, ModelOptions, resize_flow
from preprocessing.options import chooses_correspondences, main_parser, parse
from preprocessing.pipeline import Method, build_store, summary
from preprocessing.scenes import find_scenes
from preprocessing.synthetic import render, tapvid
from preprocessing.track_correspondences import TrackerOptions, build_from_cotracker, build_from_files

log = logging.getLogger(__name__)
VIDEO_DEFAULTS = {"start": 0, "stride": 1, "allow_gaps": False}  # of the options that need --video; others: None


def model_options(args: argparse.Namespace) -> ModelOptions:
    """The ModelOptions of parsed options. UserError if CUDA is asked for and missing."""
    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise UserError("--device cuda: PyTorch finds no CUDA device here; say --device cpu, or install a CUDA build")
    device = "cuda" if cuda and args.device != "cpu" else "cpu"
    weights_dir = Path(args.weights_dir) if args.weights_dir else None
    return ModelOptions(device=device, weights=args.raft_weights, weights_dir=weights_dir, offline=args.offline,
                        iterations=args.raft_iterations, correlation=args.correlation, precision=args.precision,
                        warm=not args.cold_start, batch=args.batch, feature_model=args.feature_model,
                        feature_side=args.feature_side)


def flow_model(options: str, sequence: VideoSequence) -> tuple[FlowModel, Callable[[int], np.ndarray]]:
    """The flow model that `options` of `python -m preprocessing`, one string, choose, and the images from which it
    computes flow: t -> `(H', W', 3)` uint8 RGB.

    UserError if they choose none; SystemExit 2 for wrong options."""
    args = main_parser().parse_args(["--data_dir", "", *shlex.split(options)])
    if args.flow not in FLOW_MODELS:
        raise UserError(f"--flow {args.flow} computes no optical flow: choose {' or '.join(FLOW_MODELS)}")
    frame = sequence.flow_frame if args.flow_frames else sequence.frame
    model = FLOW_MODELS[args.flow](model_options(args), frame(0).shape[:2], int(args.max_memory * 2**30))
    return model, frame


def main(argv: list[str]) -> None:
    """Run `python -m preprocessing ARGV`. UserError for a user's mistake; SystemExit 2 for wrong options."""
    start_logging()
    command, args = parse(argv)
    if command == "synthetic":
        render.main(args)
    elif command == "tapvid":
        tapvid.main(args)
    elif command == "flow":
        flow_of_pair(args)
    elif command == "convert":
        with resumable(args.data_dir), lock_folder(args.data_dir):
            convert(open_sequence(args.data_dir, None, args.max_pixels), args.to, args.resume)
        log.info("%s has its correspondences as %s", args.data_dir, args.to)
    else:
        preprocess(argv)


def preprocess(argv: list[str]) -> None:
    """Video -> sequence folder, with the options `argv` of `main_parser`. Errors as `main`."""
    args = main_parser().parse_args(argv)
    models = model_options(args)
    with resumable(args.data_dir), lock_folder(args.data_dir, make=bool(args.video)):
        sequence = _sequence(args)
        if args.depth:
            write_depth(sequence, args.depth, models, Path(args.depth_dir) if args.depth_dir else None,
                        args.depth_model, args.depth_is_disparity)
            if not chooses_correspondences(argv) and _has_correspondences(sequence):
                log.info("%s has correspondences already: left as they are", sequence.root)
                return
        if args.layout == "omnimotion" and has_omnimotion_layout(sequence.root):
            log.info("%s has OmniMotion's folders already: left as they are", sequence.root)
            return
        store = _correspondences(args, sequence, models)
        log.info("%s: %s", store.root, summary(store, store.root))
        if args.layout == "omnimotion":
            convert(sequence, "omnimotion", args.resume)
            shutil.rmtree(store.root)
            log.info("%s has OmniMotion's folders now", sequence.root)


def _has_correspondences(sequence: VideoSequence) -> bool:
    """Whether the sequence has finished correspondences of its frames, in either layout."""
    try:
        open_correspondences(sequence)
    except UserError:
        return False
    return True


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
    method = Method(args.flow, args.features, args.cycle_th, args.chain, args.pairs, keep,
                    args.find_scenes, args.flow_frames)
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
                              _value_range(args), args.allow_gaps, args.flow_frames)
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
    save_npy(args.out, resize_flow(flow, a.shape[:2]))
    log.info("%s: flow from %s to %s", args.out, *args.images)
