"""Look at a trained run: python viz.py --config configs/default.txt --data_dir seqs/clip [--what tracks,trails,page]

Results go to the run's folder, or to --out_dir. --what names, separated by commas:
tracks      the query frame's points in all frames        depth      rendered depth
trails      the foreground's paths, background at rest    flow       flow from each frame to the next
occlusion   the tracks with their occlusion scores        color     the frames beside what the model renders
pairs       two frames and their correspondences          errors     where the flow error was large in training
canonical   the canonical volume                          page       a page to click on, page.html
all         all of these but the page
"""

import logging
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import run
from common.errors import UserError
from configs.options import parse
from drawing import maps
from drawing.cloud import cloud_pictures
from drawing.colors import position_colors, score_colors
from drawing.legend import text_picture, with_strip
from drawing.run_views import Views
from drawing.tracks import match_picture, track_pictures
from drawing.trails import trail_pictures
from loaders.images import limit_pixels
from loaders.video import write_gif, write_video
from training.tensorboard import write_png

log = logging.getLogger("viz")
FORMATS = ("mp4", "gif", "png")
SWING_FRAMES = 60  # of the canonical cloud


def visualize(options: Namespace) -> None:
    """Make everything that `what` names."""
    names = _chosen(options.what, "what", (*MAKERS, "all"))
    formats = _chosen(options.formats, "formats", FORMATS)
    if "all" in names:
        names = [*(name for name in MAKERS if name != "page"), *(["page"] if "page" in names else [])]
    views = Views(options)
    folder = Path(options.out_dir or views.dir)
    for name in names:
        for path in MAKERS[name](views, folder / name, formats):
            log.info("%s", path)


def tracks(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """Points of the query frame drawn over all frames."""
    found, t = views.tracks, views.options.query_frame_id
    colors = position_colors(views.points, views.size)
    pictures = track_pictures(views.frames, found.tracks, found.visible, colors, t, views.spacing)
    return write(_of_frame(path, t), pictures, views, formats)


def trails(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """Paths of the foreground's points, with the background's motion taken out."""
    chosen, t = views.foreground, views.options.query_frame_id
    if not chosen.any():
        log.warning("no foreground: trails are of all points (give --foreground_mask_path)")
        chosen = np.ones(len(chosen), bool)
    found, colors = views.tracks, position_colors(views.points, views.size)[chosen]
    pictures = trail_pictures(views.frames, found.tracks[chosen], found.visible[chosen], colors,
                              views.background_steps, t, views.spacing)
    return write(_of_frame(path, t), pictures, views, formats)


def occlusion(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """The tracks in the colors of their occlusion scores."""
    found, t = views.tracks, views.options.query_frame_id
    pictures = track_pictures(views.frames, found.tracks, found.visible, score_colors(found.occlusion_score), t,
                              views.spacing)
    return write(_of_frame(path, t), pictures, views, formats)


def depth(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """Rendered depth."""
    return write(path, maps.depth_pictures(views.renderings(range(views.T))[1], views.size), views, formats)


def flow(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """Flow from each frame to the next."""
    return write(path, maps.flow_pictures(views.flows(range(views.T - 1)), views.size), views, formats)


def color(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """The frames beside their renderings."""
    return write(path, maps.color_pictures(views.frames, views.renderings(range(views.T))[0]), views, formats)


def errors(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """The accumulated error map."""
    if views.errors is None:
        log.warning("errors: the checkpoint has no error map (--error_map off, or OmniMotion's format); nothing drawn")
        return []
    return write(path, maps.error_pictures(views.frames, views.errors), views, formats)


def canonical(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """The canonical volume: rendered from the front, and as a cloud of the points that the frames show."""
    points, colors = views.canonical_cloud()
    H, W = maps.picture_size(views.size)
    low, high = np.percentile(points, (0.5, 99.5), axis=0)
    side = 480 if views.tracker.device.type == "cuda" else 160
    shape = tuple(max(1, round(side * n / min(H, W))) for n in (H, W))
    log.info("rendering the canonical volume")
    front = np.rint(views.render_canonical(low, high, shape).clip(0, 1) * 255).astype(np.uint8)
    front = maps.fit(front, (H, W))
    stretched = points * [views.size[1] / views.size[0], 1, 1]  # x and y are normalized each by its own side
    legend = text_picture("volume from the front | surface points of 6 frames")
    pictures = (with_strip(maps.beside([front, cloud]), "canonical volume", legend)
                for cloud in cloud_pictures(stretched, colors, (H, W), SWING_FRAMES, max(2, min(H, W) // 160)))
    return write(path, pictures, views, formats, SWING_FRAMES)


def pairs(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """Points of the query frame and where they are in another frame."""
    i, j = views.options.query_frame_id, views.target_frame
    spacing = views.options.grid_interval or 2 * views.spacing
    points = views.grid(spacing)
    found = views.track(i, points, [j])
    picture = match_picture((views.frames[i], views.frames[j]), points, found.tracks[:, 0], found.visible[:, 0],
                            position_colors(points, views.size), f"frame {i} | frame {j}", 12, spacing)
    path = path.with_name(f"pairs_{i:05d}_{j:05d}.png")
    write_png(path, maps.beside([picture]))
    return [path]


def page(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """The page to click on."""
    from drawing.page import write_page

    return [write_page(views, path.with_suffix(".html"))]


MAKERS = {maker.__name__: maker for maker in
          (tracks, trails, occlusion, depth, flow, color, canonical, errors, pairs, page)}


def write(path: Path, pictures: Iterable[np.ndarray], views: Views, formats: list[str], count: int = 0) -> list[Path]:
    """Pictures as PATH.mp4, PATH.gif and PATH/00000.png."""
    pictures, fps, out = tqdm(pictures, path.name, count or views.T), views.options.fps, []
    if len(formats) > 1:
        pictures = list(pictures)
    for name in formats:
        if name == "png":
            for t, picture in enumerate(pictures):
                write_png(path / f"{t:05d}.png", picture)
            out.append(path)
        else:
            writer = write_video if name == "mp4" else write_gif
            out.append(path.with_suffix(f".{name}"))
            writer(out[-1], pictures, fps)
    return out


def _of_frame(path: Path, t: int) -> Path:
    return path.with_name(f"{path.name}_{t:05d}")


def _chosen(text: str, option: str, known: Iterable[str]) -> list[str]:
    """The names of a comma-separated option, each once. UserError for an unknown one."""
    names = list(dict.fromkeys(name for name in text.split(",") if name))
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--{option} {text}: no '{unknown[0]}', choose among {', '.join(known)}")
    return names


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse("viz")
    limit_pixels(options.max_pixels)
    visualize(options)


if __name__ == "__main__":
    run(main)
