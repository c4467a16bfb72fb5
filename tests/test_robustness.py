"""Short versions of the checks in tests/robustness: each takes seconds here, minutes or hours in full."""

import sys
from dataclasses import replace
from pathlib import Path
from random import Random

from tests.launch import launch, start_command
from tests.robustness import check_resume


def test_preprocessing_that_is_killed_writes_the_same_files(small_sequence, tmp_path, monkeypatch):
    monkeypatch.setattr(check_resume, "start", start_command)
    command = [sys.executable, "-m", "preprocessing", "--video", str(small_sequence / "color"), "--max_frames", "6",
               "--flow", "dis", "--resume", "--num_workers", "1"]
    equal, line = check_resume.check(command, tmp_path, kills=1, seed=0)
    assert equal, line
    assert line.endswith("7 files, all the same")


def test_a_campaign_of_faults(tmp_path):
    result = launch("tests.test_robustness", tmp_path)
    report = (tmp_path / "faults.md").read_text() if (tmp_path / "faults.md").exists() else ""
    assert result.returncode == 0, report + result.stderr
    for row in ("SIGKILL: training | 1 | 1", "SIGKILL, resumed to the end: training | 1 | 1",
                "full disk: training | 1 | 1", "full disk, then room: training | 1 | 1",
                "damaged file: seq/correspondences/00002.row | 1 | 1"):
        assert row in report


def short_campaign(folder: Path) -> int:
    """A kill, a full disk and a damaged file; returns the number of failed tests. Runs without threads: it forks."""
    from tests.robustness import fault_runs, faults

    fault_runs.make_inputs(folder / "inputs", needed=("seq",))
    campaign, random = faults.Campaign(folder, deadline=float("inf")), Random(0)
    (training,) = (stage for stage in faults.STAGES if stage.name == "training")
    training = replace(training, argv=(*training.argv, "--num_iters", "8", "--i_weight", "3"))
    faults.kills(campaign, training, 1, random)
    faults.full_disk(campaign, training, rooms=(0.5,))
    faults.damaged_files(campaign, random, 1, files={"seq/correspondences/00002.row": "training"})
    (folder / "faults.md").write_text(faults.report(campaign))
    return sum(bool(event["lost"] or event["unclear"]) for event in campaign.events)


if __name__ == "__main__":
    sys.exit(short_campaign(Path(sys.argv[1])))
