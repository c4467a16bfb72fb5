"""A depth map of every frame, as a prior for training: `seq/depth/NAME.npy`, (H, W) float16.

Notation
    T, H, W  frames, height, width
    d        depth as it comes, up to a scale and a shift: of a model, or of the user's files
    z        depth prior in [0, 2], as the model's: 0 nearest. One scale and one shift serve the whole video
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import write_text
from loaders.depth import depth_path
from loaders.npy import ArrayFile, map_npy, save_npy
from loaders.sequence import VideoSequence
from preprocessing.flow import ModelOptions
from preprocessing.frame_cache import FrameCache

log = logging.getLogger(__name__)
DEPTHS = ("depth_anything", "midas", "npz")
RANGE = (0.0, 2.0)       # min_depth and max_depth of the published options
PERCENTILES = (1, 99)    # of the video that become the ends of the range; beyond them z is clamped
AGAIN = "write it again with numpy.save or numpy.savez"
SAMPLES = 10_000         # pixels of a frame that the percentiles are taken from


def write_depth(sequence: VideoSequence, kind: str, models: ModelOptions, source: Path | None = None, name: str = "",
                disparity: bool = False) -> None:
    """Write the depth priors of a sequence; meta.json, the last file, makes them valid.

    kind: one of DEPTHS; source: for "npz", a folder of .npy files, one a frame in the order of their names, or an .npz
    with `depth` `(T, H, W)`; disparity: its values are larger where it is nearer; name: another model of the kind.
    UserError if a model or a file cannot be had, or does not fit the frames."""
    if kind == "npz":
        if source is None:
            raise UserError("--depth npz needs --depth_dir, a folder of .npy maps or an .npz with `depth`")
        read, sign, method = _files(sequence, source), -1 if disparity else 1, {"kind": kind, "source": source.name}
    else:
        from third_party.depth import DisparityEstimator

        estimator = DisparityEstimator(kind, name, models.weights_dir, models.offline, models.device)
        read, sign = (lambda t: estimator(sequence.frame(t))), -1
        method = {"kind": kind, "model": estimator.name}
    folder, raw = sequence.root / "depth", sequence.root / "depth.partial"
    shutil.rmtree(raw, ignore_errors=True)
    try:
        maps = FrameCache(lambda t: (_checked(read(t), t, sequence, kind),), 256 << 20, raw)
        low, high = value_range(sign * maps[t][0] for t in tqdm(range(len(sequence)), desc="depth"))
        (folder / "meta.json").unlink(missing_ok=True)  # from here on the old priors are gone
        for t, frame in enumerate(sequence.names):
            save_npy(depth_path(sequence, frame), normalized(sign * maps[t][0], low, high))
    finally:
        shutil.rmtree(raw, ignore_errors=True)
    hashes = dict(zip(sequence.names, sequence.hashes(), strict=True))
    write_text(folder / "meta.json", json.dumps({**method, "low": low, "high": high, "hashes": hashes}))
    log.info("%s: depth priors of %d frames", folder, len(sequence))


def value_range(maps) -> tuple[float, float]:
    """The values of all maps `(H, W)` that become the ends of the range."""
    picked = [m.ravel()[:: max(m.size // SAMPLES, 1)] for m in maps]
    low, high = np.percentile(np.concatenate(picked), PERCENTILES)
    return float(low), float(high)


def normalized(d: np.ndarray, low: float, high: float) -> np.ndarray:
    """Depths `(H, W)` scaled and shifted so that [low, high] is RANGE, clamped to it, float16."""
    share = (d - low) / max(high - low, 1e-12)
    return (RANGE[0] + (RANGE[1] - RANGE[0]) * share.clip(0, 1)).astype(np.float16)


def _files(sequence: VideoSequence, source: Path) -> Callable[[int], np.ndarray]:
    """`t -> map` of the user's files."""
    if source.is_dir():
        paths = sorted(path for path in source.iterdir() if path.suffix == ".npy")
        if len(paths) != len(sequence):
            raise UserError(f"{source} has {len(paths)} .npy files for {len(sequence)} frames: one a frame is needed")
        return lambda t: map_npy(paths[t], AGAIN)
    if source.suffix == ".npy":
        maps = map_npy(source, AGAIN)
    else:
        arrays = ArrayFile(source, AGAIN)
        maps = arrays["depth"] if "depth" in arrays else np.empty(0)
    if maps.ndim != 3 or len(maps) != len(sequence):
        raise UserError(f"{source} has no array `depth` of {len(sequence)} maps (T, H, W)")
    return lambda t: maps[t]


def _checked(d: np.ndarray, t: int, sequence: VideoSequence, kind: str) -> np.ndarray:
    """The map as float32. UserError unless it has the frame's size and is finite."""
    if np.shape(d) != sequence.size:
        raise UserError(f"the {kind} depth map of {sequence.names[t]} is {np.shape(d)}, the frame {sequence.size}: "
                        "resize the maps to the frames")
    d = np.asarray(d, np.float32)
    if not np.isfinite(d).all():
        raise UserError(f"the {kind} depth map of {sequence.names[t]} has values that are not finite")
    return d
