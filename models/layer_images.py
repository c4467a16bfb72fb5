"""Canonical field of configs/fast.txt: an image of color and density per motion layer, as grids of several resolutions
(Sun et al., "Direct Voxel Grid Optimization", CVPR 2022, in two dimensions).

Notation
    u          canonical point
    S          layers, equal ranges of depth
    box        center and half sides of the part of the canonical plane that a layer's image covers  (S, 2, 2)
    level      a grid (S, 4, R, R): color logits and density at R x R vertices over the layer's box
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.grid_deformation import layer_index
from models.kernels.images import layer_images

SIDES = (17, 33, 65, 129, 257)  # R of each level
HALF_SIDE = 1.6                 # of a box that `set_boxes` has not set
INITIAL_STD = 0.1               # standard deviation of the coarsest level's initial values
DENSITY_SCALE = 16.0            # density = DENSITY_SCALE * softplus(value - 1)
FRONT_DENSITY_BIAS = -2.0       # initial density bias, before the softplus
BACK_DENSITY_BIAS = 2.0         # the same of the last layer, which is opaque
EMPTY_DENSITY_BIAS = -3.0       # initial density bias where a layer is known to be empty
SEEN_DENSITY_BIAS = 1.5         # the same where a layer is known to be visible


class LayerImages(nn.Module):
    """Sum over all levels at a canonical point; color = sigmoid, density = DENSITY_SCALE * softplus."""

    def __init__(self, depth_range: tuple[float, float] = (0.0, 2.0), num_layers: int = 2):
        super().__init__()
        self.near = depth_range[0]
        self.range = depth_range[1] - depth_range[0]
        self.num_layers = num_layers
        boxes = torch.stack([torch.zeros(num_layers, 2), torch.full((num_layers, 2), HALF_SIDE)], dim=1)
        self.register_buffer("boxes", boxes)  # (S, 2, 2): center, half sides
        self.levels = nn.ParameterList(nn.Parameter(torch.zeros(num_layers, 4, R, R)) for R in SIDES)
        nn.init.normal_(self.levels[0], std=INITIAL_STD)
        with torch.no_grad():
            self.levels[0][:-1, 3] += FRONT_DENSITY_BIAS
            self.levels[0][-1, 3] += BACK_DENSITY_BIAS

    @property
    def side(self) -> int:
        """Vertices of the finest level along x and y."""
        return SIDES[-1]

    def set_boxes(self, low: Tensor, high: Tensor) -> None:
        """Set what the images cover: from `low` to `high`, `(S, 2)` each."""
        self.boxes.copy_(torch.stack([(low + high) / 2, (high - low) / 2], dim=1))

    def place(self, u: Tensor) -> Tensor:
        """Positions `(..., 2)` in the layers' images, in [-1, 1] inside, of canonical points `(..., 3)`."""
        center, half = self.boxes[self._layer(u)].unbind(-2)
        return (u[..., :2] - center) / half

    def vertices_of(self, u: Tensor) -> Tensor:
        """x and y `(..., 2)` of canonical points `(..., 3)` in units of the finest level's vertices, [0, side - 1]."""
        return (self.place(u).clamp(-1, 1) + 1) / 2 * (self.side - 1)

    @torch.no_grad()
    def start_at(self, votes: Tensor) -> None:
        """Initialize the densities of all layers but the last of a new field.

        `votes` `(S - 1, side, side)`, rows along y: -1 where the layer is known to be empty, 1 where it is known to be
        visible, 0 unknown."""
        votes = votes.to(self.levels[-1].device)
        self.levels[-1][:-1, 3] += (SEEN_DENSITY_BIAS * votes.clamp(min=0) - EMPTY_DENSITY_BIAS * votes.clamp(max=0))

    def _layer(self, u: Tensor) -> Tensor:
        return layer_index(u[..., 2], self.near, self.range, self.num_layers)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Canonical points `(..., 3)` -> rgb `(..., 3)` in [0, 1] and sigma `(...)` >= 0."""
        out = layer_images(self.place(u).reshape(-1, 2), self._layer(u).flatten(), list(self.levels))
        out = out.reshape(*u.shape[:-1], 4)
        return torch.sigmoid(out[..., :3]), DENSITY_SCALE * F.softplus(out[..., 3] - 1)
