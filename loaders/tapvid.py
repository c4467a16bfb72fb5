"""Benchmarks: TAP-Vid pickles (DAVIS, RGB-Stacking, Kinetics shards, RoboTAP) and folders of annotated clips.

Notation
    T, H, W  frames, height and width of the video in the file
    N        ground-truth points
    raster   (x, y) divided by the frame's width and height, in [0, 1]; the first pixel's center is (0.5 / W, 0.5 / H)

A TAP-Vid file is a pickled dict (DAVIS, RoboTAP) or list (RGB-Stacking, Kinetics) of videos; a video is a dict of
`video` (T, H, W, 3) uint8 or T JPEG images, `points` (N, T, 2) raster, and `occluded` (N, T) bool.
"""

import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError
from common.files import MAX_PIXELS, atomic_path, in_natural_order
from loaders.images import check_pixels, decode_image, encode_image, image_files
from loaders.npy import MAX_BYTES
from loaders.tapvid_pickle import read_pickle
from loaders.track_files import Annotations, load_annotations
from loaders.video import read_video

OVERSHOOT = 0.05  # raster units; visible points may be this far outside [0, 1]: interpolated tracks can leave the frame
VIDEO_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}


@dataclass(frozen=True)
class TapVideo:
    """One video of a benchmark."""
    frames: np.ndarray            # (T, H, W, 3) uint8 RGB
    annotations: Annotations      # in pixels of these frames
    files: tuple[Path, ...] = ()  # the image files of the frames, if there are any


def open_benchmark(path: str | Path, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[str, Callable[[], TapVideo]]]:
    """Yields the name of each video and a function that decodes and checks it, in the order of the file.

    path: a TAP-Vid pickle, a folder of shards (.pkl), or a folder of annotated clips. A clip is a subfolder (or the
    folder itself) with annotations.npz and the frames: color/, image files or one video file.
    Names are unique and valid as file names. UserError if a file is missing, cannot be read, or has no videos. If one
    video, or one of several shards, is damaged, the function of that video or shard raises the UserError."""
    path = Path(path)
    taken = {"settings"}  # reserved: the results folder has a file of this name
    for name, read in _open(path, max_pixels):
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")
        yield _unique(re.sub(r"\.failed$", "_failed", safe) or "video", taken), read
    if len(taken) == 1:
        raise UserError(f"{path} has no videos: give a TAP-Vid file (.pkl), a folder of its shards, or a folder of "
                        "clips with annotations.npz")


def benchmark_name(path: str | Path) -> str:
    """Name of a benchmark for its results, for example tapvid_davis for .../tapvid_davis.pkl."""
    path = Path(path).resolve()
    return path.stem if path.suffix == ".pkl" else path.name


def save_tapvid(path: str | Path, videos: dict[str, TapVideo], layout: str = "dict") -> None:
    """Write videos as a TAP-Vid pickle.

    layout: 'dict', by name (DAVIS, RoboTAP); 'list' (RGB-Stacking); or 'jpeg', a list with JPEG frames (Kinetics)."""
    examples = {}
    for name, video in videos.items():
        H, W = video.frames.shape[1:3]
        raster = (video.annotations.points.astype(np.float64) + 0.5) / (W, H)
        frames = video.frames
        if layout == "jpeg":
            frames = np.array([encode_image(frame, ".jpeg", quality=95) for frame in frames])
        examples[name] = {"video": frames, "points": raster.astype(np.float32),
                          "occluded": video.annotations.occluded}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        pickle.dump(examples if layout == "dict" else list(examples.values()), file)


def _open(path: Path, max_pixels: int) -> Iterator[tuple[str, Callable[[], TapVideo]]]:
    if not path.is_dir():
        yield from _open_pickle(path, "", max_pixels)
    elif shards := in_natural_order(path.glob("*.pkl")):
        for shard in shards:
            try:
                yield from _open_pickle(shard, f"{shard.stem}_" if len(shards) > 1 else "", max_pixels)
            except UserError as error:
                if len(shards) == 1:
                    raise
                yield shard.stem, partial(_raise, error)  # continue with the other shards
    else:
        folders = [path, *in_natural_order(p for p in path.iterdir() if p.is_dir())]
        for folder in folders:
            if (folder / "annotations.npz").is_file():
                yield folder.resolve().name, partial(read_folder, folder, max_pixels)


def _open_pickle(path: Path, prefix: str, max_pixels: int) -> Iterator[tuple[str, Callable[[], TapVideo]]]:
    data = read_pickle(path)
    if isinstance(data, dict):
        examples = [(str(name)[:100], example) for name, example in data.items()]
    elif isinstance(data, list | tuple):
        examples = [(f"{prefix}{i:04d}", example) for i, example in enumerate(data)]
    else:
        raise UserError(f"{path} holds a {type(data).__name__}: a TAP-Vid file holds a dict or a list of videos")
    for name, example in examples:
        yield name, partial(read_example, example, f"{path}, video {name}", max_pixels)


def _raise(error: UserError) -> TapVideo:
    raise error


