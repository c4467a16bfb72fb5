"""Write the interactive page: one HTML file with the video, its layers and the tracks, which needs no network.

The file is the template web/page.html with its style sheet and scripts inserted. The data follow as base64 in
<script> elements that the browser does not run: images as WebP, tracks in the format of pack.py.

Notation
    T, H, W   frames of the page, height, width of the video
    layer     a picture shown over each frame: depth, flow or error
"""

import base64
import hashlib
import html
import json
import logging
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from common.files import write_text
from drawing.colors import POSITIONS, depth_colors, error_colors, flow_colors, full_saturation
from drawing.legend import flow_wheel
from drawing.maps import depth_range, error_scale
from drawing.pack import coarsest_quantum, pack
from drawing.page_data import PageData, collect_page_data
from drawing.run_views import Views
from loaders.images import encode_image

log = logging.getLogger(__name__)
WEB = Path(__file__).parent / "web"
SCRIPTS = ("unpack.js", "stage.js", "timeline.js", "main.js")
BASE64 = 4 / 3       # characters a byte
IMAGE_SHARE = 0.45   # largest share of the file for the video's images
IMAGE_STEPS = ((80, 1280), (65, 1280), (65, 854), (50, 640), (35, 480), (20, 320))  # (WebP quality, longer side in px)
QUANTA = (1 / 8, 1 / 4, 1 / 2)  # pixels to which positions are rounded, the finest first


def write_page(views: Views, path: Path) -> Path:
    """Write the page of a run, at most --page_mb large, to `path`, and return `path`."""
    data = collect_page_data(views)
    write_text(path, page_html(data, views.options.page_mb))
    log.info("page: %d tracks, %.1f MB", sum(len(block.tracks) for block in data.blocks), path.stat().st_size / 1e6)
    return path


def page_html(data: PageData, megabytes: float = 25.0) -> str:
    """The page as HTML, at most `megabytes` (10^6 bytes) large.

    To fit, the video's images are made smaller, then positions are rounded to 1/4 or 1/2 instead of 1/8 pixel, then
    every second row and column of tracks is left out. `data` then holds the tracks that are left."""
    budget = megabytes * 1e6 - sum((WEB / name).stat().st_size for name in (*SCRIPTS, "page.html", "page.css"))
    images = _video(data.frames, budget * IMAGE_SHARE)
    layers = _layers(data)
    pictures = {"video": images} | {name: layer.pop("images") for name, layer in layers.items()}
    left = budget / BASE64 - sum(len(image) for series in pictures.values() for image in series) - 20_000
    packed, quantum, near_far = _packed(data, left)
    T, H, W = data.frames.shape[:3]
    meta = {
        "title": data.title, "fps": data.fps, "count": T, "height": H, "width": W, "frames": data.frame_ids,
        "interval": data.interval, "quantum": quantum, "depthRange": near_far, "threshold": data.occlusion_th,
        "positionColors": POSITIONS.tolist(),
        "blocks": [{"frame": block.query_frame, "rows": block.shape[0], "columns": block.shape[1]}
                   for block in data.blocks],
        "layers": layers, "notices": data.notices, "saved": _saved_as(data)}
    items = {f"{name}-{t}": image for name, series in pictures.items() for t, image in enumerate(series)}
    items |= {f"tracks-{b}": block for b, block in enumerate(packed)}
    return _filled(meta, items)


def _saved_as(data: PageData) -> dict:
    """Scales of x and y, and the frame numbers, of tracks that are saved from the page."""
    if data.source is None:
        return {"scale": [1, 1], "frames": data.frame_ids}
    height, width = (new / old for new, old in zip(data.source.source_size, data.source.size, strict=True))
    return {"scale": [width, height], "frames": data.source.numbers[data.frame_ids].tolist()}


def _packed(data: PageData, limit: float) -> tuple[list[bytes], float, tuple[float, float]]:
    """Pack the tracks within `limit` bytes: packed blocks, their quantum in pixels, and their depth range.

    Tracks that do not fit are removed from `data`."""
    size = data.frames.shape[1:3]
    depths = np.concatenate([block.depth[:, ::4].ravel() for block in data.blocks])
    near_far = tuple(float(v) for v in np.percentile(depths, (0.1, 99.9)))
    while True:
        for step in QUANTA:
            quantum = coarsest_quantum(size, step)
            packed = [pack(block, quantum, near_far) for block in data.blocks]
            if sum(map(len, packed)) <= limit:
                return packed, quantum, near_far
        if max(data.blocks[0].shape) < 8:
            log.warning("the page will be larger than --page_mb: the video alone needs that")
            return packed, quantum, near_far
        data.blocks = [block.thinned() for block in data.blocks]
        data.interval *= 2
        notice = f"to keep the file small, tracks are {data.interval} pixels apart"
        data.notices = [*(n for n in data.notices if "pixels apart" not in n), notice]
        log.warning("page: %s (--page_mb sets its size)", notice)


def _video(frames: np.ndarray, limit: float) -> list[bytes]:
    """Frames as WebP in the best quality that fits into `limit` bytes of base64, else in the lowest quality."""
    for quality, side in IMAGE_STEPS:
        scale = min(1, side / max(frames.shape[1:3]))
        images = [_webp(_scaled(frame, scale), quality) for frame in frames]
        if sum(map(len, images)) * BASE64 <= limit:
            break
    return images


def _layers(data: PageData) -> dict[str, dict]:
    """Images and legend of each layer, by the layer's name."""
    near, far = depth_range(data.depths)
    longest = full_saturation(data.flows)
    flows = [*data.flows, np.zeros_like(data.flows[0])]
    wheel = encode_image(flow_wheel(96), ".png")
    out = {
        "depth": {"images": [_webp(depth_colors(depth, near, far), 85) for depth in data.depths],
                  "low": f"{near:.2f} near", "high": f"{far:.2f} far", "bar": _bar(lambda s: depth_colors(s, 0, 1))},
        "flow": {"images": [_webp(flow_colors(flow, longest), 85) for flow in flows],
                 "wheel": "data:image/png;base64," + _text(wheel), "high": f"rim: {longest:.3g} px a frame"}}
    if data.errors is not None:
        largest = error_scale(data.errors)
        # Lossy WebP halves the resolution of color, which is visible here: an image has one pixel per cell.
        images = [encode_image(error_colors(error, largest), ".webp", lossless=True) for error in data.errors]
        out["error"] = {"images": images,
                        "low": "flow error  0", "high": f"{largest:.2f} px", "bar": _bar(lambda s: error_colors(s, 1)),
                        "smooth": False}
    return out


def _filled(meta: dict, items: dict[str, bytes]) -> str:
    """Fill the template. `meta` is escaped so that none of its text can end a script element or become markup."""
    safe = json.dumps(meta, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    data = "\n".join(f'<script type="application/octet-stream" id="{name}">{_text(value)}</script>'
                     for name, value in items.items())
    script = "\n".join((WEB / name).read_text() for name in SCRIPTS)
    # The Content-Security-Policy names this hash, so the browser runs this script only.
    digest = hashlib.sha256(f"\n{script}\n".encode()).digest()
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
    return encode_image(image, ".webp", quality=quality, method=4)


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")
