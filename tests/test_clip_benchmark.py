"""benchmarks.clip: parts of a command are told apart by what it prints, and a table has one cell for two sides."""

import re
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.clip import METRICS, STAGES, Clip, Side, Usage, disk_mib, growth_table, measure, rows_of
from common.errors import UserError

PARTS = {"first": re.compile("first: 100%"), "second": None}
SCRIPT = """
import sys, time
open("written", "wb").write(bytes(1 << 20))
sys.stderr.write("first: 50%\\rfirst: 100%\\n")
sys.stderr.flush()
sum(range(20_000_000))
"""


def test_the_parts_of_a_command_have_their_own_time_and_disk_space(tmp_path):
    found = measure(tmp_path, ["-c", SCRIPT], tmp_path, PARTS)
    assert list(found) == ["first", "second"]
    assert found["first"].disk == pytest.approx(1)
    assert found["second"].disk == 0
    assert found["second"].cpu_seconds > 0.1
    assert found["second"].memory > 1
    assert disk_mib(tmp_path) == pytest.approx(1)


def test_a_command_that_fails_is_named_with_its_last_line(tmp_path):
    with pytest.raises(UserError, match="failed: error: no such clip"):
        measure(tmp_path, ["-c", "import sys; sys.exit('error: no such clip')"], tmp_path)


def test_both_sides_share_a_cell_and_the_whole_is_the_sum_of_the_stages(tmp_path):
    sides = [Side(name, tmp_path, [], 10, {stage: Usage(k, 2 * k, k, k) for stage in STAGES}, 7.0,
                  dict.fromkeys(METRICS.values(), 0.5)) for k, name in ((1, "before"), (2, "now"))]
    rows = rows_of(Clip("clip", Path()), sides)
    assert [row[1] for row in rows] == [*STAGES, "whole, finished store", "AJ; delta_avg"]
    assert rows[0][2:] == ["1.0 → 2.0", "2.0 → 4.0", "1 → 2", "1 → 2"]
    assert rows[-2][2:] == [f"{len(STAGES)}.0 → {2 * len(STAGES)}.0", f"{2 * len(STAGES)}.0 → {4 * len(STAGES)}.0",
                            "1 → 2", "7 → 7"]
    assert rows[-1][2:] == ["0.500 → 0.500", "0.500 → 0.500", "", ""]


def test_growth_is_the_ratio_of_the_longest_clip_and_the_second_one(tmp_path):
    sides = [Side("now", tmp_path, [], 10, {stage: Usage(k, 2 * k, 100 * k, 5 * k) for stage in STAGES})
             for k in (1, 2, 4, 10)]
    table = growth_table(sides, Namespace(scene="easy", size=(64, 96), num_iters=1_000))
    assert table["columns"] == ["", "40 frames", "80", "160", "320", "320 / 80"] and "96x64, 1,000" in table["title"]
    rows = {row[0]: row[1:] for row in table["rows"]}
    assert rows["preprocessing, seconds"] == ["4", "8", "16", "40", "5.0"]  # four parts
    assert rows["all stages, CPU seconds"] == [str(16 * k) for k in (1, 2, 4, 10)] + ["5.0"]
    assert rows["train, peak memory, MiB"] == ["100", "200", "400", "1000", "5.0"]
    assert rows["preprocessing, peak disk, MiB"] == ["5", "10", "20", "50", "5.0"]
