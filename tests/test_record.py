"""args.txt and versions.json, which reproduce a run."""

import json

import pytest
import torch

from common.errors import UserError
from configs.config_file import as_config
from configs.options import OPTIONS, parse
from loaders.checkpoint import read_checkpoint
from tests.test_crash_safety import finished, start


@pytest.mark.parametrize("arguments", [
    [], ["--mask_near", "--lr_deform", "3e-5", "--optimizer", "muon", "--preprocessing=", "--ray"],
    ["--data_dir", "my clips/a #1 = 'x'; [b]: %s", "--expname", "tab\there", "--preprocessing=--flow dis --chain"],
    ["--data_dir", '"quoted" # name'],
])
def test_the_options_file_reads_back_to_the_same_options(arguments, tmp_path):
    options = parse("train", arguments)
    (tmp_path / "args.txt").write_text(as_config(options))
    again = parse("train", ["--config", str(tmp_path / "args.txt")])
    names = [option.name for option in OPTIONS]
    assert {name: getattr(again, name) for name in names} == {name: getattr(options, name) for name in names}


def test_what_no_config_file_can_hold_is_refused():
    with pytest.raises(UserError, match="--expname"):
        as_config(parse("train", ["--expname", "two\nlines"]))


def test_args_txt_gives_the_same_run(small_sequence, tmp_path):
    """From another save_dir, with every other option from the file; versions.json says what made it."""
    first = start(small_sequence, tmp_path / "a", "--num_iters", 8, "--optimizer", "muon", "--seed", 7,
                  "--expname", "x y")
    assert finished(first)[0] == 0
    folder = tmp_path / "a" / "x y_small"
    again = start(small_sequence, tmp_path / "b", "--config", folder / "args.txt", small=False)
    code, said = finished(again)
    assert code == 0, said
    a, b = (read_checkpoint(tmp_path / run / "x y_small" / "model_000008.pth").model for run in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    (record,) = json.loads((folder / "versions.json").read_text())
    assert record["step"] == 0 and record["versions"]["torch"] == torch.__version__ and record["threads"] == 1
    assert {"commit", "python", "numpy"} <= record["versions"].keys() and "uncommitted_changes" in record
