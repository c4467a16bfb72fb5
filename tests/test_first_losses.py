"""The first losses of configs/fast.txt, and of the grids of earlier versions, are the committed ones: a change of the
method or of its numbers shows here.

Where the numbers are meant to change, renew them: python -m tests.test_first_losses. "fast" are those of the file as it
is, "grids" those of its former representation, which old configurations and checkpoints still have: the same numbers as
before `--deform warp` was added. Both without --init_layers, which chooses among motions: small differences of flow
between machines may change the choice.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from configs.options import parse
from tests.conftest import write_small_sequence
from training.trainer import Trainer

FILE = Path(__file__).parent / "data" / "first_losses.json"
STEPS = 5
TOLERANCE = 1e-4  # relative; the order of floating-point sums differs between machines
KINDS = {"fast": ["--init_layers", "0"],
         "grids": ["--deform", "grid", "--field", "grid", "--num_samples_ray", "16", "--init_layers", "0",
                   "--deform_start", "2000"]}


def first_losses(sequence, save_dir, kind):
    """The loss terms of the first steps of one of KINDS, `{name: [float] * STEPS}`."""
    trainer = Trainer(parse("train", ["--config", "configs/fast.txt", "--data_dir", str(sequence), "--save_dir",
                                      str(save_dir), "--device", "cpu", "--precision", "fp32", "--mlp_backend",
                                      "torch", "--seed", "1", "--expname", kind, *KINDS[kind]]))
    steps = [trainer.train_step()[0] for _ in range(STEPS)]
    return {name: [step[name].item() for step in steps] for name in sorted(steps[0])}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_losses_are_the_committed_ones(kind, small_sequence, tmp_path):
    found, expected = first_losses(small_sequence, tmp_path, kind), json.loads(FILE.read_text())[kind]
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=TOLERANCE, abs=1e-9), name


def main():
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        sequence = write_small_sequence(Path(folder) / "small")
        losses = {kind: first_losses(sequence, Path(folder) / "out", kind) for kind in KINDS}
    FILE.write_text(json.dumps(losses, indent=1) + "\n")
    sys.stdout.write(f"{FILE}\n")


if __name__ == "__main__":
    main()
