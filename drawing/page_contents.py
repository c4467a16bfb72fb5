"""What the page shows of a run (viz.py --what page): which frames, which tracks, which layers."""

import logging
from pathlib import Path

from tqdm import tqdm

from drawing.pack import GridTracks
from drawing.page import PageData, page_html
from loaders.files import write_text
from models.surface import grid_pixels
from views import Views

log = logging.getLogger("viz")
MOST_FRAMES = 120           # of a page; a longer video is thinned
MOST_SAMPLES = 20_000_000   # tracks x frames; a denser grid is thinned
CPU_SIDE, CPU_SAMPLES = 64, 4_000_000  # on the CPU, unless asked for: query points along the longer side, and samples


def write_page(views: Views, path: Path) -> Path:
    """Compute what the page needs and write it."""
    options, notices = views.options, []
    step = -(-views.T // MOST_FRAMES)
    ids = list(range(0, views.T, step))
    if step > 1:
        notices.append(f"every {_ordinal(step)} of {views.T} frames is shown")
    stride = max(1, round(options.page_query_stride / step))
    query_frames = range(0, len(ids), stride)
    interval = _interval(views, len(query_frames) * len(ids), notices)
    for notice in notices:
        log.warning("page: %s", notice)
    blocks = [_block(views, k, ids, interval) for k in tqdm(query_frames, "page tracks")]
    data = PageData(
        title=views.sequence.root.resolve().name, fps=options.fps / step, frames=views.frames[ids], frame_ids=ids,
        blocks=blocks, interval=interval, occlusion_th=options.occlusion_th, depths=views.renderings(ids)[1],
        flows=views.flows(ids[:-1]), errors=None if views.errors is None else views.errors[ids], notices=notices)
    write_text(path, page_html(data, options.page_mb))
    log.info("page: %d tracks, %.1f MB", sum(len(block.tracks) for block in data.blocks), path.stat().st_size / 1e6)
    return path


def _interval(views: Views, frames: int, notices: list[str]) -> int:
    """Pixels between query points; raised where `frames` (query frames x frames) would make too many samples."""
    asked, most = views.options.page_interval or 4, MOST_SAMPLES
    if not views.options.page_interval and views.tracker.device.type == "cpu":
        asked, most = max(1, round(max(views.size) / CPU_SIDE)), CPU_SAMPLES
    interval = asked
    while len(grid_pixels(views.size, interval)[0]) * frames > most:
        interval += 1
    if interval > asked:
        notices.append(f"tracks are {interval} instead of {asked} pixels apart, or there would be too many")
    return interval


def _block(views: Views, k: int, ids: list[int], interval: int) -> GridTracks:
    """Tracks of a grid of frame ids[k], at the frames `ids`."""
    pixels, shape = grid_pixels(views.size, interval)
    found = views.track(ids[k], pixels, ids)
    return GridTracks(k, shape, found.tracks, found.visible, found.depth, found.occlusion_score)


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third"}.get(n, f"{n}th")
