"""A small synthetic benchmark in TAP-Vid's file format: `python -m preprocessing tapvid --out small.pkl`."""

import argparse
import logging
from pathlib import Path

from common.errors import UserError
from loaders.tapvid import TapVideo, save_tapvid
from preprocessing.synthetic.render import render_scene

log = logging.getLogger(__name__)


def main(args: argparse.Namespace) -> None:
    """Run the `tapvid` command. UserError for wrong arguments, see `render_scene`."""
    scenes = [scene for scene in args.scenes.split(",") if scene]
    if not scenes or Path(args.out).suffix != ".pkl":
        raise UserError(f"--scenes {args.scenes} --out {args.out}: give at least one scene and a file "
                        "that ends in .pkl")
    videos = {}
    for scene in scenes:
        frames, annotations, _ = render_scene(scene, tuple(args.size), args.num_frames, args.seed, args.num_points,
                                              progress=True)
        videos[scene] = TapVideo(frames, annotations)
    save_tapvid(args.out, videos, args.layout)
    log.info("%s: %d videos of %d frames, %s", args.out, len(videos), args.num_frames, ", ".join(videos))
