"""Fuzz tests of every reader: it reads the file or raises a UserError of one line. `make faults` has more inputs."""

import pytest

from tests.robustness.fuzz import damaged, edits, fuzz
from tests.robustness.fuzz_kinds import KINDS

SKIPPED = {"raft.pth": "a network of 4 MB a file: in the campaign"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name not in SKIPPED], ids=lambda kind: kind.name)
def test_readers_read_or_refuse(kind, tmp_path):
    tally = fuzz(kind, 5 * kind.share, number=1, folder=tmp_path)
    assert not tally.failures and tally.read + tally.refused == tally.inputs >= 4 * kind.share


def test_the_fuzz_finds_a_reader_that_breaks(tmp_path):
    def read(path):
        if len(path.read_bytes()) < 30:
            raise IndexError("not told")

    def make(folder):
        (folder / "a.txt").write_bytes(bytes(60))
        return folder / "a.txt"
    tally = fuzz(type(KINDS[0])("a", make, read), 200, number=1, folder=tmp_path)
    assert tally.failures and "IndexError" in tally.failures[0]
    assert len((tmp_path / "failure-1").read_bytes()) < 30


def test_damage_is_reproducible():
    data = bytes(range(256)) * 4
    assert [damaged(data, edits(n)) for n in range(50)] == [damaged(data, edits(n)) for n in range(50)]
    assert sum(damaged(data, edits(n)) != data for n in range(50)) > 45