def read_example(example: object, where: str, max_pixels: int = MAX_PIXELS) -> TapVideo:
    """Read one video of a TAP-Vid pickle and convert its points from raster to pixels; `where` names it in errors.

    UserError if a key is missing, an array has the wrong shape or type, a frame cannot be decoded, or a visible point
    is not finite or more than OVERSHOOT outside [0, 1]."""
    if not isinstance(example, dict):
        raise UserError(f"{where} is of type {type(example).__name__}: it must be a dict of video, points and occluded")
    if missing := [key for key in ("video", "points", "occluded") if key not in example]:
        there = ", ".join(str(key)[:40] for key in list(example)[:20]) or "nothing"
        raise UserError(f"{where} has no `{missing[0]}`: it has {there}")
    if wrong := [key for key in ("points", "occluded") if not isinstance(example[key], np.ndarray)]:
        raise UserError(f"{where}: `{wrong[0]}` is a {type(example[wrong[0]]).__name__}: it must be an array")
    frames = _frames(example["video"], where, max_pixels)
    points, occluded = np.asarray(example["points"]), np.asarray(example["occluded"])
    T, H, W = frames.shape[:3]
    if points.ndim != 3 or points.shape[1:] != (T, 2) or points.dtype.kind not in "fiu":
        raise UserError(f"{where}: `points` is {points.dtype} {points.shape}, it must be numbers (points, {T}, 2) for "
                        f"{T} frames")
    if occluded.shape != points.shape[:2] or occluded.dtype.kind not in "biuf" or not np.isin(occluded, (0, 1)).all():
        raise UserError(f"{where}: `occluded` is {occluded.dtype} {occluded.shape}, it must be true or false "
                        f"{points.shape[:2]}")
    occluded = occluded.astype(bool)
    points = points.astype(np.float64)
    outside = ~((points >= -OVERSHOOT) & (points <= 1 + OVERSHOOT)).all(axis=-1) & ~occluded  # NaN is outside
    if outside.any():
        n, t = np.argwhere(outside)[0]
        x, y = points[n, t]
        raise UserError(f"{where}: `points` of point {n} in frame {t} is ({x:g}, {y:g}) though it is visible: points "
                        "must be shares of the frame's width and height, in [0, 1]")
    pixels = (np.nan_to_num(points, nan=0.0, posinf=0.0, neginf=0.0) * (W, H) - 0.5).astype(np.float32)
    return TapVideo(frames, Annotations(pixels, occluded, (H, W)))


def read_folder(folder: Path, max_pixels: int = MAX_PIXELS) -> TapVideo:
    """Read a clip from a folder with annotations.npz and the frames: color/, image files, or one video file.

    UserError if the frames or annotations are missing or damaged, or if they do not match each other."""
    color = folder / "color" if (folder / "color").is_dir() else folder
    files, clips = image_files(color), [p for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES]
    if not files and len(clips) != 1:
        raise UserError(f"{folder} has {len(clips)} video files and no images: put frames in color/, or one video file")
    frames = _bounded(read_video(color if files else clips[0], max_pixels=max_pixels), folder)
    if len({frame.shape for frame in frames}) > 1:
        raise UserError(f"the frames in {folder} have different sizes: resize them to one size")
    annotations = load_annotations(folder / "annotations.npz", len(frames))
    return TapVideo(np.stack(frames), annotations.resized(frames[0].shape[:2]), tuple(files))


def resize_frames(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames `(T, H, W, 3)` uint8 resized to `size` (H, W) with a Lanczos filter, as in TAP-Vid's data loader."""
    if frames.shape[1:3] == tuple(size):
        return frames
    return np.stack([np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.LANCZOS))
                     for frame in frames])


def _frames(video: object, where: str, max_pixels: int) -> np.ndarray:
    """Frames `(T, H, W, 3)` uint8 from an array, a sequence of arrays, or a sequence of T encoded images."""
    if not isinstance(video, np.ndarray | list | tuple) or len(video) < 2:
        raise UserError(f"{where}: `video` must have at least two frames")
    if isinstance(video[0], bytes):
        if not all(isinstance(frame, bytes) for frame in video):
            raise UserError(f"{where}: not all frames of `video` are encoded images")
        decoded = (decode_image(frame, f"{where}, frame {t} of `video`", max_pixels) for t, frame in enumerate(video))
        video = _bounded(decoded, where)
    elif not all(isinstance(frame, np.ndarray) for frame in video):
        raise UserError(f"{where}: the frames of `video` are not arrays or encoded images")
    elif not isinstance(video, np.ndarray):
        video = _bounded(video, where)
    try:
        frames = np.asarray(video)
    except ValueError as error:
        raise UserError(f"{where}: the frames of `video` have different sizes") from error
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or min(frames.shape) < 1:
        raise UserError(f"{where}: `video` is {frames.dtype} {frames.shape}, it must be uint8 (frames, height, width, "
                        "3) or JPEG images")
    check_pixels(*frames.shape[1:3], where, max_pixels)
    return frames


def _bounded(frames: Iterable[np.ndarray], where: object) -> list[np.ndarray]:
    """The frames as a list. UserError if they take more than MAX_BYTES of memory."""
    out, total = [], 0
    for frame in frames:
        total += frame.nbytes
        if total > MAX_BYTES:
            raise UserError(f"{where} takes more than {MAX_BYTES / 1e9:.0f} GB decoded: shorten it, or make it smaller")
        out.append(frame)
    return out


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
