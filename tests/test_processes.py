"""Several processes: two compute what one does alone; a lost process ends the run instead of blocking it.

Most tests fork two processes with the environment variables that torchrun sets. One starts torchrun as a user does.
"""

import signal
import socket
import sys
from functools import partial

import pytest
import torch

from common.errors import UserError
from loaders.checkpoint import checkpoints, read_checkpoint
from tests.launch import set_environment, wait_until
from tests.test_crash_safety import finished, start
from training import initialization
from training.distributed import Processes

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py")
ENDLESS = ("--num_iters", 100_000, "--num_pairs", 4, "--i_weight", 5)
SLOW = ("--num_iters", 12, "--num_pairs", 4, "--i_cache", 50_000, "--distortion_start", 0, "--freeze_step", 0,
        "--precision", "fp32", "--lr_deform", 1e-7, "--lr_feature", 1e-7, "--lr_color", 1e-7)


def gradients(state):
    """Adam's running mean of the gradients: it is linear in them, which the parameters are not."""
    return torch.cat([moments["exp_avg"].flatten() for moments in state.optimizers["adam"]["state"].values()])


def start_two(folder, out, *more, others=set_environment):
    """The two processes of a run, as torchrun starts them, without torchrun. others: what the second one calls with its
    environment variables before it starts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    return [start(folder, out, *more, prepare=partial(prepare, rank))
            for rank, prepare in zip(ranks, (set_environment, others), strict=True)]


def test_two_processes_with_half_the_batch_each_match_one(small_sequence, tmp_path):
    """The same pairs are drawn and split; the same error map is evaluated, each process half of the frames. All losses
    take part, and parameters hardly move, so that the gradients of all steps can be compared. They differ by the color
    and flow gradients between the last point of one half and the first of the other, 1 of 128."""
    runs = {"one": [start(small_sequence, tmp_path / "one", *SLOW)],
            "two": start_two(small_sequence, tmp_path / "two", *SLOW)}
    states = []
    for name, processes in runs.items():
        for code, said in map(finished, processes):
            assert code == 0, said
        states.append(read_checkpoint(tmp_path / name / "default_small" / "model_000012.pth"))
    one, two = states
    assert (gradients(one) - gradients(two)).norm() < 0.01 * gradients(one).norm()
    assert torch.equal(one.generators["sampler"], two.generators["sampler"])
    assert torch.equal(one.generators["jitter"], two.generators["jitter"])
    a, b = one.error_map, two.error_map
    assert a["evaluations"] == b["evaluations"] == 1 and a["counts"].sum() == b["counts"].sum() > 12 * 4 * 32 // 2
    assert (a["counts"] - b["counts"]).abs().sum() < 0.01 * a["counts"].sum()
    assert torch.allclose(a["sums"], b["sums"], rtol=1e-2, atol=20)


def fail_to_find_layers(values):
    """For `prepare`: set environment variables; the search for motion layers fails."""
    set_environment(values)
    initialization.find_layers = None


def test_the_first_process_initializes_the_model_for_all(small_sequence, tmp_path):
    """The other process does not look for motion layers, which it may find otherwise. The gradients of the first step
    are those of a single process."""
    more = ("--config", "configs/fast.txt", "--num_iters", 1, "--num_pairs", 4, "--grad_clip", 0)
    runs = {"one": [start(small_sequence, tmp_path / "one", *more)],
            "two": start_two(small_sequence, tmp_path / "two", *more, others=fail_to_find_layers)}
    states = []
    for name, processes in runs.items():
        for code, said in map(finished, processes):
            assert code == 0, said
        states.append(read_checkpoint(tmp_path / name / "fast_small" / "model_000001.pth"))
    one, two = map(gradients, states)
    assert one.norm() > 0 and (one - two).norm() < 0.01 * one.norm()


def resumes(small_sequence, tmp_path):
    """Check that a run that was stopped goes on from its newest checkpoint, here with one process."""
    steps = read_checkpoint(checkpoints(tmp_path / "default_small")[0]).step
    code, said = finished(start(small_sequence, tmp_path, *ENDLESS, "--num_iters", steps + 2))
    assert code == 0 and any(f"at step {steps}" in line for line in said), said


@pytest.mark.parametrize("lost,how", [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_process_ends_the_run_and_the_same_command_resumes_it(lost, how, small_sequence, tmp_path):
    processes = start_two(small_sequence, tmp_path, *ENDLESS, "--process_timeout", 0.1)
    wait_until(lambda: checkpoints(tmp_path / "default_small"), processes[0])
    processes[lost].send_signal(how)
    code, said = finished(processes[1 - lost])  # fails here if it hangs
    assert code == 2 and any("another process of this run was lost" in line for line in said), said
    processes[lost].kill()
    resumes(small_sequence, tmp_path)


def test_sigterm_to_torchrun_saves_once_and_stops(small_sequence, tmp_path):
    process = start(small_sequence, tmp_path, *ENDLESS, command=TORCHRUN)
    folder = tmp_path / "default_small"
    wait_until(lambda: checkpoints(folder), process)
    process.send_signal(signal.SIGTERM)
    code, said = finished(process)
    stopped = [line for line in said if "the same command resumes the run" in line]
    assert code != 0 and len(stopped) == 1, said
    newest = checkpoints(folder)[0]
    assert f"stopped at step {read_checkpoint(newest).step} of" in stopped[0]


def test_pairs_that_cannot_be_shared_are_refused():
    with pytest.raises(UserError, match="multiple"):
        Processes(0, 3).slice_of(8)
    assert Processes(1, 2).slice_of(8) == slice(4, 8) and Processes().slice_of(8) == slice(0, 8)
