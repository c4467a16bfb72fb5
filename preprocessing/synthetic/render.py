"""Synthetic sequences with exact ground truth: `python -m preprocessing synthetic --data_dir seqs/demo`.

Notation
    T, H, W  number of frames, their height and width
    N        number of ground-truth points
    id       index of the visible layer at a pixel (H, W); 0 is the ground

A sequence folder gets color/ (frames), mask/ (everything but the ground), annotations.npz (docs/method.md;
without query points, which are sampled for the query mode, as in TAP-Vid) and synthetic.json (the arguments of
`write_scene`).
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import write_text
from common.geometry import inside, pixel_grid
from loaders.images import write_png
from loaders.track_files import Annotations, save_annotations
from preprocessing.synthetic.scenes import RECIPES, build_layers

SAMPLES = 2        # a pixel is the mean of SAMPLES x SAMPLES samples
MARGIN = 1.5       # pixels: smallest distance of a point to an outline in the frame in which it is chosen
MIN_SIDE = 48      # pixels: smallest height and width
START_FRAMES = 5   # points are chosen in so many frames


def main(args: argparse.Namespace) -> None:
    """Run the `synthetic` command. Errors as in `write_scene`."""
    write_scene(Path(args.data_dir), args.scene, tuple(args.size), args.num_frames, args.seed, args.num_points,
                progress=True)


def write_scene(root: Path, scene: str, size: tuple[int, int], num_frames: int, seed: int, num_points: int,
                progress: bool = False) -> None:
    """Render a scene into the sequence folder `root`. Arguments and errors as in `render_scene`.

    UserError also if the folder has a sequence that is not synthetic. A synthetic one is overwritten."""
    if (root / "color").exists() and not (root / "synthetic.json").exists():
        raise UserError(f"{root} has a sequence that is not synthetic: choose another --data_dir")
    frames, annotations, masks = render_scene(scene, size, num_frames, seed, num_points, progress)
    made = {"scene": scene, "size": size, "num_frames": num_frames, "seed": seed, "num_points": num_points}
    write_text(root / "synthetic.json", json.dumps(made, indent=1) + "\n")
    for folder, images in (("color", frames), ("mask", masks.astype(np.uint8) * 255)):
        for stale in (root / folder).glob("*.png"):
            if not stale.stem.isdigit() or int(stale.stem) >= len(images):
                stale.unlink()
        for i, image in enumerate(images):
            write_png(root / folder / f"{i:05d}.png", image)
    save_annotations(root / "annotations.npz", annotations)


def render_scene(scene: str, size: tuple[int, int], num_frames: int, seed: int, num_points: int,
                 progress: bool = False) -> tuple[np.ndarray, Annotations, np.ndarray]:
    """Frames `(T, H, W, 3)` uint8, ground truth, and masks `(T, H, W)` bool of everything but the ground.

    scene: a key of RECIPES; size: (H, W); seed: of textures, placement and points; progress: show a progress bar.
    UserError for an unknown scene, fewer than 2 frames, sides below MIN_SIDE or no points."""
    if scene not in RECIPES:
        raise UserError(f"no scene '{scene}': choose from {', '.join(RECIPES)}")
    if num_frames < 2 or min(size) < MIN_SIDE or num_points < 1:
        raise UserError(f"a synthetic sequence needs at least 2 frames, {MIN_SIDE} pixels per side and 1 point")
    layers = build_layers(scene, size, num_frames, seed)
    rendered = [render(layers, size, t) for t in tqdm(range(num_frames), "rendering", disable=not progress)]
    annotations = sample_tracks(layers, size, num_frames, seed, num_points)
    return np.stack([frame for frame, _ in rendered]), annotations, np.stack([ids > 0 for _, ids in rendered])


def render(layers: list, size: tuple[int, int], t: int) -> tuple[np.ndarray, np.ndarray]:
    """Frame t `(H, W, 3)` uint8, and the ids of the visible layers at the pixel centers `(H, W)`."""
    H, W = size
    offset = (SAMPLES - 1) / 2
    samples = (pixel_grid((H * SAMPLES, W * SAMPLES)).double().numpy() - offset) / SAMPLES  # in pixels
    picture = np.zeros((H * SAMPLES, W * SAMPLES, 3), np.float32)
    for layer in layers:
        rows, columns = _window(layer, size, t)
        material, edge = layer.look_up(samples[rows, columns], t)
        if edge.size == 0:
            continue
        cover = (edge * SAMPLES + 0.5).clip(0, 1)[..., None].astype(np.float32)
        picture[rows, columns] += cover * (layer.color(material) - picture[rows, columns])
    frame = cv2.resize(picture, (W, H), interpolation=cv2.INTER_AREA)
    return np.rint(frame).clip(0, 255).astype(np.uint8), front(layers, pixel_grid(size).double().numpy(), t)


def front(layers: list, points: np.ndarray, t: int, margin: float = 0.0) -> np.ndarray:
    """Ids `(...)` of the visible layers at `points` `(..., 2)` of frame t; -1 within `margin` pixels of an outline."""
    ids = np.zeros(points.shape[:-1], np.int64)
    for k, layer in enumerate(layers):
        edge = layer.look_up(points, t)[1]
        ids[edge > -margin] = -1
        ids[edge > margin] = k
    return ids


def sample_tracks(layers: list, size: tuple[int, int], num_frames: int, seed: int, num_points: int) -> Annotations:
    """Ground-truth tracks of `num_points` points, computed from the motion of the layers.

    Each point is visible in one of START_FRAMES frames spread over the clip. It is occluded in frames where it is
    outside the frame, on a side that faces away from the camera, or behind a nearer layer. All layers get the same
    number of points; half of a layer's are points that disappear and reappear, where there are enough of them."""
    H, W = size
    rng = np.random.default_rng([seed, 1])
    frames = np.unique(np.linspace(0, num_frames - 1, START_FRAMES).round().astype(int))
    places = rng.uniform((-0.5, -0.5), (W - 0.5, H - 0.5), (len(frames), 50 * num_points, 2))
    ids = np.stack([front(layers, p, t, MARGIN) for p, t in zip(places, frames, strict=True)])
    groups = np.where(ids < 0, -1, ids * len(frames) + np.arange(len(frames))[:, None])
    chosen = stratify(groups.ravel(), 4 * num_points)
    ids = ids.ravel()[chosen]
    places = places.reshape(-1, 2)[chosen]
    start = chosen // groups.shape[1]  # index into `frames`
    points = np.empty((len(chosen), num_frames, 2))
    occluded = np.empty((len(chosen), num_frames), bool)
    for k, layer in enumerate(layers):
        for f in range(len(frames)):
            rows = (ids == k) & (start == f)
            material = layer.look_up(places[rows], frames[f])[0]
            for t in range(num_frames):
                position, faces_camera = layer.project(material, t)
                hidden = front(layers[k:], position, t) > 0  # by a nearer layer
                points[rows, t] = position
                occluded[rows, t] = ~faces_camera | ~inside(position, size) | hidden
    comes_back = (np.diff(occluded.astype(int), axis=1) != 0).sum(axis=1) > 1
    rows = stratify(ids * 2 + comes_back, num_points)
    return Annotations(points[rows].astype(np.float32), occluded[rows], size)


def stratify(groups: np.ndarray, count: int) -> np.ndarray:
    """`count` indices into `groups` `(n,)`, as equally distributed over the groups as possible, none of group -1.

    Fewer are returned if there are not as many."""
    rank = np.full(len(groups), len(groups))  # number of earlier items of the same group; group -1 comes last
    for group in np.unique(groups[groups >= 0]):
        members = np.flatnonzero(groups == group)
        rank[members] = np.arange(len(members))
    return np.argsort(rank, kind="stable")[:min(count, (groups >= 0).sum())]


def _window(layer, size: tuple[int, int], t: int) -> tuple[slice, slice]:
    """Rows and columns of the grid of samples that the layer may cover in frame t."""
    center, radius = layer.bounding_circle(t)
    low = np.nan_to_num(center - radius - 2)  # an unbounded layer has an infinite radius
    high = center + radius + 3
    limit = np.array(size[::-1])
    low = np.clip(low, 0, limit).astype(int) * SAMPLES
    high = np.minimum(high, limit).clip(0).astype(int) * SAMPLES
    return slice(low[1], high[1]), slice(low[0], high[0])
