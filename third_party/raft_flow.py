"""Flow between numpy images with RAFT, and loading of RAFT's weights files.

Notation
    encoding  what is computed once per frame: features for matching (C, h, w), context (c, h, w), frame size (H, W)
    start     initial flow of the refinement on RAFT's grid (2, h, w): the result of the pair with the same source frame
              and the next nearer target, as in OmniMotion; None: zero
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from common.torch_files import tensors_by_name
from third_party.raft import RAFT

MIN_SIDE = 128  # pixels, required by the coarsest level of the correlation; smaller frames are enlarged
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RaftOptions:
    """Settings of RAFT; the flow depends on all of them except `device` and `batch`."""
    iterations: int = 20
    correlation: str = "all_pairs"  # all_pairs | on_demand
    precision: str = "float32"      # of the networks, a key of PRECISIONS; correlations are always float32
    warm: bool = True               # use the `start` of each pair
    device: str = "cpu"
    batch: int = 1                  # pairs per call


class RaftFlow:
    """Flow between encoded frames: a `preprocessing.flow.FlowModel`.

    Safe to call from several threads. UserError if the file at `path` is damaged or has no RAFT weights."""

    spill = True  # computing an encoding again takes longer than reading it from the disk

    def __init__(self, path: Path, options: RaftOptions):
        self.model = load_raft(path).to(options.device)
        self.options = options
        self.warm = options.warm
        self.batch = options.batch
        self.settings = {
            "weights": f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}",
            "iterations": options.iterations, "correlation": options.correlation, "precision": options.precision,
            "warm_start": options.warm}

    def working_bytes(self, size: tuple[int, int]) -> int:
        """Memory in bytes of one call of `flow` for frames of `size` (H, W), measured on the CPU and rounded up."""
        H, W = _padded_size(size)
        cells = (H // 8) * (W // 8)
        volume = cells * cells * 4 * 4 // 3 if self.options.correlation == "all_pairs" else 1 << 27
        return self.options.batch * (volume + H * W * (300 if self.model.size == "small" else 600))

    @torch.inference_mode()
    def encode(self, image: np.ndarray) -> tuple[np.ndarray, ...]:
        """The encoding of a frame `(H, W, 3)` uint8 RGB."""
        x = torch.from_numpy(image).to(self.options.device).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
        H, W = image.shape[:2]
        if min(H, W) < MIN_SIDE:
            x = F.interpolate(x, size=_enlarged((H, W)), mode="bilinear", align_corners=False)
        features, context = self._networks(self.model.encode, F.pad(x, _margins(x.shape[-2:]), mode="replicate"))
        return features[0].cpu().numpy(), context[0].cpu().numpy(), np.array([H, W])

    @torch.inference_mode()
    def flow(self, a: list[tuple], b: list[tuple], starts: list[np.ndarray | None],
             close: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
        """Flow from a[k] to b[k] for each k, as (flow `(H, W, 2)` float32 pixels, `start` of the next pair).

        `close`: whether the frames are adjacent; RAFT treats all pairs alike."""
        features_a = self._batch([features for features, _, _ in a])
        context_a = self._batch([context for _, context, _ in a])
        features_b = self._batch([features for features, _, _ in b])
        zero = np.zeros((2, *features_a.shape[-2:]), np.float32)
        start = self._batch([zero if s is None else s for s in starts])
        coarse, fine = self._networks(self.model.match, features_a, context_a, features_b, self.options.iterations,
                                      start, self.options.correlation)
        size = tuple(int(n) for n in a[0][2])
        return [(_cut(flow, size), low) for flow, low in zip(fine.cpu(), coarse.cpu().numpy(), strict=True)]

    def _batch(self, arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(self.options.device)

    def _networks(self, function, *arguments) -> tuple[Tensor, Tensor]:
        """Call `function` with autocast to the chosen precision; results in float32."""
        dtype = PRECISIONS[self.options.precision]
        with torch.autocast(torch.device(self.options.device).type, dtype, enabled=dtype != torch.float32):
            return tuple(x.float() for x in function(*arguments))


def _enlarged(size: tuple[int, int]) -> tuple[int, int]:
    """`size` (H, W) scaled up so that both sides have at least MIN_SIDE pixels."""
    zoom = max(MIN_SIDE / min(size), 1.0)
    return round(size[0] * zoom), round(size[1] * zoom)


def _padded_size(size: tuple[int, int]) -> tuple[int, int]:
    """Size (H, W) of the network's input for frames of `size`: enlarged, then rounded up to multiples of 8."""
    return tuple(-(-n // 8) * 8 for n in _enlarged(size))


def _margins(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Padding (left, right, top, bottom) to multiples of 8 with the image in the center, as in the authors' code."""
    y, x = (-n % 8 for n in size)
    return x // 2, x - x // 2, y // 2, y - y // 2


def _cut(flow: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Undo padding and enlargement: flow `(2, H, W)` of the network's input to `(H, W, 2)` at the frame's `size`."""
    large = _enlarged(size)
    left, _, top, _ = _margins(large)
    flow = flow[:, top: top + large[0], left: left + large[1]]
    if large != size:
        flow = F.interpolate(flow[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
        flow = flow * torch.tensor([size[1] / large[1], size[0] / large[0]])[:, None, None]
    return flow.permute(1, 2, 0).contiguous().numpy()


# (regular expression, replacement): torchvision's parameter names to those of `RAFT`, applied in this order
TORCHVISION_NAMES = (
    (r"^feature_encoder\.", "fnet."), (r"^context_encoder\.", "cnet."), (r"net\.convnormrelu\.0\.", "net.conv1."),
    (r"net\.convnormrelu\.1\.", "net.norm1."), (r"net\.conv\.", "net.conv2."),
    (r"\.convnormrelu(\d)\.0\.", r".conv\1."), (r"\.convnormrelu(\d)\.1\.", r".norm\1."),
    (r"\.motion_encoder\.convcorr(\d)\.0\.", r".encoder.convc\1."),
    (r"\.motion_encoder\.convflow(\d)\.0\.", r".encoder.convf\1."), (r"\.motion_encoder\.conv\.0\.", ".encoder.conv."),
    (r"\.recurrent_block\.convgru(\d)\.conv([zrq])\.", r".gru.conv\2\1."),
    (r"^mask_predictor\.convrelu\.0\.", "update_block.mask.0."), (r"^mask_predictor\.conv\.", "update_block.mask.2."))


def princeton_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of princeton-vl's or torchvision's RAFT with the parameter names of `RAFT` (princeton-vl's)."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if "feature_encoder.convnormrelu.0.weight" in state:
        renamed = {}
        for name, value in state.items():
            for pattern, new in TORCHVISION_NAMES:
                name = re.sub(pattern, new, name)
            renamed[name] = value
        is_small = not any(".convz2." in name for name in renamed)
        if is_small:  # the only step of the small model's GRU has no number in princeton-vl's names
            renamed = {re.sub(r"gru\.conv([zrq])1\.", r"gru.conv\1.", name): value for name, value in renamed.items()}
        state = renamed
    return {name: value for name, value in state.items() if ".norm3." not in name}  # norm3 is a copy of downsample.1


def load_raft(path: Path) -> RAFT:
    """The network with the weights of a file, large or small. UserError if it is damaged or has no RAFT weights."""
    try:
        state = tensors_by_name(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a weights file, or damaged ({error}): download it again") from error
    state = princeton_names(state)
    first = state.get("fnet.conv1.weight")
    if first is None or not first.ndim:
        raise UserError(f"{path} has no RAFT weights: give princeton-vl's or torchvision's file")
    model = RAFT("small" if len(first) == 32 else "large")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()[:120]
        raise UserError(f"{path} does not fit RAFT {model.size}: {why}") from error
    return model.eval().requires_grad_(False)
