"""Options: names of earlier versions, yes and no, help of each driver, defaults."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from common.cli import Parser, yes_or_no
from configs.options import ALL, OPTIONS, parse, parser
from models.factory import OTHER_OPTIONS
from models.omnimotion import ModelConfig
from preprocessing.options import convert_parser, flow_parser, main_parser

FLAGS = [option for option in OPTIONS if option.type is bool]


def refused(capsys, driver, *arguments):
    """The one line on stderr after which `driver` exits with code 2."""
    with pytest.raises(SystemExit) as stopped:
        parse(driver, list(arguments))
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1
    return line


@pytest.mark.parametrize("arguments,name,value", [
    (["--optimiser", "muon"], "optimizer", "muon"), (["--neighbour_weight", "0.25"], "neighbor_weight", 0.25),
    (["--what", "depth,colour,flow"], "what", "depth,color,flow"), (["--compile", "aot_eager"], "compile", ""),
    (["--no_reload"], "reload", False), (["--no_tensorboard"], "tensorboard", False),
    (["--resident", "yes"], "resident", "yes"), (["--resident", "false"], "resident", "no"),
])
def test_old_names_and_values(arguments, name, value, tmp_path):
    assert getattr(parse("train", arguments), name) == value
    old = tmp_path / "args.txt"
    old.write_text(f"{arguments[0][2:]} = {arguments[1] if arguments[1:] else True}\n")
    assert getattr(parse("train", ["--config", str(old)]), name) == value


def test_the_options_file_of_an_earlier_version(tmp_path):
    old = tmp_path / "args.txt"
    old.write_text("optimiser = muon\nneighbour_weight = 0.25\nwhat = colour\nno_reload = False\n"
                   "no_tensorboard = True\n"
                   "use_affine = 0\ninit_layers = 1\nfollow_flow = 1\nuse_count_map = 1\nmask_near = False\n"
                   "resident = auto\nmax_pixels = 67108864\nkeep = 3\n")
    options = parse("train", ["--config", str(old), "--neighbor_weight", "0.75"])
    assert (options.optimizer, options.neighbor_weight, options.what) == ("muon", 0.75, "color")
    assert (options.reload, options.tensorboard, options.use_affine, options.mask_near) == (True, False, False, False)
    assert (options.init_layers, options.follow_flow, options.use_count_map) == (True, True, True)


@pytest.mark.parametrize("option", FLAGS, ids=lambda option: option.name)
def test_yes_and_no(option, tmp_path):
    for words, value in (([f"--{option.name}"], True), ([f"--no-{option.name}"], False),
                         ([f"--no_{option.name}"], False), ([f"--{option.name}", "0"], False),
                         ([f"--{option.name}", "1"], True), ([f"--{option.name}=no"], False), ([], option.default),
                         ([f"--{option.name}", f"--no-{option.name}"], False)):
        assert getattr(parse("train", words), option.name) is value
    config = tmp_path / "config.txt"
    for text, value in (("true", True), ("false", False), ("True", True), ("0", False), ("1", True)):
        config.write_text(f"{option.name} = {text}\n")
        assert getattr(parse("eval", ["--config", str(config)]), option.name) is value
        other = [f"--no-{option.name}" if value else f"--{option.name}"]  # the command line overrides the file
        assert getattr(parse("eval", ["--config", str(config), *other]), option.name) is not value


def test_neither_yes_nor_no(capsys, tmp_path):
    assert "'2' is neither true nor false" in refused(capsys, "train", "--follow_flow", "2")
    (tmp_path / "config.txt").write_text("use_affine = maybe\n")
    assert "'maybe' is neither" in refused(capsys, "train", "--config", str(tmp_path / "config.txt"))
    assert yes_or_no("On") and not yes_or_no("off")


def test_wrong_values_are_one_line(capsys):
    assert "--num_iters 0: must be at least 1" in refused(capsys, "train", "--num_iters", "0")
    assert "--grad_clip nan: must be at least 0" in refused(capsys, "train", "--grad_clip", "nan")
    assert "--grid_levels 9: must be at most 8" in refused(capsys, "train", "--grid_levels", "9")
    assert "--no-score_model --baselines chain" in refused(capsys, "eval", "--baseline", "chain")
    assert "--optimizer" in refused(capsys, "train", "--optimizer", "sgd")
    assert "max_depth" in refused(capsys, "train", "--min_depth", "3")


@pytest.mark.parametrize("driver", ALL)
def test_help_lists_what_the_driver_reads(driver):
    words = parser(driver).format_help().replace(",", " ").split()
    for option in OPTIONS:
        assert (f"--{option.name}" in words) == (driver in option.drivers), option.name
        assert not any(f"--{name}" in words for name in (*option.old_names, *option.old_negations))
        assert option.name in vars(parse(driver, []))  # accepted all the same


def test_option_names_are_unique():
    names = [name for option in OPTIONS for name in (option.name, *option.old_names, *option.old_negations)]
    assert len(names) == len(set(names))


def test_the_model_has_the_options_defaults():
    defaults = {option.name: option.default for option in OPTIONS}
    shared = [field for field in fields(ModelConfig) if field.name in defaults.keys() - OTHER_OPTIONS]
    assert len(shared) > 15
    for field in shared:
        if field.name != "grid_layers":  # option value 0: chosen from the video; the model has a number
            assert field.default == defaults[field.name], field.name


@pytest.mark.parametrize("argument, code", [("--help", 0), ("--no_such_option", 2)])
@pytest.mark.parametrize("command", ["train.py", "eval.py", "viz.py", "track.py", "preprocessing"])
def test_help_and_refused_options_import_no_torch(command, argument, code):
    script = f"""
import runpy, sys
sys.argv = ["command", {argument!r}]
try:
    runpy.{"run_path" if command.endswith(".py") else "run_module"}({command!r}, run_name="__main__")
except SystemExit as error:
    sys.exit(100 if "torch" in sys.modules else error.code)
"""
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True).returncode == code


def test_presets_are_read():
    for path in sorted(Path(__file__).parents[1].glob("configs/**/*.txt")):
        for driver in ALL:
            parse(driver, ["--config", str(path)])


def test_errors_of_the_parser_are_one_line(capsys):
    with pytest.raises(SystemExit):
        Parser(prog="tool").parse_args(["--unknown"])
    assert capsys.readouterr().err == "tool: unrecognized arguments: --unknown (--help lists the options)\n"


def test_old_names_of_preprocessing():
    old = ["--keep", "half", "--max_memory", "3", "--precision", "float16"]
    new = ["--density", "half", "--memory_gib", "3", "--raft_precision", "float16"]
    parsed = [vars(main_parser().parse_args(["--data_dir", "x", *words])) for words in (old, new)]
    assert parsed[0] == parsed[1]
    assert (parsed[0]["keep"], parsed[0]["max_memory"], parsed[0]["precision"]) == ("half", 3.0, "float16")


@pytest.mark.parametrize("make", [main_parser, flow_parser, convert_parser])
def test_help_of_preprocessing(make):
    text = make().format_help()
    assert "--max_pixels" in text and "--keep" not in text and "--precision" not in text


def test_flags_without_values_leave_positional_arguments():
    args = flow_parser().parse_args(["--offline", "a.png", "b.png", "--out", "o.npy", "--cold_start", "--no-offline"])
    assert args.images == ["a.png", "b.png"] and args.cold_start and not args.offline
