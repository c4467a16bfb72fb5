"""Filters that decide which flow is reliable (OmniMotion, section 4.1 and supplement).

Notation
    a, b      two frames; flow_ab and flow_ba are the flows between them, (H, W, 2) pixels
    p, q      a pixel of a, and where flow_ab leads in b
    p', q'    p after the cycle a -> b -> a, and where flow_ab leads from p'
    interval  number of frames from a to b

Cycle-consistent flow over APPEARANCE_INTERVAL or more frames is tentative where the features at its ends differ.
"""

import numpy as np
import torch
from torch import Tensor

from common.geometry import CHUNK_VALUES, bilinear, length, pixel_grid, similarity, similarity_on_cpu

APPEARANCE_INTERVAL = 3  # interval from which on appearance is compared and occluded points are dropped
OCCLUSION_FACTOR = 1.5   # |p - p'| of an occluded point is at least this multiple of the cycle threshold
BYTES_PER_PIXEL = 120    # memory of the filters, measured


def cycle_flags(flow_ab: Tensor, flow_ba: Tensor, cycle_th: float) -> tuple[Tensor, Tensor]:
    """Cycle and occlusion flags, `(H, W)` bool each, of the pixels of frame a from the flows `(H, W, 2)`.

    cycle:     |p - p'| < cycle_th
    occlusion: p is hidden in b, but its position q is reliable: q is inside the frame, |p - p'| > 1.5 cycle_th (the
               flow back is that of the surface in front) and |q - q'| < cycle_th"""
    H, W = flow_ab.shape[:2]
    p = pixel_grid((H, W), flow_ab.device)
    q = p + flow_ab
    first_error = flow_ab + bilinear(flow_ba, q)  # p' - p
    p_again = p + first_error
    second_error = p_again + bilinear(flow_ab, p_again) - q  # q' - q
    d1 = length(first_error)
    d2 = length(second_error)
    inside = (q >= 0).all(dim=-1) & (q <= flow_ab.new_tensor([W - 1, H - 1])).all(dim=-1)
    return d1 < cycle_th, (d2 < cycle_th) & (d1 > OCCLUSION_FACTOR * cycle_th) & inside


def filter_flow(flow_ab: np.ndarray, flow_ba: np.ndarray, features_a: np.ndarray, features_b: np.ndarray,
                interval: int, cycle_th: float, feature_th: float, device: str = "cpu",
                kept: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Cycle and occlusion flags, `(H, W)` bool each, of the flow from a to b. Tentative pixels have both.

    flow_ab, flow_ba:       `(H, W, 2)` pixels
    features_a, features_b: of the frames, `(h, w, c)`
    cycle_th, feature_th:   pixels, and cosine similarity
    device:                 where to compute
    kept:                   `(H, W)` bool: pixels that get flags; None: all"""
    flow = torch.from_numpy(flow_ab).to(device)
    size = flow_ab.shape[:2]
    cycle, occlusion = cycle_flags(flow, torch.from_numpy(flow_ba).to(device), cycle_th)
    if kept is not None:
        cycle &= torch.from_numpy(kept).to(device)
        occlusion &= torch.from_numpy(kept).to(device)
    if interval < APPEARANCE_INTERVAL:
        return cycle.cpu().numpy(), occlusion.cpu().numpy()
    p = pixel_grid(size, device)[cycle]  # (n, 2)
    tentative = torch.zeros_like(cycle)
    tentative[cycle] = ~(compare(features_a, features_b, p, p + flow[cycle], size) > feature_th)
    return cycle.cpu().numpy(), tentative.cpu().numpy()


def compare(features_a: np.ndarray, features_b: np.ndarray, p: Tensor, q: Tensor, size: tuple[int, int]) -> Tensor:
    """Cosine similarity `(n,)` of features `(h, w, c)` of frame a at points p `(n, 2)` and of frame b at q `(n, 2)`, on
    the device of the points."""
    if p.device.type == "cpu":
        return torch.from_numpy(similarity_on_cpu(features_a, features_b, p.numpy(), q.numpy(), size))
    a, b = (torch.from_numpy(features).to(p.device).float() for features in (features_a, features_b))
    return similarity(a, b, p, q, size)


def filter_bytes(size: tuple[int, int]) -> int:
    """Memory in bytes of the filters, or of one step of a chain, for frames of `size` (H, W)."""
    return BYTES_PER_PIXEL * size[0] * size[1] + 5 * 4 * CHUNK_VALUES
