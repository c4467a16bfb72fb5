"""Which flow to believe (OmniMotion, section 4.1 and supplement).

Notation
    a, b     frames; flow_ab and flow_ba (H, W, 2) pixels between them
    d1       |p - p'|, p' after one cycle a -> b -> a, pixels
    d2       |q - q'|, q in b before and q' after the second cycle, pixels
    interval frames between a and b
"""

import numpy as np
import torch
from torch import Tensor

from common.geometry import NUMBERS, bilinear, pixel_grid, similarity

BYTES_A_PIXEL = 120  # that the filters take, measured
APPEARANCE_INTERVAL = 3  # from here on appearance is checked; below, occluded points are kept
OCCLUSION_FACTOR = 1.5   # an occluded point misses the first cycle by this many thresholds


def cycle_flags(flow_ab: Tensor, flow_ba: Tensor, cycle_th: float) -> tuple[Tensor, Tensor]:
    """Flags of the pixels of frame a from flows `(H, W, 2)`, `(H, W)` bool each.

    cycle: d1 < cycle_th. occlusion: hidden in b, but the flow there can be relied on: d1 > 1.5 cycle_th (what covers
    the point leads back elsewhere) and d2 < cycle_th, inside b."""
    H, W = flow_ab.shape[:2]
    grid = pixel_grid((H, W), flow_ab.device)
    q = grid + flow_ab
    cycle_error = flow_ab + bilinear(flow_ba, q)
    back = grid + cycle_error
    d1, d2 = cycle_error.norm(dim=-1), (back + bilinear(flow_ab, back) - q).norm(dim=-1)
    inside = (q >= 0).all(dim=-1) & (q <= flow_ab.new_tensor([W - 1, H - 1])).all(dim=-1)
    return d1 < cycle_th, (d2 < cycle_th) & (d1 > OCCLUSION_FACTOR * cycle_th) & inside


def filter_flow(flow_ab: np.ndarray, flow_ba: np.ndarray, features_a: np.ndarray, features_b: np.ndarray,
                interval: int, cycle_th: float, feature_th: float,
                device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """Cycle and occlusion flags `(H, W)` bool of the flow from a to b.

    flows `(H, W, 2)` pixels, features `(h, w, c)`, thresholds in pixels and cosine similarity; device: where to
    compute."""
    flow, size = torch.from_numpy(flow_ab).to(device), flow_ab.shape[:2]
    cycle, occlusion = cycle_flags(flow, torch.from_numpy(flow_ba).to(device), cycle_th)
    if interval < APPEARANCE_INTERVAL:
        return cycle.cpu().numpy(), occlusion.cpu().numpy()
    p = pixel_grid(size, device)[cycle]  # (n, 2)
    a, b = (torch.from_numpy(features).to(device).float() for features in (features_a, features_b))
    cycle[cycle.clone()] = similarity(a, b, p, p + flow[cycle], size) > feature_th
    return cycle.cpu().numpy(), np.zeros(size, bool)


def filter_bytes(size: tuple[int, int]) -> int:
    """Memory that the filters, or a step of a chain, take for frames of `size` (H, W)."""
    return BYTES_A_PIXEL * size[0] * size[1] + 5 * 4 * NUMBERS
