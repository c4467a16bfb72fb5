"""A page to click on: one HTML file with the video, its layers and the tracks, for a browser without a network.

The file is web/page.html with its style and scripts put in, and data in inert <script> elements as base64: images in
WebP, tracks as pack.py says.

Notation
    T, H, W   frames of the page, height, width of the video
    layer     pictures of something else at every frame: depth, flow, error
"""

import base64
import hashlib
import html
import io
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from common.files import write_text
from drawing.colors import depth_colors, error_colors, flow_colors, full_saturation
from drawing.legend import flow_wheel
from drawing.maps import depth_range, error_scale
from drawing.pack import GridTracks, coarsest_quantum, pack
from drawing.run_views import Views
from inference.dense import grid_pixels

log = logging.getLogger(__name__)
WEB = Path(__file__).parent / "web"
SCRIPTS = ("unpack.js", "stage.js", "timeline.js", "main.js")
BASE64 = 4 / 3
IMAGE_SHARE = 0.45                                          # of the file, at most, for the video
IMAGE_STEPS = ((80, 1280), (65, 1280), (65, 854), (50, 640), (35, 480), (20, 320))  # WebP quality, longer side
QUANTA = (1 / 8, 1 / 4, 1 / 2)
MOST_FRAMES = 120           # of a page; a longer video is thinned
MOST_SAMPLES = 20_000_000   # tracks x frames; a denser grid is thinned
CPU_SIDE, CPU_SAMPLES = 64, 4_000_000  # on the CPU, unless asked for: query points along the longer side, and samples


@dataclass
class PageData:
    """What a page shows. `frame_ids` are the numbers, in the whole video, of the T frames that the page has."""
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
    notices: list[str] = field(default_factory=list)  # what was left out, for the reader


def page_html(data: PageData, megabytes: float = 25.0) -> str:
    """The page, at most `megabytes` (10^6 bytes) large: the video's images are made smaller, positions rounded to
    1/4 or 1/2 instead of 1/8 pixel, and then every second row and column of tracks left out, until it fits."""
    budget = megabytes * 1e6 - sum((WEB / name).stat().st_size for name in (*SCRIPTS, "page.html", "page.css"))
    images, layers = _video(data.frames, budget * IMAGE_SHARE), _layers(data)
    pictures = {"video": images} | {name: layer.pop("images") for name, layer in layers.items()}
    left = budget / BASE64 - sum(len(image) for series in pictures.values() for image in series) - 20_000
    packed, quantum, near_far, data = _packed(data, left)
    T, H, W = data.frames.shape[:3]
    meta = {
        "title": data.title, "fps": data.fps, "count": T, "height": H, "width": W, "frames": data.frame_ids,
        "interval": data.interval, "quantum": quantum, "depthRange": near_far, "threshold": data.occlusion_th,
        "blocks": [{"frame": block.query_frame, "rows": block.shape[0], "columns": block.shape[1]}
                   for block in data.blocks],
        "layers": layers, "notices": data.notices}
    items = {f"{name}-{t}": image for name, series in pictures.items() for t, image in enumerate(series)}
    items |= {f"tracks-{b}": block for b, block in enumerate(packed)}
    return _filled(meta, items)


def _packed(data: PageData, limit: float) -> tuple[list[bytes], float, tuple[float, float], PageData]:
    """Packed blocks within `limit` bytes, the quantum and depth range they have, and the data with the blocks that
    were packed."""
    size = data.frames.shape[1:3]
    depths = np.concatenate([block.depth[:, ::4].ravel() for block in data.blocks])
    near_far = tuple(float(v) for v in np.percentile(depths, (0.1, 99.9)))
    while True:
        for step in QUANTA:
            quantum = coarsest_quantum(size, step)
            packed = [pack(block, quantum, near_far) for block in data.blocks]
            if sum(map(len, packed)) <= limit:
                return packed, quantum, near_far, data
        if max(data.blocks[0].shape) < 8:
            log.warning("the page will be larger than asked for: the video alone needs that")
            return packed, quantum, near_far, data
        data.blocks = [block.thinned() for block in data.blocks]
        data.interval *= 2
        notice = f"to keep the file small, tracks are {data.interval} pixels apart"
        data.notices = [*(n for n in data.notices if "pixels apart" not in n), notice]
        log.warning("page: %s (--page_mb sets its size)", notice)


def _video(frames: np.ndarray, limit: float) -> list[bytes]:
    """Frames as WebP within `limit` bytes of base64, as good as that allows."""
    for quality, side in IMAGE_STEPS:
        scale = min(1, side / max(frames.shape[1:3]))
        images = [_webp(_scaled(frame, scale), quality) for frame in frames]
        if sum(map(len, images)) * BASE64 <= limit:
            break
    return images


def _layers(data: PageData) -> dict[str, dict]:
    """Every layer's images, and what its legend says."""
    near, far = depth_range(data.depths)
    longest = full_saturation(data.flows)
    flows = [*data.flows, np.zeros_like(data.flows[0])]
    wheel = io.BytesIO()
    Image.fromarray(flow_wheel(96)).save(wheel, "PNG")
    out = {
        "depth": {"images": [_webp(depth_colors(depth, near, far), 85) for depth in data.depths],
                  "low": f"{near:.2f} near", "high": f"{far:.2f} far", "bar": _bar(lambda s: depth_colors(s, 0, 1))},
        "flow": {"images": [_webp(flow_colors(flow, longest), 85) for flow in flows],
                 "wheel": "data:image/png;base64," + _text(wheel.getvalue()), "high": f"rim: {longest:.3g} px a frame"}}
    if data.errors is not None:
        largest = error_scale(data.errors)
        out["error"] = {"images": [_webp(error_colors(error, largest), 85) for error in data.errors],
                        "low": "flow error  0", "high": f"{largest:.2f} px", "bar": _bar(lambda s: error_colors(s, 1)),
                        "smooth": False}
    return out


def _filled(meta: dict, items: dict[str, bytes]) -> str:
    """The template with everything in its place. Nothing of `meta` can end a script or become markup."""
    safe = json.dumps(meta, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    data = "\n".join(f'<script type="application/octet-stream" id="{name}">{_text(value)}</script>'
                     for name, value in items.items())
    script = "\n".join((WEB / name).read_text() for name in SCRIPTS)
    digest = hashlib.sha256(f"\n{script}\n".encode()).digest()  # of all between the tags: the browser runs nothing else
    parts = {"title": html.escape(meta["title"]), "style": (WEB / "page.css").read_text(), "meta": safe, "data": data,
             "script": script, "hash": _text(digest)}
    pieces = (WEB / "page.html").read_text().split("%%")  # text, name, text, name, ..., text
    return "".join(parts[piece] if k % 2 else piece for k, piece in enumerate(pieces))


def _bar(colors: Callable[[np.ndarray], np.ndarray]) -> list[str]:
    """Sixteen colors from the low to the high end, as CSS."""
    return ["#" + bytes(color).hex() for color in colors(np.linspace(0, 1, 16, dtype=np.float32)[None])[0]]


def _scaled(frame: np.ndarray, scale: float) -> np.ndarray:
    if scale == 1:
        return frame
    return cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def _webp(image: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "WEBP", quality=quality, method=4)
    return file.getvalue()


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


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
