"""From a finished run to its sequence, checkpoint and tracker: what eval.py and viz.py begin with."""

import logging
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from configs.config_file import read_options_file
from configs.options import run_dir
from inference.flow_guided_tracker import FlowGuidedTracker
from inference.tracker import Tracker
from loaders.checkpoint import Checkpoint, check_frames, check_length, find_checkpoint
from loaders.correspondences import open_correspondences
from loaders.scenes import read_scenes
from loaders.sequence import VideoSequence, open_sequence
from models.factory import checkpoint_num_frames, model_from_checkpoint, pick_device
from models.omnimotion import OmniMotion

log = logging.getLogger(__name__)


@dataclass
class Run:
    """A trained run."""
    dir: Path
    sequence: VideoSequence
    checkpoint_path: Path
    checkpoint: Checkpoint
    tracker: Tracker


def run_options(options: Namespace) -> dict[str, str]:
    """The texts of the options that the run of `--data_dir` and `--expname`, or of `--ckpt_path`, was trained with:
    of args.txt beside the checkpoint, else of the checkpoint. Empty if there is no run or it has none.

    UserError if args.txt is damaged."""
    if not options.data_dir:
        return {}
    folder = Path(options.ckpt_path).parent if options.ckpt_path else run_dir(options)
    try:
        return read_options_file(folder / "args.txt")
    except OSError:
        log.debug("%s has no args.txt", folder)
    try:
        stored = find_checkpoint(folder, options.ckpt_path)[1].options
    except UserError:  # load_run reports it
        return {}
    return {name: str(value) for name, value in stored.items()} if isinstance(stored, dict) else {}


def load_run(options: Namespace) -> Run:
    """The run of `--data_dir` and `--expname`: its newest checkpoint, or `--ckpt_path` (also in OmniMotion's format).

    The checkpoint is read once. UserError if something is missing, unreadable, or was not made for the sequence."""
    folder = run_dir(options)
    path, checkpoint = find_checkpoint(folder, options.ckpt_path)
    sequence = open_sequence(options.data_dir, options.num_imgs, options.max_pixels)
    check_length(checkpoint_num_frames(checkpoint, path), len(sequence), path)
    check_frames(checkpoint, sequence.size, sequence.hashes, path)
    model = model_from_checkpoint(checkpoint, sequence.size, options, pick_device(options.device)).eval()
    log.info("model: %s", path)
    return Run(folder, sequence, path, checkpoint, new_tracker(model, sequence, options))


def new_tracker(model: OmniMotion, sequence: VideoSequence, options: Namespace) -> Tracker:
    """The tracker for the options of inference: the model alone, or guided by flow with `--follow_flow`.

    UserError if it needs flow and the sequence has none."""
    arguments = options.use_max_loc, options.occlusion_th, options.chunk_size
    scenes = read_scenes(sequence)
    if not options.follow_flow:
        return Tracker(model, *arguments, scenes)
    try:
        return FlowGuidedTracker(model, open_correspondences(sequence), sequence.frame, *arguments, scenes)
    except UserError as error:
        raise UserError(f"{error}; or say --no-follow_flow, which needs no flow") from error
