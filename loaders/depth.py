"""Depth priors of a sequence.

depth/NAME.npy   (H, W) float16 depth of the frame NAME in [0, 2]; 0 is nearest
depth/meta.json  names and content hashes of the frames
"""

from pathlib import Path

import numpy as np
from torch import Tensor

from common.errors import UserError
from common.files import read_json
from loaders.npy import read_npy
from loaders.sequence import VideoSequence

ADVICE = "run `python -m preprocessing --depth ...` again"


def depth_path(sequence: VideoSequence, name: str) -> Path:
    """Path of the depth prior of a frame."""
    return sequence.root / "depth" / f"{Path(name).stem}.npy"


def load_depth(sequence: VideoSequence) -> np.ndarray:
    """The depth priors `(T, H, W)` float16 in [0, 2].

    UserError if they are missing or damaged, or were made for other frames."""
    meta = sequence.root / "depth" / "meta.json"
    if not meta.is_file():
        raise UserError(f"no depth priors in {meta.parent}: run `python -m preprocessing --depth ...` first")
    hashes = read_json(meta, ADVICE).get("hashes")
    if not isinstance(hashes, dict):
        raise UserError(f"{meta} is damaged: {ADVICE}")
    changed = [name for name, now in zip(sequence.names, sequence.hashes, strict=True) if hashes.get(name) != now]
    if changed:
        raise UserError(f"{meta.parent} was made for other frames: {len(changed)} changed, first {changed[0]}: "
                        f"{ADVICE}")
    out = np.empty((len(sequence), *sequence.size), np.float16)
    for t, name in enumerate(sequence.names):
        path = depth_path(sequence, name)
        prior = read_npy(path, ADVICE)
        if prior.shape != sequence.size or not ((prior >= 0) & (prior <= 2)).all():  # NaN fails both comparisons
            raise UserError(f"{path} is not a map of depths from 0 to 2 of the frames' size: {ADVICE}")
        out[t] = prior
    return out


def depth_at(priors: Tensor, ids: Tensor, pixels: Tensor) -> Tensor:
    """Depth `(B, N)` float32 from priors `(T, H, W)` of frames `(B,)`, at the pixels nearest to points `(B, N, 2)`."""
    H, W = priors.shape[1:]
    x, y = pixels.round().long().unbind(-1)
    return priors[ids[:, None], y.clamp(0, H - 1), x.clamp(0, W - 1)].float()
