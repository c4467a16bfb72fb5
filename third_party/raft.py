"""RAFT optical flow (Teed and Deng, ECCV 2020), large and small: a re-implementation of the paper's architecture.

Notation
    B, H, W   pairs, height and width of the padded images (multiples of 8)
    h, w      H / 8, W / 8: size of the grid on which flow is refined
    C         channels of the matched features: 256 (large) or 128 (small)
    r         radius of the correlation lookup: 4 (large) or 3 (small)
    L         levels of the correlation lookup: 4
    flow      (B, 2, h, w) in grid steps, from image a to image b
Parameters have the names of the authors' code (princeton-vl/RAFT), so its checkpoints load unchanged; torchvision's are
renamed in third_party/raft_flow.py. `encode` and `match` are separate, so that each frame is encoded once, not once for
every pair.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.geometry import pixel_grid
from third_party.correlation import LEVELS, AllPairs, OnDemand

CORRELATIONS = {"all_pairs": AllPairs, "on_demand": OnDemand}
CONTEXT = {"large": (128, 128), "small": (96, 64)}  # channels of the GRU's hidden state and of its context input
RADIUS = {"large": 4, "small": 3}  # of the correlation lookup, in grid steps of the level


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or with `bottleneck` (small model) 1x1, 3x3 and 1x1."""

    def __init__(self, in_dim: int, out_dim: int, stride: int, norm: type[nn.Module], bottleneck: bool):
        super().__init__()
        quarter = out_dim // 4
        layers = ([(in_dim, quarter, 1, 1), (quarter, quarter, 3, stride), (quarter, out_dim, 1, 1)] if bottleneck
                  else [(in_dim, out_dim, 3, stride), (out_dim, out_dim, 3, 1)])
        for k, (dim, out, size, step) in enumerate(layers, 1):
            self.add_module(f"conv{k}", nn.Conv2d(dim, out, size, step, size // 2))
            self.add_module(f"norm{k}", norm(out))
        self.layers = len(layers)
        self.downsample = nn.Identity() if stride == 1 else nn.Sequential(
            nn.Conv2d(in_dim, out_dim, 1, stride), norm(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for k in range(1, self.layers + 1):
            y = F.relu(getattr(self, f"norm{k}")(getattr(self, f"conv{k}")(y)))
        return F.relu(self.downsample(x) + y)


class Encoder(nn.Module):
    """Images `(B, 3, H, W)` in [-1, 1] to features `(B, out_dim, h, w)`."""

    def __init__(self, size: str, out_dim: int, norm: type[nn.Module]):
        super().__init__()
        first, *dims = (32, 32, 64, 96) if size == "small" else (64, 64, 96, 128)
        self.conv1 = nn.Conv2d(3, first, 7, 2, 3)
        self.norm1 = norm(first)
        for k, (in_dim, dim) in enumerate(zip([first, *dims], dims, strict=False), 1):
            self.add_module(f"layer{k}", nn.Sequential(
                Block(in_dim, dim, 1 if k == 1 else 2, norm, size == "small"),
                Block(dim, dim, 1, norm, size == "small")))
        self.conv2 = nn.Conv2d(dims[-1], out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class MotionEncoder(nn.Module):
    """Looked-up correlations `(B, L (2r+1)^2, h, w)` and flow to motion features; the last two channels are flow."""

    def __init__(self, size: str):
        super().__init__()
        looked_up = LEVELS * (2 * RADIUS[size] + 1) ** 2
        if size == "small":
            self.convc1 = nn.Conv2d(looked_up, 96, 1)
            self.convf1 = nn.Conv2d(2, 64, 7, padding=3)
            self.convf2 = nn.Conv2d(64, 32, 3, padding=1)
            self.conv = nn.Conv2d(128, 80, 3, padding=1)
        else:
            self.convc1 = nn.Conv2d(looked_up, 256, 1)
            self.convc2 = nn.Conv2d(256, 192, 3, padding=1)
            self.convf1 = nn.Conv2d(2, 128, 7, padding=3)
            self.convf2 = nn.Conv2d(128, 64, 3, padding=1)
            self.conv = nn.Conv2d(256, 126, 3, padding=1)
        self.size = size

    def forward(self, flow: Tensor, correlation: Tensor) -> Tensor:
        c = F.relu(self.convc1(correlation))
        if self.size == "large":
            c = F.relu(self.convc2(c))
        f = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat([F.relu(self.conv(torch.cat([c, f], 1))), flow], 1)


class ConvGRU(nn.Module):
    """Convolutional GRU: one 3x3 step (small), or a 1x5 and a 5x1 step (large)."""

    def __init__(self, size: str, hidden: int, in_dim: int):
        super().__init__()
        self.steps = {"": (3, 3)} if size == "small" else {"1": (1, 5), "2": (5, 1)}
        for suffix, kernel in self.steps.items():
            for gate in "zrq":
                self.add_module(f"conv{gate}{suffix}", nn.Conv2d(
                    hidden + in_dim, hidden, kernel, padding=(kernel[0] // 2, kernel[1] // 2)))

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        for suffix in self.steps:
            z, r, q = (getattr(self, f"conv{gate}{suffix}") for gate in "zrq")
            both = torch.cat([hidden, x], 1)
            update = torch.sigmoid(z(both))
            reset = torch.sigmoid(r(both))
            hidden = (1 - update) * hidden + update * torch.tanh(q(torch.cat([reset * hidden, x], 1)))
        return hidden


class FlowHead(nn.Module):
    """Hidden state to a correction of the flow."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(hidden, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x)))


class UpdateBlock(nn.Module):
    """One refinement: motion encoder, GRU and flow head. `mask` predicts the large model's upsampling weights."""

    def __init__(self, size: str):
        super().__init__()
        hidden, context = CONTEXT[size]
        self.encoder = MotionEncoder(size)
        self.gru = ConvGRU(size, hidden, context + (82 if size == "small" else 128))
        self.flow_head = FlowHead(hidden, 128 if size == "small" else 256)
        self.mask = None if size == "small" else nn.Sequential(
            nn.Conv2d(hidden, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 64 * 9, 1))

    def forward(self, hidden: Tensor, context: Tensor, correlation: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.gru(hidden, torch.cat([context, self.encoder(flow, correlation)], 1))
        return hidden, self.flow_head(hidden)


class RAFT(nn.Module):
    """The network, for inference only. size: "large" or "small"."""

    def __init__(self, size: str):
        super().__init__()
        self.size = size
        out_dim = 128 if size == "small" else 256
        self.fnet = Encoder(size, out_dim, nn.InstanceNorm2d)
        self.cnet = Encoder(size, sum(CONTEXT[size]), nn.Identity if size == "small" else nn.BatchNorm2d)
        self.update_block = UpdateBlock(size)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Padded images `(B, 3, H, W)` in [0, 255] to matching features `(B, C, h, w)` and context `(B, c, h, w)`."""
        x = images / 127.5 - 1
        return self.fnet(x), self.cnet(x)

    def match(self, features_a: Tensor, context_a: Tensor, features_b: Tensor, iterations: int = 20,
              start: Tensor | None = None, correlation: str = "all_pairs") -> tuple[Tensor, Tensor]:
        """Flow from a to b: `(B, 2, h, w)` in grid steps and `(B, 2, H, W)` in pixels.

        start: initial flow `(B, 2, h, w)`, default 0; correlation: "all_pairs" (fast) or "on_demand" (less memory)."""
        in_float32 = torch.autocast(features_a.device.type, enabled=False)  # correlations are float32, as in the paper
        with in_float32:
            look_up = CORRELATIONS[correlation](features_a.float(), features_b.float(), RADIUS[self.size])
        hidden, context = context_a.split(CONTEXT[self.size], dim=1)
        hidden = torch.tanh(hidden)
        context = torch.relu(context)
        grid = pixel_grid(context.shape[-2:], context.device).permute(2, 0, 1).contiguous()  # (2, h, w)
        flow = torch.zeros_like(grid).repeat(len(context), 1, 1, 1) if start is None else start
        for _ in range(iterations):
            with in_float32:
                correlations = look_up(grid + flow)
            hidden, step = self.update_block(hidden, context, correlations, flow)
            flow = flow + step.float()
        return flow, self._upsample(flow, hidden)

    def _upsample(self, flow: Tensor, hidden: Tensor) -> Tensor:
        """Flow `(B, 2, H, W)` in pixels: bilinear (small), or convex combinations of 3x3 grid cells (section 3.3)."""
        B, _, h, w = flow.shape
        if self.update_block.mask is None:
            return 8 * F.interpolate(flow, scale_factor=8, mode="bilinear", align_corners=True)
        weights = (0.25 * self.update_block.mask(hidden)).float().view(B, 1, 9, 8, 8, h, w).softmax(2)
        cells = F.unfold(8 * flow, 3, padding=1).view(B, 2, 9, 1, 1, h, w)
        fine = (weights * cells).sum(2)  # (B, 2, 8, 8, h, w)
        return fine.permute(0, 1, 4, 2, 5, 3).reshape(B, 2, 8 * h, 8 * w)
