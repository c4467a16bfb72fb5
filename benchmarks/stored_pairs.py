"""Coverage and error rate of stored correspondences: python -m benchmarks.stored_pairs seqs/a [seqs/b ...]

Prints a Markdown table with one row for each sequence folder, which needs correspondences and annotations.npz. Over
points annotated as visible in both frames of a stored pair, by interval (distance of the two frames), the cells have
the share with a stored correspondence, and the share of these that is more than 4 px (at 256x256) from the annotation.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.flow_sources import CORRECT_ERROR, by_interval, frame_pairs, interval_names, stored_ends
from common.cli import Parser
from evaluation.tables import markdown
from loaders.correspondences import open_correspondences
from loaders.sequence import open_sequence
from loaders.track_files import load_annotations

BINS = ((2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 1000))  # ranges of intervals, frames


def errors(root: str) -> np.ndarray:
    """Rows (interval, error in pixels at 256x256), one for each point and stored pair of non-adjacent frames.

    The error is NaN where the point has no stored correspondence."""
    sequence = open_sequence(root, None)
    store = open_correspondences(sequence)
    annotations = load_annotations(Path(root) / "annotations.npz", len(sequence)).resized(sequence.size)
    stored = set(map(tuple, store.pairs.tolist()))
    scale = 256 / np.array(store.size[::-1])
    out = [np.empty((0, 2))]
    for i, j, points in frame_pairs(annotations):
        if (i, j) in stored and abs(i - j) > 1:
            ends = stored_ends(store, i, j, annotations.points[points, i])
            error = np.linalg.norm((ends - annotations.points[points, j]) * scale, axis=-1)
            out.append(np.stack([np.full(len(points), abs(i - j)), error], axis=-1))
    return np.concatenate(out)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequences", nargs="+", help="sequence folders")
    rows = []
    for root in parser.parse_args().sequences:
        found = errors(root)
        cells = []
        for error in by_interval(found[:, 0], found[:, 1], BINS):
            known = error[~np.isnan(error)]
            cells.append(f"{len(known) / len(error):.0%}, {np.mean(known > CORRECT_ERROR):.1%}" if len(known) else "-")
        rows.append([root, *cells])
    print(markdown(["stored, of these wrong; by interval", *interval_names(BINS)], rows))


if __name__ == "__main__":
    main()
