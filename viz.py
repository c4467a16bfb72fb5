"""Visualize a trained run: python viz.py --config configs/default.txt --data_dir seqs/clip [--what tracks,trails,page]

Files are written to the run's folder, or to --out_dir. --what takes names separated by commas:
tracks      tracks of the query frame's points            depth      rendered depth
trails      foreground paths, camera motion removed       flow       flow from each frame to the next
occlusion   tracks colored by their occlusion scores      color      each frame beside its rendering
pairs       two frames and their correspondences          errors     flow errors accumulated in training
canonical   the canonical volume                          page       an interactive page, page.html
all         all of these except the page
"""

import common.interrupts  # first: Ctrl-C prints one line also while PyTorch is imported
import common.threads  # noqa: F401, before PyTorch: it loads OpenMP

# isort: split
from configs.options import parse

if __name__ == "__main__":
    parse("viz")  # --help and mistakes end here, before PyTorch is imported, which takes seconds

# isort: split
import logging
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import torch

from common.cli import run, start_logging
from common.errors import UserError
from common.files import check_writable
from drawing.output import FORMATS
from drawing.run_views import Views
from drawing.visualizations import VISUALIZATIONS
from inference.load_run import run_options

log = logging.getLogger("viz")


def visualize(options: Namespace) -> None:
    """Write every visualization that --what names."""
    names = chosen(options.what, "what", (*VISUALIZATIONS, "all"))
    formats = chosen(options.formats, "formats", FORMATS)
    if "all" in names:
        names = [name for name in VISUALIZATIONS if name != "page" or "page" in names]
    views = Views(options)
    folder = Path(options.out_dir or views.dir)
    check_writable(folder, "--out_dir")
    for name in names:
        for path in VISUALIZATIONS[name](views, folder / name, formats):
            log.info("%s", path)


def chosen(text: str, option: str, known: Iterable[str]) -> list[str]:
    """The names of a comma-separated option without repetitions. UserError for an unknown name."""
    names = list(dict.fromkeys(name for name in text.split(",") if name))
    for name in names:
        if name not in known:
            raise UserError(f"--{option} {text}: no '{name}', choose among {', '.join(known)}")
    return names


def main() -> None:
    start_logging()
    torch.set_flush_denormal(True)  # see train.py
    options = parse("viz", stored=run_options)
    visualize(options)


if __name__ == "__main__":
    run(main)
