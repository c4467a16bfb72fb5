"""Markdown tables and their cells, shared by the benchmarks."""

import statistics
from collections.abc import Iterable, Sequence


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. Each row has one text for each column."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def spread(values: Sequence[float], format_: str = ".3f") -> str:
    """Mean ± standard deviation as text; only the value if there is one, "-" if there is none."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{format_}}"
    return f"{mean} ± {statistics.stdev(values):{format_}}" if len(values) > 1 else mean


def extent(values: Sequence[float], format_: str) -> str:
    """Smallest and largest value as text."""
    return f"{min(values):{format_}} to {max(values):{format_}}"
