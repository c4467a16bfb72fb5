"""From a finished run to a predictor: what eval.py and viz.py both begin with."""

import logging
from argparse import Namespace

from common.errors import UserError
from configs.options import run_dir
from inference.flow_guided_tracker import FlowGuidedTracker
from inference.tracker import Tracker
from loaders.checkpoint import check_frames, check_length, find_checkpoint
from loaders.correspondences import open_correspondences
from loaders.sequence import VideoSequence, open_sequence
from models.factory import checkpoint_num_frames, model_from_checkpoint, pick_device
from models.omnimotion import OmniMotion

log = logging.getLogger(__name__)


def open_run(options: Namespace) -> tuple[VideoSequence, Tracker]:
    """The sequence of `data_dir` and the tracker of the run's newest checkpoint, or of `ckpt_path` (OmniMotion's
    checkpoints too). UserError if either is missing, unreadable, or was not made for the other."""
    path, checkpoint = find_checkpoint(run_dir(options), options.ckpt_path)
    sequence = open_sequence(options.data_dir, options.num_imgs)
    check_length(checkpoint_num_frames(checkpoint, path), len(sequence), path)
    check_frames(checkpoint, sequence.size, sequence.hashes(), path)
    model = model_from_checkpoint(checkpoint, sequence.size, options, pick_device(options.device)).eval()
    log.info("model: %s", path)
    return sequence, new_tracker(model, sequence, options)


def new_tracker(model: OmniMotion, sequence: VideoSequence, options: Namespace) -> Tracker:
    """The tracker that the options of inference ask for. UserError if it follows flow and the sequence has none."""
    arguments = options.use_max_loc, options.occlusion_th, options.chunk_size
    if not options.follow_flow:
        return Tracker(model, *arguments)
    try:
        return FlowGuidedTracker(model, open_correspondences(sequence), sequence.frames(), *arguments)
    except UserError as error:
        raise UserError(f"{error}; or say --follow_flow 0, which needs none") from error
