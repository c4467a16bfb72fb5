"""Fuzz tests of every file reader: a reader must read the file, or raise one UserError that names the file.

python -m tests.robustness.fuzz [--inputs 20000] [--kinds png,row] [--seed 0]

The inputs are edits of a valid file: truncations, flipped bits, overwritten, inserted and repeated bytes, most often in
the header. For text, tables and pickles, hypothesis also generates contents from nothing. Each kind of file is tested
in its own process, so that a crash of a decoder counts as a failure and does not end the test. The input that caused
the crash is kept in the output folder.
"""

import argparse
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from common.errors import UserError
from tests.robustness.fuzz_kinds import KINDS, Kind

log = logging.getLogger(__name__)
MEMORY = 12 << 30  # bytes, limit on the address space of each test process
NUMBERS = [n.to_bytes(size, order, signed=n < 0) for size in (2, 4, 8) for order in ("little", "big")
           for n in (0, 1, -1, (1 << 8 * size - 1) - 1, -(1 << 8 * size - 1))]
PIECES = [*NUMBERS, b"../../../../x", b"\x00" * 64, b"\xff" * 64, b"99999999999999999999", b"-1", b"1e999", b"NaN",
          b"'", b'"', b"[" * 50, b"(" * 50, b"{}", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"]


@dataclass
class Tally:
    """Counts of the inputs of one kind by result, and descriptions of the distinct failures."""
    kind: str
    inputs: int = 0
    read: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)


def edits(number: int) -> list[tuple]:
    """One to four random edits (operation, position, length or bit, bytes), derived from `number`.

    Two thirds of the positions are within 200 bytes of the start or the end, where headers are."""
    random = Random(number)
    where = (lambda: random.randrange(200), lambda: -random.randrange(1, 201), lambda: random.randrange(1 << 20))
    kinds = ("flip", "flip", "write", "write", "insert", "cut", "end", "copy", "digits")
    return [(random.choice(kinds), random.choice(where)(), random.randrange(256),
             random.choice(PIECES) if random.random() < 0.5 else random.randbytes(random.randrange(1, 13)))
            for _ in range(random.randrange(1, 5))]


def damaged(data: bytes, how: list[tuple]) -> bytes:
    """Apply the edits `how` to `data`."""
    out = bytearray(data)
    for what, where, amount, piece in how:
        n = max(len(out), 1)
        at = where % n if where >= 0 else max(n + where, 0)
        if what == "flip" and out:
            out[at] ^= 1 << amount % 8
        elif what == "write":
            out[at: at + len(piece)] = piece
        elif what == "insert":
            out[at:at] = piece
        elif what == "cut":
            del out[at: at + amount]
        elif what == "end":
            del out[at:]
        elif what == "copy":
            out[at:at] = out[at: at + amount] * 3
        elif what == "digits":  # replace a decimal number
            start = next((k for k in range(at, len(out)) if 48 <= out[k] < 58), None)
            if start is not None:
                end = next((k for k in range(start, len(out)) if not 48 <= out[k] < 58), len(out))
                out[start:end] = str(amount << (amount % 70)).encode()
    return bytes(out)


def inputs(kind: Kind, valid: bytes) -> st.SearchStrategy:
    """Strategy for file contents of the kind: edits of the valid file, and generated content if there is any."""
    # one drawn integer seeds all edits; drawing each edit from hypothesis would take most of the time
    mutated = st.integers(0, (1 << 64) - 1).map(lambda number: damaged(valid, edits(number)))
    return st.one_of(mutated, mutated, kind.invented) if kind.invented is not None else mutated


def fuzz(kind: Kind, count: int, number: int, folder: Path) -> Tally:
    """Pass `count` inputs to the kind's reader. folder: for the input files; the last input and failures stay there."""
    tally, path = Tally(kind.name), kind.make(folder)
    valid = path.read_bytes()
    kind.read(path)  # the valid file must be readable

    @seed(number)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(inputs(kind, valid))
    def feed(data: bytes) -> None:
        path.write_bytes(data)
        tally.inputs += 1
        problem = judge(lambda: kind.read(path), path, folder)
        if problem is None:
            tally.read += 1
        elif problem == "refused":
            tally.refused += 1
        elif problem not in tally.failures:
            tally.failures.append(problem)
            (folder / f"failure-{len(tally.failures)}").write_bytes(data)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        feed()
    return tally


def judge(read: Callable, path: Path, folder: Path) -> str | None:
    """None if `read` succeeds, "refused" if it raises a one-line UserError that names the file, else a description."""
    try:
        read()
    except UserError as error:
        named = str(folder) in str(error) or path.name in str(error)
        return "refused" if named and "\n" not in str(error) else f"unclear message: {str(error)[:200]!r}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {str(error)[:160]!r}"
    return None


def fuzz_apart(kind: Kind, count: int, number: int, folder: Path) -> Tally:
    """Run `fuzz` in a forked process, with limited memory; a crash of the process counts as a failure."""
    folder.mkdir(parents=True)
    result, pid = folder / "tally.json", os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            with open(os.devnull, "w") as nowhere:  # discards messages of C libraries
                os.dup2(nowhere.fileno(), 2)
            result.write_text(json.dumps(asdict(fuzz(kind, count, number, folder))))
            code = 0
        except BaseException:
            (folder / "error.txt").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 0:
        return Tally(**json.loads(result.read_text()))
    return Tally(kind.name, failures=[f"the process ended with {status}; its input is in {folder}"])


def table(tallies: list[Tally]) -> str:
    """The counts as a Markdown table."""
    lines = ["| file | inputs | read | refused with one line | failures |", "|---|---|---|---|---|"]
    for t in tallies:
        lines.append(f"| {t.kind} | {t.inputs:,} | {t.read:,} | {t.refused:,} | {len(t.failures)} |")
    sums = [sum(getattr(t, name) for t in tallies) for name in ("inputs", "read", "refused")]
    lines.append(f"| all | {' | '.join(f'{n:,}' for n in sums)} | {sum(len(t.failures) for t in tallies)} |")
    return "\n".join(lines)


def main() -> None:
    """Fuzz the chosen kinds; exit code 1 if there is any failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000, help="of all kinds together")
    parser.add_argument("--kinds", default="", help="comma-separated; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out/fuzz", help="folder of the files under way and of those that failed")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    wanted = list(filter(None, args.kinds.split(",")))
    chosen = [kind for kind in KINDS if not wanted or kind.name in wanted]
    total = sum(kind.share for kind in chosen)
    shutil.rmtree(args.out, ignore_errors=True)
    Path(args.out).mkdir(parents=True)
    tallies = []
    for kind in chosen:
        before, count = time.monotonic(), -(-args.inputs * kind.share // total)
        folder = Path(tempfile.mkdtemp(prefix=f"{kind.name}-", dir=args.out))
        tallies.append(fuzz_apart(kind, count, args.seed, folder / kind.name))
        log.info("%s: %d inputs in %.0f s", kind.name, tallies[-1].inputs, time.monotonic() - before)
        for failure in tallies[-1].failures:
            log.info("  %s", failure)
    Path(args.out, "tallies.json").write_text(json.dumps([asdict(tally) for tally in tallies], indent=1))
    log.info("%s", table(tallies))
    sys.exit(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    main()
