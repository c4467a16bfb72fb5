"""The visualizations that `viz.py --what` names.

Each function takes the run's views, the output path without a suffix and the output formats. It writes its files and
returns their paths. `VISUALIZATIONS` lists the functions by name.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from drawing import maps
from drawing.cloud import cloud_pictures
from drawing.colors import position_colors, score_colors
from drawing.legend import text_picture, with_strip
from drawing.output import write_pictures
from drawing.page import write_page
from drawing.run_views import Views
from drawing.tracks import match_picture, track_pictures
from drawing.trails import trail_pictures
from inference import dense
from loaders.images import write_png
from loaders.track_files import PointTracks
from loaders.video import write_video

log = logging.getLogger("viz")
CLOUD_FRAMES = 60        # length of the video of the canonical point cloud
CLOUD_DOTS = 100         # dots of the point cloud along the shorter side, if they lay side by side
CANONICAL_SIDE_GPU = 480  # pixels of the rendered canonical volume along its shorter side
CANONICAL_SIDE_CPU = 160
MATCH_LINES = 12         # lines drawn between matches of a frame pair


def tracks(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """Tracks of the query frame's points, drawn over all frames."""
    return _write_tracks(path, views, formats, position_colors(views.points, views.size))


def trails(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """Paths of the foreground's points relative to the background."""
    chosen = views.foreground
    if not chosen.any():
        log.warning("no foreground found: drawing trails of all points (--foreground_mask_path selects a foreground)")
        chosen = np.ones(len(chosen), bool)
    found = views.tracks
    colors = position_colors(views.points, views.size)[chosen]
    pictures = trail_pictures(views.frames, found.tracks[chosen], found.visible[chosen], colors,
                              views.background_steps, views.query_frame, views.spacing)
    return _write(_with_query_frame(path, views), pictures, views, formats)


def occlusion(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """Tracks colored by their occlusion scores."""
    return _write_tracks(path, views, formats, score_colors(views.tracks.occlusion_score))


def depth(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """Rendered depth."""
    _, depths = views.renderings(range(views.T))
    return _write(path, maps.depth_pictures(depths, views.size), views, formats)


def flow(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """Optical flow from each frame to the next."""
    return _write(path, maps.flow_pictures(views.flows(range(views.T - 1)), views.size), views, formats)


def color(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """Each frame beside its rendering."""
    rendered, _ = views.renderings(range(views.T))
    return _write(path, maps.color_pictures(views.frames, rendered), views, formats)


def canonical(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """The canonical volume rendered from the front, beside a point cloud of the surfaces that the frames show."""
    points, colors = views.canonical_cloud()
    height, width = maps.picture_size(views.size)
    low, high = np.percentile(points, (0.5, 99.5), axis=0)
    side = CANONICAL_SIDE_GPU if views.tracker.device.type == "cuda" else CANONICAL_SIDE_CPU
    shape = tuple(max(1, round(side * n / min(height, width))) for n in (height, width))
    log.info("rendering the canonical volume")
    front = np.rint(dense.render_canonical(views.tracker, low, high, shape).clip(0, 1) * 255).astype(np.uint8)
    front = maps.fit(front, (height, width))
    # x and y are normalized by width and height separately; undo that so that the cloud has the frame's aspect ratio.
    stretched = points * [views.size[1] / views.size[0], 1, 1]
    legend = text_picture("volume from the front | surface points of 6 frames")
    clouds = cloud_pictures(stretched, colors, (height, width), CLOUD_FRAMES, min(height, width) // CLOUD_DOTS)
    pictures = (with_strip(maps.beside([front, cloud]), "canonical volume", legend) for cloud in clouds)
    return _write(path, pictures, views, formats, CLOUD_FRAMES)


def errors(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """The flow errors that training accumulated in its error map; nothing if the checkpoint has no error map."""
    if views.errors is None:
        log.warning("errors: the checkpoint has no error map (--error_map off, or OmniMotion's format); nothing drawn")
        return []
    return _write(path, maps.error_pictures(views.frames, views.errors), views, formats)


def pairs(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """Points of the query frame beside their positions in the target frame, as one PNG."""
    i = views.query_frame
    j = views.target_frame
    spacing = views.options.grid_interval or 2 * views.spacing
    points = views.grid(spacing)
    found = views.track(i, points, [j])
    picture = match_picture((views.frames[i], views.frames[j]), points, found.tracks[:, 0], found.visible[:, 0],
                            position_colors(points, views.size), f"frame {i} | frame {j}", MATCH_LINES, spacing)
    path = path.with_name(f"{path.name}_{i:05d}_{j:05d}.png")
    write_png(path, maps.beside([picture]))
    return [path]


def write_query_tracks(path: Path, views: Views, tracks: PointTracks, spacing: float = np.inf) -> None:
    """Write a video of tracks, in pixels of the sequence's frames, of query points that may be in several frames.

    spacing: pixels between query points that are a grid"""
    colors = position_colors(tracks.query_points[:, :0:-1], views.size)
    frames = np.unique(tracks.query_points[:, 0])
    pictures = track_pictures(views.frames, tracks.tracks, tracks.visible, colors,
                              int(frames[0]) if len(frames) == 1 else None, spacing)
    write_video(path, tqdm(pictures, "video", views.T), views.options.fps)


def page(views: Views, path: Path, formats: list[str]) -> list[Path]:
    """The interactive page, one HTML file."""
    return [write_page(views, path.with_suffix(".html"))]


VISUALIZATIONS = {function.__name__: function for function in
                  (tracks, trails, occlusion, depth, flow, color, canonical, errors, pairs, page)}


def _write(path: Path, pictures: Iterable[np.ndarray], views: Views, formats: list[str], count: int = 0) -> list[Path]:
    """Write `count` pictures, by default one for each frame of the video."""
    return write_pictures(path, pictures, formats, views.options.fps, count or views.T)


def _write_tracks(path: Path, views: Views, formats: list[str], colors: np.ndarray) -> list[Path]:
    found = views.tracks
    pictures = track_pictures(views.frames, found.tracks, found.visible, colors, views.query_frame, views.spacing)
    return _write(_with_query_frame(path, views), pictures, views, formats)


def _with_query_frame(path: Path, views: Views) -> Path:
    """`tracks` -> `tracks_00003`."""
    return path.with_name(f"{path.name}_{views.query_frame:05d}")
