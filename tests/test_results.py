"""benchmarks.results: tables of the pages from committed JSON files."""

import json
from pathlib import Path

import pytest

from benchmarks.results import ROOT, pages, render_page
from common.errors import UserError

RESULT = {"title": "Two trackers", "columns": ["tracker", "AJ", "frames"], "digits": [0, 2, 0],
          "rows": [["ours", 0.5, 12], ["theirs", None, 7]], "command": "make x", "commit": "abc1234"}


def write_page(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text)
    return page


@pytest.mark.parametrize("page", pages(ROOT), ids=lambda page: page.name)
def test_the_committed_pages_are_what_make_results_writes(page):
    assert render_page(page, ROOT / "docs/results") == page.read_text(encoding="utf-8"), "run `make results`"


def test_a_marked_table_is_replaced_and_a_second_run_changes_nothing(tmp_path):
    (tmp_path / "two.json").write_text(json.dumps(RESULT))
    page = write_page(tmp_path, "before\n<!-- results: two -->\nold\n<!-- /results -->\nafter\n")
    text = render_page(page, tmp_path)
    assert text == ("before\n<!-- results: two -->\nTwo trackers\n\n| tracker | AJ | frames |\n|---|---|---|\n"
                    "| ours | 0.50 | 12 |\n| theirs |  | 7 |\n\nMeasured by `make x` (commit abc1234).\n"
                    "<!-- /results -->\nafter\n")
    page.write_text(text)
    assert render_page(page, tmp_path) == text


@pytest.mark.parametrize(("text", "result", "message"), [
    ("<!-- results: two -->\n", RESULT, "has no '<!-- /results -->'"),
    ("<!-- results: one -->\n<!-- /results -->\n", RESULT, "no file"),
    ("<!-- results: two -->\n<!-- /results -->\n", {"columns": ["a"]}, "not a table"),
    ("<!-- results: two -->\n<!-- /results -->\n", RESULT | {"rows": [["short"]]}, "not a table"),
])
def test_marks_and_files_that_do_not_fit_are_named(tmp_path, text, result, message):
    (tmp_path / "two.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match=message):
        render_page(write_page(tmp_path, text), tmp_path)
