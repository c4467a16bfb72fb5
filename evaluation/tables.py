"""Tables of metrics on the terminal, and Markdown tables."""

from collections.abc import Iterable, Sequence

COLUMNS = {"average_jaccard": "AJ", "average_pts_within_thresh": "delta_avg", "occlusion_accuracy": "OA",
           "temporal_coherence": "TC"}
OCCLUSION_COLUMNS = {"occluded_precision": "occ_prec", "occluded_recall": "occ_recall"}
PRINTED = COLUMNS | OCCLUSION_COLUMNS  # columns on the terminal
UNITS = ("fractions at 256x256; TC in pixels per squared frame, 0 is best; occ_prec, occ_recall: precision and recall "
         "of occlusion")
NAME_WIDTH = 28  # characters of the first column of a printed table, if no name is longer


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. Each row has one text for each column."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def print_header(title: str, first_column: str = "", more: tuple[str, ...] = ()) -> None:
    """Print the title and the header of a table of metrics; `more` names columns after the metrics."""
    print(f"{title}; {UNITS}")
    print(f"{first_column + ' ':{NAME_WIDTH}}" + "".join(f"{column:>11}" for column in (*PRINTED.values(), *more)))


def print_row(name: str, metrics: dict[str, float], more: str = "") -> None:
    """Print one row of a table of metrics, with "-" for a metric that is not defined."""
    cells = (f"{metrics[key]:11.3f}" if key in metrics else f"{'-':>11}" for key in PRINTED)
    print(f"{name + ' ':{NAME_WIDTH}}" + "".join(cells) + more)
