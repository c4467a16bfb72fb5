"""benchmarks.results: tables of the pages from committed JSON files."""

import json
from pathlib import Path

import pytest

from benchmarks.results import ROOT, add_tables, pages, render_page
from benchmarks.summary import rows_of_clip, rows_of_clips
from common.errors import UserError
from evaluation.tables import COLUMNS

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


def test_tables_of_benchmarks_are_added_with_their_commit(tmp_path):
    (tmp_path / "results").mkdir()
    without = {key: value for key, value in RESULT.items() if key != "commit"}
    (tmp_path / "two.json").write_text(json.dumps(without))
    add_tables([str(tmp_path / "two.json")], "abc1234", tmp_path / "results")
    assert json.loads((tmp_path / "results" / "two.json").read_text()) == RESULT
    (tmp_path / "metrics.json").write_text('{"rows": []}')
    with pytest.raises(UserError, match="has no columns"):
        add_tables([str(tmp_path / "metrics.json")], "abc1234", tmp_path / "results")


def test_the_summary_has_a_row_for_each_tracker_of_each_clip(tmp_path):
    """TC is left out where it is not given, and where few frames are annotated."""
    metrics = dict.fromkeys(COLUMNS, 0.5)
    (tmp_path / "a.json").write_text(json.dumps(metrics | {"baselines": {"chain": dict.fromkeys(COLUMNS, 0.25)}}))
    (tmp_path / "b.json").write_text(json.dumps(dict.fromkeys(COLUMNS, 0.75)))
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert rows_of_clip("x", "`p`", files, True) == [["x: DIS flow from frame to frame", *[0.25] * 4],
                                                     ["x: `p`", *[0.5] * 4], ["x: `p`, model only", *[0.75] * 4]]
    assert [row[-1] for row in rows_of_clip("x", "`p`", files, False)] == [None] * 3

    table = {"columns": ["clip", "frames", "static", "chain", "multiflow", "model", "tracks"],
             "rows": [["a", 3, *["0 / 0 / 0"] * 5], ["mean", None, *(f"0.{k} / 0.2 / 0.3" for k in range(5))]]}
    (tmp_path / "real_clips.json").write_text(json.dumps(table))
    rows = rows_of_clips(tmp_path)
    assert rows[0] == ["1 DAVIS clips, last frame: points that do not move", 0.0, 0.2, 0.3, None]
    assert rows[3][1:] == [0.4, 0.2, 0.3, None] and len(rows) == 5
