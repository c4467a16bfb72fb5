"""Time of drawing videos and pages, without inference: python -m benchmarks.drawing

Measures a video of tracks and a video of trails (82 frames of 854x480, 2,000 points). Measures also a page of 60
frames, with tracks on a grid of 4 pixels in every fifth frame: time to write it, file size, and load time if
playwright and Chromium are installed. The tracks are synthetic: a panning camera and a moving block, with Gaussian
noise of standard deviation --noise pixels in every position. Prints wall time and CPU time; other processes on the
machine hardly affect the CPU time.
"""

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from common.cli import Parser
from drawing.colors import position_colors
from drawing.pack import GridTracks
from drawing.page import PageData, page_html
from drawing.tracks import track_pictures
from drawing.trails import background_step, trail_pictures
from inference.dense import grid_pixels
from loaders.video import write_video

SIZE = (480, 854)  # pixels (H, W)


def clip(count: int) -> np.ndarray:
    """Frames `(count, 480, 854, 3)` uint8 of a moving texture with several scales."""
    rng = np.random.default_rng(0)
    scales = [rng.normal(0, 20, (600 // k, 1000 // k, 3)).astype(np.float32) for k in (2, 8, 40)]
    canvas = (128 + sum(cv2.resize(values, (1000, 600)) for values in scales)).clip(0, 255).astype(np.uint8)
    return np.stack([canvas[t // 2: t // 2 + 480, t: t + 854] for t in range(count)])


def motion(points: np.ndarray, count: int, start: int, noise: float) -> np.ndarray:
    """Tracks `(N, count, 2)` of points `(N, 2)` of frame `start`, for a panning camera and a moving block."""
    t = np.arange(count)
    walk = np.stack([20 * np.sin(t / 9), 6 * np.sin(t / 3)], -1)
    inside = (abs(points - [400, 250]) < [120, 90]).all(-1)
    camera = np.stack([-t, -t / 2], -1) * (1 + points[:, :1, None] * 1e-4)
    tracks = points[:, None] + camera + inside[:, None, None] * walk
    tracks = tracks - tracks[:, start: start + 1] + points[:, None]
    return (tracks + np.random.default_rng(start).normal(0, noise, tracks.shape)).astype(np.float32)


def block(start: int, count: int, noise: float) -> GridTracks:
    """Grid tracks of query frame `start` through `count` frames."""
    points, shape = grid_pixels(SIZE, 4)
    tracks = motion(points, count, start, noise)
    visible = ((tracks >= 0) & (tracks < SIZE[::-1])).all(-1)
    depth = 1 + 0.3 * np.sin(points[:, :1] / 200) + 0.02 * np.sin(np.arange(count) / 7)
    return GridTracks(start, shape, tracks, visible, depth.astype(np.float32), (~visible).astype(np.float32))


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Print wall time and CPU time of the `with` block."""
    wall, work = time.perf_counter(), time.process_time()
    yield
    print(f"{name}: {time.perf_counter() - wall:.1f} s, CPU {time.process_time() - work:.1f} s", flush=True)


def video_times(folder: Path) -> None:
    """Write the two videos to `folder` and print their times."""
    frames = clip(82)
    rng = np.random.default_rng(0)
    points = rng.uniform([0, 0], [854, 480], (2_000, 2)).astype(np.float32)
    tracks = motion(points, 82, 0, 0.05)
    visible = rng.random((2_000, 82)) > 0.1
    colors = position_colors(points, SIZE)
    with timed("tracks, 82 frames of 854x480, 2000 points"):
        write_video(folder / "tracks.mp4", track_pictures(frames, tracks, visible, colors, 0))
    with timed("trails, the same"):
        steps = np.stack([background_step(tracks[:, t], tracks[:, t + 1]) for t in range(81)])
        write_video(folder / "trails.mp4", trail_pictures(frames, tracks, visible, colors, steps, 0))


def write_page(path: Path, noise: float) -> None:
    """Write the page and print its time and file size."""
    T = 60  # frames
    rng = np.random.default_rng(0)
    smooth = np.stack([cv2.resize(rng.random((4, 6)).astype(np.float32), (107, 60)) for _ in range(T)])
    data = PageData("benchmark", 10, clip(T), list(range(T)), [block(t, T, noise) for t in range(0, T, 5)], 4, 0.99,
                    smooth, np.stack([smooth[1:], smooth[:-1]], -1), smooth)
    count = sum(len(b.tracks) for b in data.blocks)
    with timed(f"page, {T} frames of 854x480, {count} tracks 4 px apart"):
        path.write_text(page_html(data))
    print(f"its size: {path.stat().st_size / 1e6:.1f} MB, tracks {data.interval} px apart")


def load_times(path: Path, runs: int = 5) -> None:
    """Print the median seconds from opening the page to its first frame, and from a click to the track."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    times = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(runs):
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            start = time.perf_counter()
            page.goto(path.resolve().as_uri())
            page.evaluate("images.get('video-0').then(() => new Promise(requestAnimationFrame))")
            shown = time.perf_counter()
            page.evaluate("pick(meta.width / 2, meta.height / 2)")
            times.append((shown - start, time.perf_counter() - shown))
            page.close()
        browser.close()
    shown, picked = np.median(times, axis=0)
    print(f"its first frame in Chromium after {shown:.2f} s, the first click's track {picked:.2f} s later "
          f"(medians of {runs})")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--noise", type=float, default=0.05, help="pixels")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        video_times(Path(folder))
        page = Path(folder) / "page.html"
        write_page(page, args.noise)
        if importlib.util.find_spec("playwright"):
            load_times(page)
        else:
            print("its loading was not timed: playwright is not installed")


if __name__ == "__main__":
    main()
