"""eval.py and viz.py take the options of inference and data that the run was trained with."""

import json

import numpy as np
import pytest
import torch

from common.errors import UserError
from configs.options import OPTIONS, parse, taken_from_run
from inference.load_run import run_options
from loaders.checkpoint import find_checkpoint
from loaders.track_files import load_annotations, sample_queries
from tests.launch import launch
from tests.test_drivers import QUICK

ARGS = "follow_flow = True\nnum_imgs = 5\nocclusion_th = 0.75\nnum_iters = 3\ncolour = blue\nquery_mode = first\n"


@pytest.fixture
def run(tmp_path):
    """The arguments that name a run without a checkpoint, whose args.txt is ARGS."""
    folder = tmp_path / "out" / "x_clip"
    folder.mkdir(parents=True)
    (folder / "args.txt").write_text(ARGS)
    return ["--data_dir", str(tmp_path / "clip"), "--save_dir", str(tmp_path / "out"), "--expname", "x"]


def options(driver, *arguments):
    return parse(driver, list(arguments), stored=run_options)


@pytest.mark.parametrize("driver", ["eval", "viz"])
def test_the_command_line_wins_over_the_config_over_the_run(driver, run, tmp_path):
    found = options(driver, *run)
    assert (found.follow_flow, found.num_imgs, found.occlusion_th) == (True, 5, 0.75)
    assert (found.num_iters, found.query_mode) == (100_000, "strided")  # not of inference or data
    (tmp_path / "c.txt").write_text("follow_flow = false\nnum_imgs = 6\n")
    found = options(driver, *run, "--config", str(tmp_path / "c.txt"))
    assert (found.follow_flow, found.num_imgs, found.occlusion_th) == (False, 6, 0.75)
    found = options(driver, *run, "--config", str(tmp_path / "c.txt"), "--follow_flow", "--num_imgs", "7")
    assert (found.follow_flow, found.num_imgs) == (True, 7)
    assert options(driver, *run, "--no-follow_flow").follow_flow is False
    assert options(driver, *run, "--num_imgs", "250").num_imgs == 250  # the default, but given
    other = tmp_path / "out" / "x_clip" / "model_000001.pth"  # by its file: the options beside it
    assert options(driver, "--data_dir", str(tmp_path / "z"), "--ckpt_path", str(other)).num_imgs == 5


def test_what_differs_is_said(run, caplog):
    with caplog.at_level("INFO"):
        options("eval", *run, "--num_imgs", "6", "--occlusion_th", "0.75")
    assert [record.getMessage() for record in caplog.records] == ["options of the run: follow_flow = True"]
    caplog.clear()
    with caplog.at_level("INFO"):
        options("eval", *run, "--num_imgs", "6", "--occlusion_th", "0.75", "--no-follow_flow")
    assert not caplog.records


def test_every_value_that_training_stores_is_taken():
    names = {option.name for option in taken_from_run("eval")}
    assert {"follow_flow", "use_max_loc", "occlusion_th", "num_imgs"} <= names == {
        option.name for option in taken_from_run("viz")}
    assert not names & {"data_dir", "expname", "save_dir", "ckpt_path", "device", "queries", "annotations", "out"}
    assert not taken_from_run("train")
    assert {option.type for option in OPTIONS if option.name in names} <= {bool, int, float}


@pytest.mark.parametrize("content", [None, "", "lr_deform = 1\n"])
def test_runs_without_stored_options_go_on(content, run, tmp_path):
    path = tmp_path / "out" / "x_clip" / "args.txt"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert vars(options("eval", *run)) == vars(parse("eval", run))
    assert vars(options("eval")) == vars(parse("eval", []))


@pytest.mark.parametrize("content,words", [
    (b"\xff\xfe\x00", "cannot be read as options"), (b"num_imgs = many\n", "num_imgs = 'many', which is no value"),
    (b"num_imgs = 1\n", "num_imgs = '1', which is no value"), (b"follow_flow = perhaps\n", "follow_flow = 'perhaps'")])
def test_damaged_options_are_one_line(content, words, run, tmp_path):
    (tmp_path / "out" / "x_clip" / "args.txt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        options("eval", *run)
    assert words in str(caught.value) and "args.txt" in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_is_scored_and_drawn_as_it_was_trained(small_sequence, tmp_path):
    run = ["--data_dir", small_sequence, "--save_dir", tmp_path]
    assert launch("train.py", *run, *QUICK, "--follow_flow", "--i_img", 0).returncode == 0
    folder = tmp_path / f"default_{small_sequence.name}"
    scored = [*run, "--annotations", small_sequence / "annotations.npz", "--query_mode", "first"]

    def metrics(*arguments):
        result = launch("eval.py", *arguments)
        assert result.returncode == 0, result.stderr
        return json.loads((folder / "metrics.json").read_text()), result.stderr

    with_flow, said = metrics(*scored)
    assert with_flow["follow_flow"] is True and "options of the run: follow_flow = True\n" in said
    explicit, said = metrics(*scored, "--follow_flow")
    assert explicit == with_flow and "options of the run" not in said
    without, _ = metrics(*scored, "--no-follow_flow")
    assert without["follow_flow"] is False and without != with_flow
    (folder / "args.txt").unlink()  # the checkpoint has the options, too
    assert find_checkpoint(folder)[1].options["follow_flow"] is True
    assert metrics(*scored)[0] == with_flow
    result = launch("viz.py", *run, "--what", "tracks", "--formats", "png", "--grid_interval", 30)
    assert result.returncode == 0 and "options of the run: follow_flow = True\n" in result.stderr


@pytest.mark.parametrize("arguments,words", [
    (["--annotations", "a.npz", "--queries", "q.csv"], "give one of them"),
    (["--tapvid", "a.pkl", "--queries", "q.csv"], "leave --queries out"),
    (["--tapvid", "a.pkl", "--annotations", "a.npz"], "leave --annotations out")])
def test_two_modes_at_once_are_refused(arguments, words, tmp_path):
    result = launch("eval.py", "--data_dir", tmp_path, *arguments)
    assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1


def test_baselines_that_are_not_scored_are_told(small_sequence, tmp_path):
    truth = load_annotations(small_sequence / "annotations.npz")
    queries, rows = sample_queries(truth, "first")
    np.savez(tmp_path / "t.npz", tracks=truth.points[rows], visible=~truth.occluded[rows], query_points=queries,
             frame_size=truth.frame_size)
    result = launch("eval.py", "--predictions", tmp_path / "t.npz", "--annotations", small_sequence / "annotations.npz",
                    "--query_mode", "first", "--baselines", "static")
    assert result.returncode == 0 and "--baselines" in result.stderr


def test_options_of_a_checkpoint_of_something_else(run, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.pth")
    assert run_options(parse("eval", [*run, "--ckpt_path", str(tmp_path / "model.pth")])) == {}
