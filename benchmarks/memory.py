"""Memory that a training step keeps for its backward pass: python -m benchmarks.memory

Counts the bytes of all tensors that autograd saves without activation checkpointing, each storage once. The count
equals that on a GPU but needs no GPU. The backward pass itself also needs memory for a few of these tensors at a time.
"""

import torch

from common.cli import Parser
from configs.options import parse
from evaluation.tables import markdown
from models.factory import new_model, pick_device
from models.kernels.backend import Products, set_products
from training.optimizers import new_optimizers

SIZE, FRAMES = (480, 854), 60  # pixels (H, W), number of frames


def saved_bytes(model, options) -> int:
    """Bytes of the tensors that autograd saves in the forward pass of a training step."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(options.num_pairs)
    pixels = torch.rand(options.num_pairs, options.num_pts, 2) * 400
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        jitter = torch.rand(options.num_pairs, 1, model.config.num_samples_ray)
        prediction = model.predict_pairs(pixels, ids, ids + 1, jitter)
    assert prediction.pixels.requires_grad
    return sum(storages.values())


def main() -> None:
    torch.set_flush_denormal(True)  # as train.py does
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default="default,original", help="comma-separated presets")
    args = parser.parse_args()
    rows = []
    for preset in args.presets.split(","):
        for precision in ("fp32", "bf16"):
            options = parse("train", ["--config", f"configs/{preset}.txt", "--precision", "fp32", "--device", "cpu"])
            model = new_model(options, FRAMES, SIZE, pick_device("cpu"))
            set_products(model, Products(torch.bfloat16 if precision == "bf16" else None))  # as on a GPU
            model.recompute_above = 1 << 62
            new_optimizers(model, options)
            parameters = 4 * 4 * sum(p.numel() for p in model.parameters())  # value, gradient, two moments
            rows.append([preset, precision, f"{saved_bytes(model, options) / 2**30:.2f}", f"{parameters / 2**30:.3f}"])
    print(markdown(["preset", "products", "kept for the backward pass, GiB", "parameters, gradients and Adam, GiB"],
                   rows))


if __name__ == "__main__":
    main()
