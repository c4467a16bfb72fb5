"""Track points of a clip, from the video file to the tracks: python track.py clip.mp4 [--query "0,120,64"]

Writes out/clip_tracks.npz (--out), and beside it a video of the tracks and an interactive page. What is computed on the
way is kept in out/clip_work (--keep_work): after an interruption the same command continues, and other points of the
same clip are tracked without training again.
"""

import common.interrupts  # first: Ctrl-C prints one line also while PyTorch is imported
import common.threads  # noqa: F401, before PyTorch: it loads OpenMP

# isort: split
from configs.track_options import parse

if __name__ == "__main__":
    parse()  # --help and mistakes end here, before PyTorch is imported, which takes seconds

# isort: split
import logging
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from common.cli import run
from common.errors import UserError
from common.files import atomic_path, check_writable
from common.locks import lock_folder
from common.progress import Part, WholeProgress
from drawing.page import write_page
from drawing.run_views import Views
from drawing.tracks import grid_spacing
from drawing.visualizations import write_query_tracks
from evaluation.scoring import as_point_tracks
from inference.clip_run import PAGE, STOPPED, ClipRun, track_in_pieces, tracking_part
from inference.query_points import every_pixel, grid_in_frames, points_in_frames
from loaders.clip_files import queries_of_clip
from loaders.source_frames import SourceFrames, source_of
from loaders.track_export import check_format, export_tracks
from loaders.track_files import load_query_file
from training.failure_modes import failures_at

log = logging.getLogger("track")
GRID_POINTS = 600    # about, of the default grid
# Estimated seconds a frame on two CPU cores
VIDEO_SECONDS = 0.05
PAGE_SECONDS = {"page tracks": 0.05, "rendering": 0.02, "flow": 0.02}  # by the name of the progress bar


def track(options: Namespace) -> None:
    """Compute what is missing of correspondences, trained model, and page; then the tracks and their video."""
    out = Path(options.out)
    ending = check_format(out)
    name = out.name[:-len(ending)]
    video = out.with_name(f"{name}.mp4")
    page = out.with_name(f"{name}.html")
    if video.resolve() == Path(options.clip).resolve():
        raise UserError(f"--out {out}: the video of the tracks would replace {options.clip}: choose another name")
    check_writable(out.parent, "--out")
    with lock_folder(options.keep_work, make=True):
        job = ClipRun(Path(options.clip), Path(options.keep_work), options.config, options.num_iters, options.device)
        check_writable(options.keep_work, "--keep_work")
        with WholeProgress(Path(options.clip).name, parts(options, job)) as progress:
            was_trained = job.is_trained  # then its failures were not reported in this call
            run_options = job.complete(progress.write, lambda source: chosen_points(options, source))
            with progress.of_this_process():
                views = Views(run_options)
                for line in failures_at(views.dir, run_options.num_iters) if was_trained else []:
                    log.warning("training ended with a failure: %s", line)
                source = source_of(views.sequence)
                queries, spacing = chosen_points(options, source)
                tracks = as_point_tracks(track_in_pieces(views.tracker, queries), queries, views.size, source)
                in_clip = tracks.resized(source.source_size) if ending == ".npz" else tracks
                export_tracks(out, in_clip, views.sequence)
                write_query_tracks(video, views, tracks, spacing)
                copy_page(page, views)
    log.info("%d tracks through %d frames: %s, %s, %s", len(queries), views.T, out, video, page)


def parts(options: Namespace, job: ClipRun) -> list[Part]:
    """All that is to be done."""
    area = job.size[0] * job.size[1]
    count = len(options.query or [])
    if options.queries:
        count = len(load_query_file(options.queries)[0])
    elif options.every_pixel is not None:
        count = area * job.zoom**2
    elif not options.query:
        count = area / options.grid**2 if options.grid else GRID_POINTS
    out = [*job.parts(), tracking_part(count, job.num_frames), Part("video", "video", VIDEO_SECONDS * job.num_frames)]
    if not job.has_page():
        out += [Part("page", bar, seconds * job.num_frames) for bar, seconds in PAGE_SECONDS.items()]
    return out


def chosen_points(options: Namespace, source: SourceFrames) -> tuple[np.ndarray, float]:
    """The query points `(N, 3)` in pixels of the sequence's frames, and the distance between those of a grid there."""
    if options.queries:
        return queries_of_clip(options.queries, source, "source"), np.inf
    if options.query:
        return points_in_frames(options.query, source), np.inf
    if options.grid:
        return grid_in_frames(options.grid, source), options.grid * source.size[0] / source.source_size[0]
    if options.every_pixel is not None:
        return every_pixel(options.every_pixel, source), 1
    spacing = grid_spacing(source.size)
    return every_pixel(source.numbers[0], source, spacing), spacing


def copy_page(path: Path, views: Views) -> None:
    """Write the page of the run to `path`. It does not depend on the query points: it is made once, in the run."""
    made = views.dir / PAGE
    if not made.is_file():
        write_page(views, made)
    with atomic_path(path) as temporary:
        shutil.copyfile(made, temporary)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    torch.set_flush_denormal(True)  # see train.py
    options = parse()
    try:
        with logging_redirect_tqdm():
            track(options)
    except (KeyboardInterrupt, SystemExit) as stopped:
        if getattr(stopped, "code", STOPPED) != STOPPED:
            raise
        log.info("stopped: the same command continues from here")
        sys.exit(STOPPED)


if __name__ == "__main__":
    run(main)
