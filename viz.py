"""Look at a trained run: python viz.py --config configs/default.txt --data_dir seqs/clip [--what tracks,depth]

Videos go to the run's folder: tracks_QQQQQ.mp4 (points of frame QQQQQ through all frames; discs are visible, rings
occluded) and depth.mp4 (red is near).
"""

import logging
from argparse import Namespace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configs.options import parse, run, run_dir
from drawing.colours import depth_colours, position_colours
from drawing.tracks import enlarge, picture_zoom, point_grid, track_pictures
from errors import UserError
from inference import open_run
from loaders.sequence import VideoSequence, read_mask
from loaders.video import write_video
from models.tracker import Tracker

log = logging.getLogger("viz")


def visualise(options: Namespace) -> None:
    """Make every video that `what` names."""
    makers = {"tracks": tracks_video, "depth": depth_video}
    names = [name for name in options.what.split(",") if name]
    if unknown := set(names) - set(makers):
        raise UserError(f"--what {options.what}: no '{min(unknown)}', choose among {', '.join(makers)}")
    sequence, tracker = open_run(options)
    for name in names:
        log.info("%s", makers[name](options, sequence, tracker))


def tracks_video(options: Namespace, sequence: VideoSequence, tracker: Tracker) -> Path:
    """Points of the query frame drawn over all frames."""
    t, path = options.query_frame_id, run_dir(options) / f"tracks_{options.query_frame_id:05d}.mp4"
    points = query_grid(options, sequence)
    queries = np.concatenate([np.full((len(points), 1), t), points[:, ::-1]], axis=1).astype(np.float32)  # (N, 3)
    found = tracker.track(queries)
    pictures = track_pictures(sequence.frames(), found.tracks, found.visible,
                              position_colours(points, sequence.size), t)
    write_video(path, tqdm(pictures, "tracks", len(sequence)), options.fps)
    return path


def query_grid(options: Namespace, sequence: VideoSequence) -> np.ndarray:
    """Points `(N, 2)` of the query frame: a grid, or what of it lies in the foreground."""
    t, points = options.query_frame_id, point_grid(sequence.size, options.grid_interval)
    if not 0 <= t < len(sequence):
        raise UserError(f"--query_frame_id {t}: the sequence has frames 0 to {len(sequence) - 1}")
    if not (options.use_mask or options.foreground_mask_path):
        return points
    if options.foreground_mask_path:
        mask = read_mask(Path(options.foreground_mask_path), sequence.size)
    else:
        masks = sequence.masks()
        if masks is None:
            raise UserError(f"--use_mask: {sequence.root / 'mask'} has no masks; give --foreground_mask_path instead")
        mask = masks[t]
    x, y = points.astype(int).T
    if not mask[y, x].any():
        raise UserError(f"the foreground of frame {t} has no point of the grid: try a smaller --grid_interval")
    return points[mask[y, x]]


def depth_video(options: Namespace, sequence: VideoSequence, tracker: Tracker) -> Path:
    """Rendered depth of all frames in one scale of colours."""
    path, zoom = run_dir(options) / "depth.mp4", picture_zoom(sequence.size)
    depths = np.stack([tracker.colours_and_depths([t])[1][0].astype(np.float16)
                       for t in tqdm(range(len(sequence)), "depth")])
    near, far = np.percentile(depths[:, ::4, ::4].astype(np.float32), (1, 99))
    write_video(path, (enlarge(depth_colours(depth, near, far), zoom) for depth in depths), options.fps)
    return path


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    visualise(parse("viz"))


if __name__ == "__main__":
    run(main)
