"""Tables of benchmark results: printed, and written to results.csv, results.json and results.md.

Notation
    tracker  the model, a baseline, or predictions of another tracker; its results are files NAME.json in one folder
    mean     plain mean over the videos, as in TAP-Vid; for metrics that are not defined in some videos (temporal
             coherence, precision and recall of "occluded"), over the others
"""

import csv
import io
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from common.files import read_json, write_json, write_text
from evaluation.tables import COLUMNS, NAME_WIDTH, PRINTED, markdown, print_header, print_row
from evaluation.video_job import Job
from training.run_metadata import versions

ADVICE = "remove it, and run the same command again"
PAPER_RESULTS = Path(__file__).with_name("paper_results.csv")
STAGES = ("frames", "preprocess", "train", "track")  # stages whose wall time is recorded


@dataclass
class Table:
    """One tracker's results."""
    tracker: str
    videos: dict[str, dict] = field(default_factory=dict)  # name -> content of NAME.json, in the benchmark's order
    failed: dict[str, str] = field(default_factory=dict)   # name -> error, one line
    own: bool = True                                       # False: from a folder of --compare

    def mean(self) -> dict[str, float]:
        """Mean of every metric over the videos; empty if there are none."""
        metrics = [record["metrics"] for record in self.videos.values()]
        keys = list(dict.fromkeys(key for row in metrics for key in row))
        return {key: sum(row[key] for row in metrics if key in row) / sum(key in row for row in metrics)
                for key in keys}

    def seconds(self) -> dict[str, float]:
        """Wall time of every stage in seconds, summed over the videos."""
        return {stage: round(sum(record["seconds"].get(stage, 0) for record in self.videos.values()), 1)
                for stage in STAGES if any(stage in record["seconds"] for record in self.videos.values())}


def collect(results: Path, names: list[str], compared: list[Path]) -> list[Table]:
    """The tables of all trackers in a results folder, the model first, then those of other results folders.

    UserError if a compared folder has no results."""
    tables = _tables(results, names)
    for folder in compared:
        other = _tables(folder, names)
        if not other:
            raise UserError(f"{folder} has no results: --compare takes results folders, as out/EXPNAME_BENCHMARK/first")
        prefix = folder.resolve().parent.name
        tables += [Table(f"{prefix}/{table.tracker}", table.videos, table.failed, own=False) for table in other]
    return tables


def _tables(results: Path, names: list[str]) -> list[Table]:
    order = {"model": 0, "multiflow": 2, "chain": 3, "static": 4}
    folders = [path.parent for path in results.glob("*/settings.json")]
    tables = []
    for folder in sorted(folders, key=lambda path: (order.get(path.name, 1), path.name)):
        table = Table(folder.name)
        for name in names:
            failure = folder / f"{name}.failed.json"
            result = folder / f"{name}.json"
            if failure.is_file():
                table.failed[name] = _failure(failure)
            elif result.is_file():
                table.videos[name] = _record(result)
        if table.videos or table.failed:
            tables.append(table)
    return tables


def _record(path: Path) -> dict:
    """Content of a result file. UserError if a value that the reports need is missing."""
    record = read_json(path, ADVICE)
    counts = [record.get("num_queries"), record.get("num_frames")]
    numbers = [record.get("metrics"), record.get("seconds")]
    if not (all(isinstance(count, int) for count in counts)
            and all(isinstance(table, dict) for table in numbers)
            and all(isinstance(value, int | float) for table in numbers for value in table.values())
            and isinstance(record.get("machine"), str)):
        raise UserError(f"{path} is damaged: {ADVICE}")
    return record


def _failure(path: Path) -> str:
    return str(read_json(path, ADVICE).get("error", "no reason is given"))


