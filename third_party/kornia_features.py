"""ALIKED (Zhao et al., IEEE TIM 2023) and XFeat (Potje et al., CVPR 2024) features on a regular grid, with kornia.

Notation
    h, w     grid of features
    H', W'   size of the resized image, (h - 1) STRIDE + 1 and (w - 1) STRIDE + 1 pixels
    C        channels: 128 for ALIKED, 64 for XFeat

Both are made for sparse keypoints. Here their descriptors are read at every STRIDE-th pixel of the resized image.

How the settings were chosen, on the bear clip at 256x256 (docs/preprocessing.md, Features of the appearance check):
- Area under the ROC curve, by shorter side of the resized image. ALIKED: 0.849 at 256, 0.877 at 384, and 0.888 at 512,
  which takes 1.7 times the time and memory of 384. XFeat: 0.847, 0.881, 0.886, and 0.887 at 640.
- A feature every 8 pixels instead of 4, at side 384: 0.867 for both.
- The dense feature map of ALIKED without its descriptor head: 0.854. XFeat with bilinear instead of bicubic
  interpolation of its map: 0.870.
- `threshold` is the 10th percentile of the similarities of correct flows, as that of SIFT.
- `chain_threshold`: share of points of the rendered scene `occlusion` with a stored correspondence 17 to 32 frames away
  (trusted chains), and the share of these that is wrong. ALIKED: 59%, 1.3% with 0.3; 55%, 0.4% with 0.4; 53%, 0.1% with
  0.5. XFeat: 60%, 1.7% with 0.6; 58%, 0.9% with 0.7. SIFT: 64%, 9.0%.
"""

import hashlib
import threading
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from common.torch_files import tensors_by_name

STRIDE = 4        # pixels of the resized image between features
MAX_ASPECT = 4.0  # the longer side of the resized image is at most this multiple of SIDE, which limits the memory


class AlikedFeatures:
    """`image -> features`: `(H, W, 3)` uint8 RGB to L2-normalized ALIKED-N(16) descriptors `(h, w, 128)` float16.

    The descriptor head (SDDH) samples the dense feature map around each position of the grid. Corner features lie on
    corner pixels. path: the weights file. Safe to call from several threads; a call takes up to 0.6 GiB for frames of
    16:9, so at most MAX_CALLS run at a time. UserError if the file is damaged or has other weights."""

    SIDE = 384       # the image is resized to this shorter side, in pixels
    MAX_CALLS = 2    # calls that compute at the same time
    POSITIONS = 1024  # positions per call of the descriptor head, which needs 8 KiB for each in several copies
    NUDGE = 1e-3     # pixels; the head truncates positions to integers, and rounding may have made 4 to 3.99999

    threshold = 0.73       # smallest cosine similarity of two features of the same point
    chain_threshold = 0.3  # the same for the ends of trusted chains

    def __init__(self, path: Path, device: str = "cpu"):
        self.model = _load("ALIKED", path, ("aliked-n16",), {"dkd.hw_grid"}).to(device)
        self.device = device
        self.settings = _settings(path, self.SIDE)
        self.calls = threading.Semaphore(self.MAX_CALLS)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        with self.calls:
            x, (h, w) = _resize(image, self.SIDE, self.device)
            dense, _ = self.model.extract_dense_map(x)  # (1, 128, H', W')
            rows, columns = (torch.linspace(-1, 1, n, device=self.device) + 2 * self.NUDGE / (side - 1)
                             for n, side in zip((h, w), dense.shape[2:], strict=True))
            positions = torch.cartesian_prod(rows, columns).flip(-1)  # (h * w, 2), (x, y)
            out = [self.model.desc_head(dense, [part])[0][0] for part in positions.split(self.POSITIONS)]
        return torch.cat(out).reshape(h, w, -1).half().cpu().numpy()


class XFeatFeatures:
    """`image -> features`: `(H, W, 3)` uint8 RGB to L2-normalized XFeat descriptors `(h, w, 64)` float16.

    The network's map has a cell for each 8 x 8 pixels. It is interpolated bicubically, with the center of a cell at the
    center of its pixels, as in XFeat's own look-up at keypoints. Corner features lie on corner pixels. path: the
    weights file. Safe to call from several threads. UserError if the file is damaged or has other weights."""

    SIDE = 512   # the image is resized to this shorter side, in pixels
    MULTIPLE = 32  # sides of the network's input are multiples of it
    MARGIN = 16  # smallest padding of the image, in pixels: the outer cells are affected by the network's zero padding

    threshold = 0.87       # smallest cosine similarity of two features of the same point
    chain_threshold = 0.7  # the same for the ends of trusted chains

    def __init__(self, path: Path, device: str = "cpu"):
        self.model = _load("XFeatModel", path).to(device)
        self.device = device
        self.settings = _settings(path, self.SIDE)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        x, (h, w) = _resize(image, self.SIDE, self.device)
        bottom, right = (self.MARGIN + -(n + 2 * self.MARGIN) % self.MULTIPLE for n in x.shape[2:])
        x = F.pad(x, (self.MARGIN, right, self.MARGIN, bottom), mode="replicate")
        cells = F.normalize(self.model(x)[0], dim=1)  # (1, 64, padded H' / 8, padded W' / 8)
        rows, columns = ((torch.arange(n, device=self.device) * STRIDE + self.MARGIN + 0.5) * 2 / side - 1
                         for n, side in zip((h, w), x.shape[2:], strict=True))
        positions = torch.cartesian_prod(rows, columns).flip(-1).view(1, h, w, 2)  # (x, y)
        features = F.grid_sample(cells, positions, mode="bicubic", align_corners=False)[0]  # (64, h, w)
        return F.normalize(features, dim=0).permute(1, 2, 0).half().cpu().numpy()


def _resize(image: np.ndarray, side: int, device: str) -> tuple[Tensor, tuple[int, int]]:
    """The image in [0, 1], resized to a shorter side of about `side` pixels: `(1, 3, H', W')`; and its grid (h, w)."""
    zoom = min(side / min(image.shape[:2]), MAX_ASPECT * side / max(image.shape[:2]))
    h, w = (max(round((n - 1) * zoom / STRIDE), 1) + 1 for n in image.shape[:2])
    x = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)
    size = ((h - 1) * STRIDE + 1, (w - 1) * STRIDE + 1)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True), (h, w)  # corner pixels stay at the corners


def _settings(path: Path, side: int) -> dict:
    """What the features depend on besides the images."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"weights": f"{path.name} {digest[:16]}", "side": side}


def _load(name: str, path: Path, arguments: tuple = (), constants: frozenset | set = frozenset()) -> torch.nn.Module:
    """The model `name` of kornia.feature with the weights of a file, in evaluation mode, without gradients.

    arguments: of the model; constants: names of tensors that weights files do not have. UserError if kornia is too old,
    or if the file is damaged or does not have exactly the model's weights."""
    import kornia  # imported here: it takes a second

    if not hasattr(kornia.feature, name):
        raise UserError(f"kornia {kornia.__version__} has no {name}: pip install 'kornia>=0.8.3'")
    model = getattr(kornia.feature, name)(*arguments)
    try:
        state = tensors_by_name(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a weights file, or damaged ({error}): download it again") from error
    try:
        wrong = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()[:120]
        raise UserError(f"{path} does not fit {name}: {why}; download it again") from error
    differing = sorted({*wrong.missing_keys, *wrong.unexpected_keys} - constants)
    if differing:
        raise UserError(f"{path} has not the weights of {name}: {differing[0]} and {len(differing) - 1} more are "
                        "missing or unknown; download it again")
    return model.eval().requires_grad_(False)
