"""Write the tables of README.md and docs/*.md from docs/results/*.json: python -m benchmarks.results (make results)

These comments in a page mark the place of the table docs/results/NAME.json; all text between them is replaced:

    <!-- results: NAME -->
    <!-- /results -->

A JSON file holds
    title    one line above the table; may be empty
    columns  names of the columns
    rows     lists of cells, each a string, a number or null (an empty cell)
    digits   decimals of floating-point numbers: one number, or a list with one for each column; 3 if absent
    command  the command that measured the numbers; may be empty
    commit   the commit on which it ran; may be empty

--add FILE ... first copies tables that benchmarks have written to docs/results, with the commit --commit, by default
the one that is checked out.
"""

import logging
import re
import subprocess
from pathlib import Path

from common.cli import Parser, run
from common.errors import UserError
from common.files import read_json, write_json, write_text
from evaluation.tables import markdown

log = logging.getLogger("results")
ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"<!-- results: ([\w-]+) -->\n.*?<!-- /results -->", re.DOTALL)
OPENING = "<!-- results:"


def pages(root: Path) -> list[Path]:
    """README.md and the pages of docs/."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def render_page(page: Path, results: Path) -> str:
    """The text of a page with its marked tables generated from the folder `results`.

    UserError if a mark is not closed, or its JSON file is missing or malformed."""
    text = page.read_text(encoding="utf-8")
    rendered, count = MARKED.subn(lambda match: _marked_table(results / f"{match[1]}.json"), text)
    if count != text.count(OPENING):
        raise UserError(f"{page}: a mark '{OPENING} NAME -->' has no '<!-- /results -->' after it: add it")
    return rendered


def result_text(result: dict) -> str:
    """The title, the table and the command of a result as Markdown."""
    columns = result["columns"]
    digits = result.get("digits", 3)
    if isinstance(digits, int):
        digits = [digits] * len(columns)
    lines = [markdown(columns, [[_cell(cell, places) for cell, places in zip(cells, digits, strict=True)]
                                for cells in result["rows"]])]
    if result.get("title"):
        lines = [result["title"], "", *lines]
    if result.get("command"):
        commit = f" (commit {result['commit']})" if result.get("commit") else ""
        lines += ["", f"Measured by `{result['command']}`{commit}."]
    return "\n".join(lines)


def _marked_table(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"no file {path}: add it, or remove the mark that names it")
    try:
        table = result_text(read_json(path, "correct it"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a table ({error}): its rows need a cell for each of `columns`") from error
    return f"{OPENING} {path.stem} -->\n{table}\n<!-- /results -->"


def _cell(value: str | float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def add_tables(files: list[str], commit: str, results: Path) -> None:
    """Copy tables to the folder `results`, with the commit on which they were measured. UserError if one is none."""
    for file in files:
        table = read_json(Path(file), "give a table that a benchmark has written")
        if missing := {"columns", "rows"} - table.keys():
            raise UserError(f"{file} has no {min(missing)}: give a table that a benchmark has written")
        write_json(results / Path(file).name, table | {"commit": commit})


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    parser.add_argument("--add", nargs="+", default=[], metavar="FILE", help="tables to copy to docs/results first")
    parser.add_argument("--commit", default="", help="the commit on which they were measured")
    args = parser.parse_args()
    if args.add:
        head = ["git", "-C", str(ROOT), "rev-parse", "--short=7", "HEAD"]
        commit = args.commit or subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
        add_tables(args.add, commit, ROOT / "docs/results")
    stale = [page for page in pages(ROOT) if render_page(page, ROOT / "docs/results") != page.read_text("utf-8")]
    for page in stale:
        if not args.check:
            write_text(page, render_page(page, ROOT / "docs/results"))
        log.info("%s %s", page.relative_to(ROOT), "is out of date: run `make results`" if args.check else "written")
    if args.check and stale:
        parser.exit(1)


if __name__ == "__main__":
    run(main)