def one_line(job: Job, tracker: str) -> str:
    """The result of a tracker on one video, in one line."""
    if job.failure(tracker).is_file():
        return f"{job.name}: {tracker} failed: {_failure(job.failure(tracker))}"
    if not job.result(tracker).is_file():
        return f"{job.name}: {tracker} has no result"
    record = _record(job.result(tracker))
    cells = [f"{title} {record['metrics'][key]:.3f}" for key, title in COLUMNS.items() if key in record["metrics"]]
    return f"{job.name}: {tracker} {', '.join(cells)}; {sum(record['seconds'].values()):.0f} s"


def print_tables(tables: list[Table], benchmark: str, query_mode: str, names: list[str]) -> None:
    """Print the results of the first tracker for each video, and the means of all trackers."""
    first = tables[0] if tables else Table("model")
    print_header(f"{benchmark}, query mode {query_mode}", first.tracker, ("seconds",))
    for name in names:
        if name in first.failed:
            print(f"{name + ' ':{NAME_WIDTH}}failed: {first.failed[name]}")
        elif name in first.videos:
            record = first.videos[name]
            print_row(name, record["metrics"], f"{sum(record['seconds'].values()):11.0f}")
    for table in tables:
        print_row(f"mean of {len(table.videos)}, {table.tracker}", table.mean(),
                  f"{sum(table.seconds().values()):11.0f}")
    if missing := len(names) - len(first.videos) - len(first.failed):
        print(f"{missing} of {len(names)} videos are not done yet")


def write_reports(results: Path, benchmark: str, tables: list[Table], names: list[str], options: Namespace) -> None:
    """Write results.csv, results.json and results.md to the results folder, from all available results."""
    own = [table for table in tables if table.own]
    write_text(results / "results.csv", _csv(own))
    write_json(results / "results.json", {
        "benchmark": benchmark, "query_mode": options.query_mode, "num_videos": len(names),
        "trackers": {table.tracker: {
            "mean": table.mean(), "num_videos": len(table.videos), "seconds": table.seconds(),
            "videos": table.videos, "failed": table.failed,
            "missing": [name for name in names if name not in table.videos and name not in table.failed],
            "settings": read_json(results / table.tracker / "settings.json", ADVICE),
        } for table in own},
        "config": vars(options), "versions": versions(), "seed": options.seed})
    write_text(results / "results.md", _markdown(results, benchmark, tables, names, options))


def _csv(tables: list[Table]) -> str:
    metrics = list(dict.fromkeys([*COLUMNS, *(key for table in tables for key in table.mean())]))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["tracker", "video", "num_queries", "num_frames", *metrics,
                     *(f"seconds_{stage}" for stage in STAGES), "error"])
    for table in tables:
        for name, record in table.videos.items():
            writer.writerow([table.tracker, name, record["num_queries"], record["num_frames"],
                             *(record["metrics"].get(key, "") for key in metrics),
                             *(record["seconds"].get(stage, "") for stage in STAGES), ""])
        for name, error in table.failed.items():
            writer.writerow([table.tracker, name, *[""] * (2 + len(metrics) + len(STAGES)), error])
        mean, seconds = table.mean(), table.seconds()
        writer.writerow([table.tracker, f"mean of {len(table.videos)}", "", "", *(mean.get(key, "") for key in metrics),
                         *(seconds.get(stage, "") for stage in STAGES), ""])
    return out.getvalue()


