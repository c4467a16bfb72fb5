"""Cells of the benchmarks' tables."""

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], format_: str = ".3f") -> str:
    """Mean ± standard deviation as text; only the value if there is one, "-" if there is none."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{format_}}"
    return f"{mean} ± {statistics.stdev(values):{format_}}" if len(values) > 1 else mean


def extent(values: Sequence[float], format_: str) -> str:
    """Smallest and largest value as text."""
    return f"{min(values):{format_}} to {max(values):{format_}}"
