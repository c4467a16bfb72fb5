"""Collect what a page shows: frames, tracks of query grids, depth, flow and errors.

A long video is shown with every k-th frame, and a dense grid of tracks is made coarser, so that the page stays small
and is computed in reasonable time; the page says so.

Notation
    T, H, W   frames of the page, height, width of the video
    sample    position of one track in one frame
"""

import logging
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from drawing.pack import GridTracks
from drawing.run_views import Views
from inference.dense import grid_pixels
from loaders.source_frames import SourceFrames, source_of

log = logging.getLogger(__name__)
MAX_FRAMES = 120          # frames of a page
MAX_SAMPLES = 20_000_000  # tracks x frames of a page
# On the CPU, unless --page_interval is given:
CPU_SIDE = 64             # query points along the longer side
CPU_SAMPLES = 4_000_000
SAMPLES_AT_A_TIME = 2_000_000  # that are tracked together; all frames count, also those that a page does not show


@dataclass
class PageData:
    """Content of a page. `frame_ids` are the indices, in the whole video, of the T frames that the page shows."""
    title: str
    fps: float
    frames: np.ndarray             # (T, H, W, 3) uint8
    frame_ids: list[int]
    blocks: list[GridTracks]
    interval: int                  # pixels between query points
    occlusion_th: float
    depths: np.ndarray             # (T, h, w)
    flows: np.ndarray              # (T - 1, h, w, 2) pixels, from each frame to the next
    errors: np.ndarray | None      # (T, h, w) pixels
    notices: list[str] = field(default_factory=list)  # shown on the page: what was left out
    source: SourceFrames | None = None  # saved tracks are in its pixels and frame numbers; None: in those of the video


def collect_page_data(views: Views) -> PageData:
    """Compute the content of the page for a run."""
    options = views.options
    notices = []
    step = -(-views.T // MAX_FRAMES)
    ids = list(range(0, views.T, step))
    if step > 1:
        notices.append(f"1 of {step} frames is shown; the video has {views.T} frames")
    stride = max(1, round(options.page_query_stride / step))
    query_frames = range(0, len(ids), stride)
    interval = _interval(views, len(query_frames) * len(ids), notices)
    for notice in notices:
        log.warning("page: %s", notice)
    source = source_of(views.sequence)
    blocks = _blocks(views, query_frames, ids, interval)
    errors = None if views.errors is None else views.errors[ids]
    return PageData(
        title=source.name or views.sequence.root.resolve().name, fps=options.fps / step, frames=views.frames[ids],
        frame_ids=ids, blocks=blocks, interval=interval, occlusion_th=options.occlusion_th,
        depths=views.renderings(ids)[1], flows=views.flows(ids[:-1]), errors=errors, notices=notices,
        source=source if options.coordinates == "source" else None)


def _interval(views: Views, frames: int, notices: list[str]) -> int:
    """Pixels between query points, raised until points x `frames` (query frames x frames) is within the limit."""
    asked = views.options.page_interval or 4
    most = MAX_SAMPLES
    if not views.options.page_interval and views.tracker.device.type == "cpu":
        asked = max(1, round(max(views.size) / CPU_SIDE))
        most = CPU_SAMPLES
    interval = asked
    while len(grid_pixels(views.size, interval)[0]) * frames > most:
        interval += 1
    if interval > asked:
        notices.append(f"tracks are {interval} instead of {asked} pixels apart, to limit their number")
    return interval


def _blocks(views: Views, query_frames: range, ids: list[int], interval: int) -> list[GridTracks]:
    """Tracks, through the frames `ids`, of a grid of points of each frame ids[k], k of `query_frames`."""
    pixels, shape = grid_pixels(views.size, interval)
    at_a_time = max(SAMPLES_AT_A_TIME // (len(pixels) * views.T), 1)
    out = []
    for first in tqdm(range(0, len(query_frames), at_a_time), "page tracks"):
        piece = query_frames[first: first + at_a_time]
        frames = np.repeat([ids[k] for k in piece], len(pixels))
        found = views.track(frames, np.tile(pixels, (len(piece), 1)), ids)
        for k, *values in zip(piece, *(np.split(x, len(piece)) for x in (
                found.tracks, found.visible, found.depth, found.occlusion_score)), strict=True):
            out.append(GridTracks(k, shape, *values))
    return out
