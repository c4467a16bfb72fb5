"""Checkpoints and options files that earlier versions wrote still load, track the same, and can be resumed."""

import lzma
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from configs.options import parse
from inference.load_run import load_run
from loaders.checkpoint import read_checkpoint, write_checkpoint
from loaders.sequence import open_sequence
from models.factory import checkpoint_num_frames, model_from_checkpoint
from preprocessing.pipeline import Method, build_store
from preprocessing.synthetic.render import write_scene
from training.trainer import Trainer

DATA = Path(__file__).parent / "data"
OPTIONS = SimpleNamespace(num_samples_ray=8, min_depth=0.0, max_depth=2.0, precision="fp32", mlp_backend="torch")


def unpacked(name, path):
    """Decompress DATA/NAME to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.decompress((DATA / name).read_bytes()))
    return path


def test_a_checkpoint_of_coupling_layers_gives_the_correspondences_that_it_gave(tmp_path):
    """Format 2, 8 frames of 48x64, 4 steps."""
    path = unpacked("checkpoint_format_before_2.pth.xz", tmp_path / "model_000004.pth")
    checkpoint = read_checkpoint(path)
    assert checkpoint_num_frames(checkpoint, path) == 8
    model = model_from_checkpoint(checkpoint, (48, 64), OPTIONS, torch.device("cpu"))
    pixels = torch.tensor([[[5.0, 6.0], [40.0, 20.0]]])
    with torch.no_grad():
        mapped, depth = model.correspond(pixels, torch.tensor([1]), torch.tensor([6]), False)
    expected = torch.tensor([[[5.3899, 4.7462], [38.4733, 18.9214]]])  # computed by the code that wrote the file
    torch.testing.assert_close(mapped, expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(depth, torch.tensor([[0.4664, 0.5463]]), rtol=0, atol=2e-4)


def test_a_run_of_grids_with_its_options_file_is_tracked_and_resumed(tmp_path):
    """Format 2, 4 frames of 48x64, 4 steps. The options have old names (neighbour_weight, optimiser, no_reload) and 0
    and 1 for no and yes. The expected tracks were written by the code that wrote the checkpoint."""
    write_scene(tmp_path / "seq", "easy", (48, 64), 4, seed=0, num_points=8)
    path = unpacked("old_grid_checkpoint.pth.xz", tmp_path / "out" / "old_seq" / "model_000004.pth")
    config = ["--config", str(DATA / "old_grid_args.txt"), "--data_dir", str(tmp_path / "seq"), "--save_dir",
              str(tmp_path / "out")]
    checkpoint = read_checkpoint(path)
    write_checkpoint(path, replace(checkpoint, frames=None))  # rendered frames may differ by a rounding
    options = parse("eval", config)
    assert options.neighbor_weight == 0.25 and options.mask_near and not options.tensorboard and options.reload
    found = load_run(options).tracker.track(np.array([[0, 20, 20], [2, 30, 40]], np.float32))
    expected = [[[20.0, 20.0], [19.0428, 19.4571], [22.5787, 21.2860], [27.1871, 26.4605]],
                [[36.5645, 28.4691], [35.3497, 27.6908], [40.0, 30.0], [47.6083, 30.9588]]]
    np.testing.assert_allclose(found.tracks, expected, rtol=0, atol=2e-3)

    build_store(open_sequence(tmp_path / "seq"), Method())
    trainer = Trainer(parse("train", [*config, "--num_iters", "5"]))
    assert trainer.step == 4
    terms, _ = trainer.train_step()
    assert trainer.step == 5 and torch.isfinite(terms["total"])
