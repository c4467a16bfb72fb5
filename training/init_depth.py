"""A start near known depths: the canonical field is fitted to the depth prior of one frame before training.

Notation
    M, K   pixels of the frame that are used, samples a ray
    u      canonical samples of their rays                    (M, K, 3)
    w      compositing weights along a ray                    (..., K)
At the start the maps between frames and canonical volume are near the identity, so that one frame stands for all.
"""

import torch
from torch import Tensor

from models.omnimotion import OmniMotion
from models.rendering import ray_depths

STEPS, PIXELS, BATCH = 100, 2_048, 256
LEARNING_RATES = {"gabor": 3e-3, "grid": 1e-1}  # by the kind of field


def start_near(model: OmniMotion, prior: Tensor, frame: int, generator: torch.Generator) -> None:
    """Train the field alone until the light of frame `frame` is absorbed near depths `prior` `(H, W)`, in the model's
    range (0 nearest): the weight of the sample that is nearest to the prior is maximized (as in DS-NeRF, Deng et al.,
    CVPR 2022, with one sample for the surface). `generator` draws pixels."""
    H, W = model.size
    device = next(model.parameters()).device
    flat = torch.randint(H * W, (PIXELS,), generator=generator)
    pixels = torch.stack([flat % W, flat // W], dim=-1).float().to(device)  # (M, 2)
    samples = ray_depths(model.config.num_samples_ray, model.config.min_depth, model.config.max_depth, pixels)  # (K,)
    z = prior.flatten()[flat].to(device)  # (M,)
    surface = (z[:, None] - samples).abs().argmin(-1, keepdim=True)  # (M, 1)
    with torch.no_grad():
        x = model.lift(pixels[None])  # (1, M, K, 3)
        u = model.maps(torch.tensor([frame], device=device)).to_canonical(x.flatten(1, 2)).view_as(x)[0]
    optimizer = torch.optim.Adam(model.field.parameters(), LEARNING_RATES[model.config.field])
    for _ in range(STEPS):
        rows = torch.randint(PIXELS, (BATCH,), generator=generator).to(device)
        w = model.render(u[rows])[1]  # (BATCH, K)
        loss = -(w.gather(-1, surface[rows]) + 1e-3).log().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
