"""benchmarks.gpu without a GPU: its parts on tensors that are marked as on CUDA, and what it does when parts fail."""

import json
import logging
import subprocess
import sys
import time

import pytest

from benchmarks import gpu, gpu_parts
from benchmarks.gpu_parts import PARTS, Found, Setting
from common.errors import UserError
from tests.launch import ROOT
from tests.pretend_cuda import pretend_cuda


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the sequence that steps are timed on."""
    path = tmp_path_factory.mktemp("gpu")
    PARTS["sequence"].run(Setting("cpu", str(path), quick=True))
    return str(path)


@pytest.mark.parametrize("name", [
    "matrix rate", "step: original_plain", "step: default_fused_fp32", "step: fast", "outputs: default",
    "outputs: original", "outputs: fast", "dense tracks: default", "dense tracks: fast"])
def test_parts_mix_no_devices(name, folder, monkeypatch):
    monkeypatch.setattr(gpu_parts, "REPEATS", 1)
    with pretend_cuda():
        found = PARTS[name].run(Setting("cuda", folder, quick=True))
    assert found.text and found.peak_gib is not None
    assert gpu.row_of({"part": name, "seconds_in_all": 1.0, **vars(found)}, 1.0)[1] == found.text
    if name.startswith("outputs"):
        limit = 1e-4 if name.endswith("fast") else 1e-6  # the CPU computed both; warps on it in C++
        assert max(found.values.values()) < limit
    if name.startswith("dense"):
        assert found.values["pixels"] == 24 * 32 and found.values["seconds"] > 0


def test_outputs_that_differ_are_an_error(folder, monkeypatch):
    monkeypatch.setattr(gpu_parts, "_largest_difference", lambda *_: float("nan"))
    with pytest.raises(ArithmeticError, match="outputs differ by nan"):
        PARTS["outputs: fast"].run(Setting("cpu", folder, quick=True))


def test_the_command_runs_and_writes_a_table(tmp_path):
    """Parts that need CUDA are left out on a CPU; the file is one that benchmarks.results reads."""
    from benchmarks.results import result_text

    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--parts",
               "matrix,step: default_triton", "--out", tmp_path / "gpu.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["part"] for part in result["parts"]] == ["matrix rate", "step: default_triton_bf16"]
    assert result["parts"][0]["values"]["bf16_tflops"] > 0 and "needs CUDA" in result["rows"][1][1]
    assert done.stdout.strip().splitlines()[-1] in result_text(result)


# Parts that fail

SETTING = Setting("cpu", "", quick=True)


def process(code: str) -> list[str]:
    """A command that runs `code`, where result(content) writes the result of the part."""
    start = "import json, os, subprocess, sys, time\ndef result(x): json.dump(x, open(sys.argv[3], 'w'))\n"
    return [sys.executable, "-c", start + code]


@pytest.mark.parametrize("code,error", [
    ("print('no such kernel', file=sys.stderr); sys.exit(3)", "ended with exit code 3"),
    ("print('no such kernel'); os.abort()", "ended with signal SIGABRT"),
    ("print('no such kernel'); result({'error': 'out of memory', 'details': ''})", "out of memory"),
    ("print('no such kernel')", "ended with exit code 0")])
def test_a_part_that_fails_has_its_error_and_its_last_output(code, error):
    if "SIGABRT" not in error:
        found = gpu.run_part("x", SETTING, 60, process(code))
        assert found["error"] == error and "no such kernel" in found["details"]
    else:
        assert gpu.run_part("x", SETTING, 60, process(code))["error"] == error


def test_a_part_that_takes_too_long_is_stopped_with_what_it_started(tmp_path):
    child = f"import time; time.sleep(4); open(r'{tmp_path / 'alive'}', 'w')"
    start = time.monotonic()
    found = gpu.run_part("x", SETTING, 2, process(f"subprocess.run([sys.executable, '-c', {child!r}])"))
    assert found["error"] == "stopped after 2 s" and time.monotonic() - start < 4
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


def test_the_others_go_on(tmp_path, monkeypatch, caplog, capsys):
    """Errors are in their rows; parts that would begin after the end are not started."""
    results = {"sequence": {"error": "no space left", "details": "..."},
               "matrix rate": vars(Found("fast", {"bf16_tflops": 2.0})),
               "step: default_plain": vars(Found("1 ms", {"gflop": 500.0, "seconds": 0.5}, 0.25))}
    monkeypatch.setattr(gpu, "run_part", lambda name, *_: results[name])
    with caplog.at_level(logging.INFO):
        parts = gpu.benchmark(list(results), SETTING, 1, tmp_path / "gpu.json", "command")
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row[1] for row in rows] == ["failed: no space left", "fast", "1 ms"]
    assert rows[2][2:5] == ["0.25", "1", "50.0%"]
    assert "error" in parts[0] and len(caplog.messages) == 3 and "failed: no space left" in capsys.readouterr().out
    (late,) = gpu.benchmark(["sequence"], SETTING, 0.01, tmp_path / "gpu.json", "command")
    assert "not started" in late["error"]


def test_parts_are_chosen_by_how_they_begin():
    assert gpu.chosen_parts("") == list(PARTS)
    assert gpu.chosen_parts("demo,matrix") == ["matrix rate", "demo"]
    with pytest.raises(UserError, match="begins with 'nothing'"):
        gpu.chosen_parts("demo,nothing")
