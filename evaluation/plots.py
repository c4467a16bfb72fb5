"""Plots of a benchmark's results (matplotlib, PNG): accuracy by threshold, by video, error since the query."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from common.files import atomic_path
from evaluation.metrics import THRESHOLDS
from evaluation.report import Table

COLORS = ("#0b5fa5", "#d1661c", "#3f8f4f", "#8a5aa8", "#7a7a7a", "#b03a48")
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
MAX_BARS = 40  # largest number of videos drawn as bars with names; more are drawn as sorted dots


def draw_plots(results: Path, tables: list[Table], title: str) -> None:
    """Write curves.png, videos.png and since_query.png for the tables that have results."""
    tables = [table for table in tables if table.videos]
    if not tables:
        return
    plots = {"curves": (draw_curves, (9, 4.1)), "videos": (draw_videos, _videos_size(tables)),
             "since_query": (draw_since_query, (7, 4.3))}
    for name, (draw, size) in plots.items():
        with matplotlib.rc_context(STYLE):
            figure = Figure(size, dpi=150, layout="constrained")
            figure.suptitle(title, fontsize=10)
            draw(figure, tables)
            with atomic_path(results / f"{name}.png") as temporary:
                figure.savefig(temporary)


def draw_curves(figure: Figure, tables: list[Table]) -> None:
    """Position accuracy and Jaccard at each threshold, means over the videos."""
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, title in ((left, "pts_within", "position accuracy"), (right, "jaccard", "Jaccard")):
        for color, table in _colored(tables):
            mean = table.mean()
            axes.plot(THRESHOLDS, [mean[f"{key}_{d}"] for d in THRESHOLDS], "o-", color=color, label=_label(table))
        axes.set_xscale("log", base=2)
        axes.set_xticks(THRESHOLDS, [str(d) for d in THRESHOLDS])
        axes.set(xlabel="threshold (pixels at 256x256)", title=title, ylim=(0, 1))
        axes.grid(alpha=0.3)
    left.set_ylabel("share, mean over videos")
    left.legend(frameon=False)


def draw_videos(figure: Figure, tables: list[Table]) -> None:
    """Average Jaccard of every video, in the order of the first tracker's scores."""
    axes = figure.subplots()
    score = {table.tracker: {n: r["metrics"]["average_jaccard"] for n, r in table.videos.items()} for table in tables}
    names = sorted({n for row in score.values() for n in row}, key=lambda n: -score[tables[0].tracker].get(n, -1))
    for k, (color, table) in enumerate(_colored(tables)):
        values = [score[table.tracker].get(name, np.nan) for name in names]
        if len(names) > MAX_BARS:
            axes.plot(values, ".", color=color, label=_label(table))
        else:
            width = 0.8 / len(tables)
            axes.bar(np.arange(len(names)) + (k - (len(tables) - 1) / 2) * width, values, width, color=color,
                     label=_label(table))
    if len(names) > MAX_BARS:
        axes.set_xlabel(f"{len(names)} videos, sorted by {tables[0].tracker}")
    else:
        axes.set_xticks(np.arange(len(names)), names, rotation=45, ha="right")
    axes.set(ylabel="average Jaccard", ylim=(0, 1))
    axes.grid(axis="y", alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    columns = int(figure.get_figwidth() // (0.6 + 0.08 * max(map(len, labels))))  # widths in inches
    figure.legend(handles, labels, loc="outside lower center", ncols=min(max(columns, 1), len(labels)), frameon=False)


def draw_since_query(figure: Figure, tables: list[Table]) -> None:
    """Error over frames since the query: median over the points of a video, then mean over videos."""
    axes = figure.subplots()
    for color, table in _colored(tables):
        values: dict[int, list[float]] = {}
        for record in table.videos.values():
            curve = record["error_since_query"]
            for frame, median in zip(curve["frames"], curve["median"], strict=True):
                values.setdefault(frame, []).append(median)
        frames = sorted(values)
        axes.plot(frames, [max(np.mean(values[frame]), 0.01) for frame in frames], "-" if len(frames) > 20 else "o-",
                  markersize=3, color=color, label=_label(table))
    _log_pixels(axes)
    axes.set(xlabel="frames since the query", ylabel="median error (pixels at 256x256)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _log_pixels(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, max(high, 4 * low))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _colored(tables: list[Table]) -> list[tuple[str, Table]]:
    return [(COLORS[k % len(COLORS)], table) for k, table in enumerate(tables)]


def _label(table: Table) -> str:
    count = len(table.videos)
    return f"{table.tracker} ({count} video{'s' if count > 1 else ''})"


def _videos_size(tables: list[Table]) -> tuple[float, float]:
    count = max(len(table.videos) for table in tables)
    return (float(np.clip(2 + 0.5 * count, 6, 18)), 4.2)