def _markdown(results: Path, benchmark: str, tables: list[Table], names: list[str], options: Namespace) -> str:
    H = options.tapvid_size
    own = [table for table in tables if table.own]
    lines = [f"# {benchmark}, query mode {options.query_mode}", "",
             "Percent, as papers write them, at 256x256; TC (temporal coherence) in pixels per squared frame, 0 is "
             "best; occ_prec and occ_recall: precision and recall of occlusion. "
             f"Frames of {f'{H}x{H}' if H else 'the size they have in the file'}.", "", "## Means", "",
             markdown(["tracker", "videos", *PRINTED.values(), "hours"], [
                 [table.tracker, f"{len(table.videos)} of {len(names)}", *_percents(table.mean(), PRINTED),
                  f"{sum(table.seconds().values()) / 3600:.2f}"] for table in tables])]
    if any(len(table.videos) < len(names) for table in own):
        lines += ["", "Not all videos are in every mean: such a mean is not the benchmark's, and cannot be compared "
                  "with those of papers."]
    lines += _paper_lines(benchmark, options)
    for table in own:
        lines += ["", f"## {table.tracker}, video by video", "", _video_table(table), *_failure_lines(table)]
    programs = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines += ["", "## Settings and times", "", f"Seed {options.seed}. {programs}.",
              "Machines: " + "; ".join(sorted({r["machine"] for t in tables for r in t.videos.values()})) + ".",
              "Times are wall times, added up over interrupted runs; a killed process's last stage is not counted.", ""]
    for table in own:
        settings = read_json(results / table.tracker / "settings.json", ADVICE)
        given = (f"{name} {value}" for name, value in settings.items() if value not in (None, ""))
        lines += [f"{table.tracker}: " + ", ".join(given) + ".", ""]
    lines += ["![](curves.png)", "![](videos.png)", "![](since_query.png)", ""]
    return "\n".join(lines)


def _video_table(table: Table) -> str:
    """Markdown table of a tracker's metrics and times on every video; a failed video has its error instead."""
    rows = []
    for name, record in table.videos.items():
        seconds = [f"{record['seconds'][stage]:.0f}" if stage in record["seconds"] else "" for stage in STAGES]
        rows.append([name, str(record["num_queries"]), *_percents(record["metrics"]), *seconds])
    rows += [[name, f"failed: {error.replace('|', '/')}"] for name, error in table.failed.items()]
    return markdown(["video", "queries", *COLUMNS.values(), *(f"{stage} (s)" for stage in STAGES)], rows)


def _failure_lines(table: Table) -> list[str]:
    """The failures that training/failure_modes.py found in the models, one line each."""
    return [line for name, record in table.videos.items()
            for failure in record.get("diagnosis", {}).get("warnings", []) for line in ("", f"{name}: {failure}")]


def paper_rows(benchmark: str, query_mode: str) -> list[dict[str, str]]:
    """Rows of paper_results.csv for a benchmark (its key is part of the file's name) and query mode.

    UserError if the file lacks a column."""
    with open(PAPER_RESULTS, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {"benchmark", "query_mode", "tracker", "kind", "AJ", "delta_avg", "OA", "TC", "source", "note"}
    if not rows or columns - rows[0].keys():
        raise UserError(f"{PAPER_RESULTS} must have the columns {', '.join(sorted(columns))}")
    return [row for row in rows if row["benchmark"] in benchmark and row["query_mode"] == query_mode]


def _paper_lines(benchmark: str, options: Namespace) -> list[str]:
    rows = paper_rows(benchmark, options.query_mode)
    if not rows:
        return ["", f"No results from papers are known for {benchmark} in the query mode {options.query_mode}."]
    lines = ["", "## Results from papers", "", "Percent. Each row as its source prints it; where two sources "
             "differ, both are here. Optimized: fitted to each video. Feed-forward: trained on other videos."]
    if options.tapvid_size != 256:
        lines += ["", "These are at TAP-Vid's 256x256; the means above are not."]
    columns = ("tracker", "kind", *COLUMNS.values(), "source", "note")
    return [*lines, "", markdown(columns, [[row[column] for column in columns] for row in rows])]


def _percents(metrics: dict[str, float], columns: Iterable[str] = COLUMNS) -> list[str]:
    """Cells of a Markdown table: percent, but pixels for temporal coherence; "-" for a metric that is not defined."""
    cells = []
    for key in columns:
        if key not in metrics:
            cells.append("-")
        elif key == "temporal_coherence":
            cells.append(f"{metrics[key]:.2f}")
        else:
            cells.append(f"{100 * metrics[key]:.1f}")
    return cells
