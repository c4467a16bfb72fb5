"""A checkpoint that was written before the repository was reorganized still loads and computes the same."""

import lzma
from pathlib import Path
from types import SimpleNamespace

import torch

from loaders.checkpoint import read_checkpoint
from models.factory import checkpoint_num_frames, model_from_checkpoint

FILE = Path(__file__).parent / "data" / "checkpoint_format_before_2.pth.xz"  # 8 frames of 48x64, 4 steps
OPTIONS = SimpleNamespace(num_samples_ray=8, min_depth=0.0, max_depth=2.0, precision="fp32", mlp_backend="torch")


def test_an_older_checkpoint_gives_the_correspondences_that_it_gave(tmp_path):
    path = tmp_path / "model_000004.pth"
    path.write_bytes(lzma.decompress(FILE.read_bytes()))
    checkpoint = read_checkpoint(path)
    assert checkpoint_num_frames(checkpoint, path) == 8
    model = model_from_checkpoint(checkpoint, (48, 64), OPTIONS, torch.device("cpu"))
    pixels = torch.tensor([[[5.0, 6.0], [40.0, 20.0]]])
    with torch.no_grad():
        mapped, depth = model.correspond(pixels, torch.tensor([1]), torch.tensor([6]), False)
    expected = torch.tensor([[[5.3899, 4.7462], [38.4733, 18.9214]]])  # computed by the code that wrote the file
    torch.testing.assert_close(mapped, expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(depth, torch.tensor([[0.4664, 0.5463]]), rtol=0, atol=2e-4)
