"""The forward pass and the losses of a step: what `--compile` makes one program of."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import UserError
from losses.losses import Alone, objective
from models.omnimotion import OmniMotion, PairPrediction


def forward(model: OmniMotion, batch, jitter: Tensor, near_share: float, weights: dict[str, float | Tensor],
            padding: float, whole: Alone) -> tuple[PairPrediction, Tensor, dict[str, Tensor]]:
    """Predictions for a `loaders.pair_sampler.Batch`, their total loss and its terms; `weights` and the rest are those
    of `losses.losses.objective`, `jitter` and `near_share` those of `OmniMotion.predict_pairs`."""
    prediction = model.predict_pairs(batch.pixels1, batch.ids1, batch.ids2, jitter, near_share)
    depth_range = (model.config.min_depth, model.config.max_depth)
    return prediction, *objective(prediction, batch, weights, model.size, depth_range, padding, whole)


def compiled_forward(backend: str, device: torch.device, whole: Alone) -> Callable:
    """`forward` by torch.compile, as one graph without a return to Python; on CUDA, inductor's goes into CUDA graphs.
    Loss weights become tensors, since a new number would be a new program. UserError where it cannot be compiled."""
    if whole.count > 1:
        raise UserError(f"--compile is for one process, here are {whole.count}: leave it out")
    mode = "reduce-overhead" if backend == "inductor" and device.type == "cuda" else None
    program = torch.compile(forward, fullgraph=True, backend=backend, mode=mode)

    def call(model, batch, jitter, near_share, weights, padding, whole):
        weights = {name: torch.full((), value, dtype=torch.float32, device=device) for name, value in weights.items()}
        torch.compiler.cudagraph_mark_step_begin()
        try:
            prediction, total, terms = program(model, batch, jitter, near_share, weights, padding, whole)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            why = str(error).strip().splitlines()[0]
            raise UserError(f"PyTorch cannot compile the step ({why}): leave --compile {backend} out") from error
        return prediction, total, {name: value.clone() for name, value in terms.items()}  # they outlive the step

    return call
