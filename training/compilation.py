"""`--compile`: the model's prediction and the losses of a step as one program of torch.compile."""

from collections.abc import Callable

import torch

from common.errors import UserError
from losses.losses import SingleProcess
from losses.objective import pair_objective


def compiled_pair_objective(backend: str, deform: str, device: torch.device, processes: SingleProcess) -> Callable:
    """`losses.objective.pair_objective` as one graph; inductor uses CUDA graphs on a GPU.

    Loss weights become tensors, because torch.compile compiles again for a new number. deform: the option. UserError
    where the step cannot be compiled."""
    if deform == "warp":  # the inverse iterates until it has converged, which is no fixed graph
        raise UserError("--compile does not work with --deform warp (configs/fast.txt): leave it out")
    if processes.count > 1:
        raise UserError(f"--compile works with one process, this run has {processes.count}: leave it out")
    mode = "reduce-overhead" if backend == "inductor" and device.type == "cuda" else None
    program = torch.compile(pair_objective, fullgraph=True, backend=backend, mode=mode)

    def call(model, batch, jitter, near_share, weights, padding, processes):
        weights = {name: torch.full((), value, dtype=torch.float32, device=device) for name, value in weights.items()}
        torch.compiler.cudagraph_mark_step_begin()
        try:
            prediction, total, terms = program(model, batch, jitter, near_share, weights, padding, processes)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            why = str(error).strip().splitlines()[0]
            raise UserError(f"PyTorch cannot compile the step ({why}): leave --compile {backend} out") from error
        # the next step overwrites the memory of a CUDA graph
        return prediction, total, {name: value.clone() for name, value in terms.items()}

    return call
