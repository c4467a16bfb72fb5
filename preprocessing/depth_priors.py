"""Depth priors for training: one depth map per frame, `seq/depth/NAME.npy`, (H, W) float16.

Notation
    T, H, W  number of frames, their height and width
    d        depth from a model or from the user's files, with unknown scale and shift
    z        depth prior in [0, 2], the depth range of the model; 0 is nearest. The map from d to z is a scale and a
             shift that are the same for all frames
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import in_natural_order, write_text
from loaders.depth import depth_path
from loaders.npy import ArrayFile, map_npy, save_npy
from loaders.sequence import VideoSequence
from preprocessing.flow import ModelOptions
from preprocessing.frame_cache import FrameCache

log = logging.getLogger(__name__)
RANGE = (0.0, 2.0)          # of z: OmniMotion's min_depth and max_depth
PERCENTILES = (1, 99)       # of d over the video; they are mapped to the ends of RANGE, values beyond are clamped
PERCENTILE_SAMPLES = 10_000 # about so many pixels per frame are used for the percentiles
MEMORY = 256 << 20          # bytes of maps to keep in memory
ADVICE = "write it again with numpy.save or numpy.savez"


def write_depth(sequence: VideoSequence, kind: str, models: ModelOptions, source: Path | None = None, name: str = "",
                disparity: bool = False) -> None:
    """Write the depth priors of a sequence. They are valid when meta.json, the last file, is written.

    kind:      "depth_anything", "midas" or "npz"
    source:    for "npz": a folder of .npy files, one per frame in natural order of names, or an .npz file with the
               array `depth` `(T, H, W)`
    name:      for the other kinds: another model of the kind than the default
    disparity: for "npz": larger values are nearer
    UserError if the model or a file cannot be loaded, or does not fit the frames."""
    if kind == "npz":
        if source is None:
            raise UserError("--depth npz needs --depth_dir, a folder of .npy maps or an .npz with `depth`")
        read = _files(sequence, source)
        method = {"kind": kind, "source": source.name}
    else:
        from third_party.depth import DisparityEstimator

        estimator = DisparityEstimator(kind, name, models.weights_dir, models.offline, models.device)
        disparity = True
        method = {"kind": kind, "model": estimator.name}

        def read(t: int) -> np.ndarray:
            return estimator(sequence.frame(t))
    sign = -1 if disparity else 1  # so that larger values are farther
    folder = sequence.root / "depth"
    raw = sequence.root / "depth.partial"
    shutil.rmtree(raw, ignore_errors=True)
    try:
        maps = FrameCache(lambda t: (_checked(read(t), t, sequence, kind),), MEMORY, raw)
        low, high = value_range(sign * maps[t][0] for t in tqdm(range(len(sequence)), desc="depth"))
        (folder / "meta.json").unlink(missing_ok=True)  # from here on the previous priors are invalid
        for t, frame in enumerate(sequence.names):
            save_npy(depth_path(sequence, frame), normalized(sign * maps[t][0], low, high))
    finally:
        shutil.rmtree(raw, ignore_errors=True)
    hashes = dict(zip(sequence.names, sequence.hashes, strict=True))
    write_text(folder / "meta.json", json.dumps({**method, "low": low, "high": high, "hashes": hashes}))
    log.info("%s: depth priors of %d frames", folder, len(sequence))


def value_range(maps) -> tuple[float, float]:
    """The PERCENTILES of the values of all maps `(H, W)`, from a subset of their pixels."""
    samples = [m.ravel()[:: max(m.size // PERCENTILE_SAMPLES, 1)] for m in maps]
    low, high = np.percentile(np.concatenate(samples), PERCENTILES)
    return float(low), float(high)


def normalized(d: np.ndarray, low: float, high: float) -> np.ndarray:
    """Depth priors z `(H, W)` float16 of depths d `(H, W)`: [low, high] is mapped to RANGE, others are clamped."""
    share = (d - low) / max(high - low, 1e-12)
    return (RANGE[0] + (RANGE[1] - RANGE[0]) * share.clip(0, 1)).astype(np.float16)


def _files(sequence: VideoSequence, source: Path) -> Callable[[int], np.ndarray]:
    """A function t -> depth map of frame t that reads the user's files. UserError if they do not fit the sequence."""
    if source.is_dir():
        paths = in_natural_order(path for path in source.iterdir() if path.suffix == ".npy")
        if len(paths) != len(sequence):
            raise UserError(f"{source} has {len(paths)} .npy files for {len(sequence)} frames: give one file per frame")
        return lambda t: map_npy(paths[t], ADVICE)
    if source.suffix == ".npy":
        maps = map_npy(source, ADVICE)
    else:
        arrays = ArrayFile(source, ADVICE)
        maps = arrays["depth"] if "depth" in arrays else np.empty(0)
    if maps.ndim != 3 or len(maps) != len(sequence):
        raise UserError(f"{source} has no array `depth` of {len(sequence)} maps (T, H, W)")
    return lambda t: maps[t]


def _checked(d: np.ndarray, t: int, sequence: VideoSequence, kind: str) -> np.ndarray:
    """The map of frame t as float32. UserError unless it has the frame's size and is finite."""
    if np.shape(d) != sequence.size:
        raise UserError(f"the {kind} depth map of {sequence.names[t]} is {np.shape(d)}, the frame {sequence.size}: "
                        "resize the maps to the frames")
    d = np.asarray(d, np.float32)
    if not np.isfinite(d).all():
        raise UserError(f"the {kind} depth map of {sequence.names[t]} has values that are not finite")
    return d
