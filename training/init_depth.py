"""Depth initialization (`--init_depth`): fit the canonical field to the depth prior of one frame before training.

Notation
    M, K   number of pixels drawn from the frame, samples per ray
    u      canonical positions of the samples                 (M, K, 3)
    w      compositing weights along a ray                    (..., K)
Before training the maps between frames and the canonical volume are near the identity, so one frame is enough.
"""

import torch
from torch import Tensor

from models.omnimotion import OmniMotion
from models.rendering import ray_depths

STEPS = 100      # optimizer steps
PIXELS = 2_048   # pixels drawn from the frame
BATCH = 256      # pixels per step
LEARNING_RATES = {"gabor": 3e-3, "images": 1e-1, "grid": 1e-1}  # of Adam, by the kind of field


def fit_field_to_depth(model: OmniMotion, prior: Tensor, frame: int, generator: torch.Generator) -> None:
    """Train only the field, for STEPS steps, so that rays of frame `frame` are absorbed near the depths `prior`
    `(H, W)`.

    `prior` is in the model's depth range, 0 nearest. The loss maximizes the weight of the sample nearest to the prior
    (as in DS-NeRF, Deng et al., CVPR 2022, with one sample for the surface). `generator` draws the pixels."""
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
