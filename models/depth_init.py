"""A start near known depths: the canonical field is fitted to the depth prior of one frame before training.

Notation
    N, K   pixels a step, samples a ray
    z      depth of the prior at a pixel                      (1, N)
    w      compositing weights along the pixel's ray          (1, N, K)
At the start the maps between frames and canonical volume are near the identity, so that one frame stands for all.
"""

import torch
from torch import Tensor

from models.omnimotion import OmniMotion
from models.rendering import ray_depths

STEPS, POINTS, LEARNING_RATE = 100, 512, 3e-3


def start_near(model: OmniMotion, prior: Tensor, frame: int, generator: torch.Generator) -> None:
    """Train the field alone until the light of frame `frame` is absorbed near depths `prior` `(H, W)`, in the model's
    range (0 nearest): the weight of the sample that is nearest to the prior is maximised (as in DS-NeRF, Deng et al.,
    CVPR 2022, with one sample for the surface). `generator` draws pixels."""
    H, W = model.size
    device = next(model.parameters()).device
    samples = ray_depths(model.config.num_samples_ray, model.config.min_depth, model.config.max_depth, prior)  # (K,)
    nearest = (prior[..., None] - samples).abs().argmin(-1)  # (H, W)
    ids = torch.tensor([frame], device=device)
    optimiser = torch.optim.Adam(model.field.parameters(), LEARNING_RATE)
    for _ in range(STEPS):
        flat = torch.randint(H * W, (1, POINTS), generator=generator)
        pixels = torch.stack([flat % W, flat // W], dim=-1).float().to(device)  # (1, N, 2)
        with torch.no_grad():
            x = model.lift(pixels)  # (1, N, K, 3)
            u = model.maps(ids).to_canonical(x.flatten(1, 2)).view_as(x)
        w = model.render(u)[1]
        loss = -(w.gather(-1, nearest.view(-1)[flat].to(device)[..., None]) + 1e-3).log().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
