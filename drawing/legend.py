"""Captions and legends, drawn in a strip under every picture.

Notation
    strip    a dark band as wide as the picture, with the caption on its left and the legend on its right
"""

from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from drawing.colors import depth_colors, error_colors, flow_colors, score_colors

STRIP = (22, 24, 28)
TEXT = (226, 229, 233)
HEIGHT = 34      # pixels
TEXT_SIZE = 14   # pixels
GAP = 10         # pixels between parts of the strip
BAR = (150, 12)  # width and height of a color bar in pixels


@lru_cache(maxsize=512)
def text_picture(text: str) -> np.ndarray:
    """A line of text on the strip's background, `(h, w, 3)`."""
    font = ImageFont.load_default(TEXT_SIZE)
    left, _, right, _ = font.getbbox(text or " ")
    picture = Image.new("RGB", (int(right - left) + 2, TEXT_SIZE + 8), STRIP)
    ImageDraw.Draw(picture).text((1 - left, 3), text, TEXT, font)
    return np.asarray(picture)


def row(parts: list[np.ndarray], gap: int = GAP) -> np.ndarray:
    """Pictures side by side, centered vertically in a strip `(HEIGHT, w, 3)`."""
    width = sum(part.shape[1] for part in parts) + gap * (len(parts) - 1)
    out = np.full((HEIGHT, width, 3), STRIP, np.uint8)
    x = 0
    for part in parts:
        y = (HEIGHT - part.shape[0]) // 2
        out[y:y + part.shape[0], x:x + part.shape[1]] = part
        x += part.shape[1] + gap
    return out


def color_bar(colors: Callable[[np.ndarray], np.ndarray], low: str, high: str, title: str) -> np.ndarray:
    """A legend `title low [bar] high`; `colors` maps shares `(h, w)` in [0, 1] to `(h, w, 3)`."""
    bar = colors(np.repeat(np.linspace(0, 1, BAR[0], dtype=np.float32)[None], BAR[1], 0))
    return row([text_picture(f"{title}   {low}"), bar, text_picture(high)], 7)


def depth_legend(near: float, far: float) -> np.ndarray:
    """Legend of depth colors."""
    return color_bar(lambda share: depth_colors(share, 0, 1), f"{near:.2f} near", f"{far:.2f} far", "depth")


def error_legend(largest: float) -> np.ndarray:
    """Legend of error colors; `largest` in pixels."""
    return color_bar(lambda share: error_colors(share, 1), "0", f"{largest:.2f} px", "mean flow error")


def mark_legend() -> np.ndarray:
    """Legend of point marks: a disc is a visible point, a ring an occluded one."""
    marks = []
    for thickness in (cv2.FILLED, 1):
        mark = np.full((14, 14, 3), STRIP, np.uint8)
        cv2.circle(mark, (7 << 4, 7 << 4), 5 << 4, TEXT, thickness, cv2.LINE_AA, 4)
        marks.append(mark)
    return row([marks[0], text_picture("visible"), marks[1], text_picture("occluded")], 7)


def point_legend(dense: bool = False, scored: bool = False) -> np.ndarray:
    """Legend of points: the marks (a note instead for `dense` grids), and with `scored` the colors of scores."""
    marks = text_picture("occluded points are not drawn") if dense else mark_legend()
    if not scored:
        return marks
    return row([marks, color_bar(score_colors, "0", "1", "occlusion score")], 2 * GAP)


def flow_wheel(size: int) -> np.ndarray:
    """The flow color wheel as RGBA `(size, size, 4)`, transparent outside the circle."""
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    flow = np.stack(np.meshgrid(axis, axis), -1)
    radius = np.hypot(*np.moveaxis(flow, -1, 0))
    alpha = ((1 - radius) * size / 2 + 0.5).clip(0, 1)
    colors = flow_colors(flow / np.maximum(radius, 1)[..., None], 1.0)
    return np.concatenate([colors, np.rint(alpha * 255).astype(np.uint8)[..., None]], -1)


def flow_legend(longest: float) -> np.ndarray:
    """Legend of flow colors: a small wheel, and the flow in pixels that its rim stands for."""
    wheel = flow_wheel(HEIGHT - 4).astype(np.float32)
    alpha = wheel[..., 3:] / 255
    flat = np.rint(alpha * wheel[..., :3] + (1 - alpha) * np.array(STRIP)).astype(np.uint8)
    return row([text_picture("color is direction"), flat, text_picture(f"rim: {longest:.3g} px a frame")], 7)


def with_strip(picture: np.ndarray, caption: str, legend: np.ndarray | None = None) -> np.ndarray:
    """The picture `(H, W, 3)` with a strip below it; caption and legend get a row each if one is too narrow."""
    W = picture.shape[1]
    words = text_picture(caption)
    parts = [words] if legend is None else [words, legend]
    fits = sum(part.shape[1] for part in parts) + (len(parts) + 1) * GAP <= W
    rows = [np.full((HEIGHT, W, 3), STRIP, np.uint8) for _ in range(1 if fits else len(parts))]
    for k, part in enumerate(parts):
        part = shrunk(part, W)
        x = GAP if k == 0 or not fits else W - GAP - part.shape[1]
        x = min(x, W - part.shape[1])
        y = (HEIGHT - part.shape[0]) // 2
        rows[k % len(rows)][y:y + part.shape[0], x:x + part.shape[1]] = part
    return np.concatenate([picture, *rows])


def shrunk(picture: np.ndarray, width: int) -> np.ndarray:
    """The picture, scaled down to `width` if it is wider."""
    if picture.shape[1] <= width:
        return picture
    height = max(1, round(picture.shape[0] * width / picture.shape[1]))
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
