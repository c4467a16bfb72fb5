"""`python -m preprocessing`: see preprocessing/cli.py."""

import common.interrupts  # first: Ctrl-C prints one line also while PyTorch is imported
import common.threads  # noqa: F401, before PyTorch: it loads OpenMP

# isort: split
import sys

from preprocessing.options import parse

if __name__ == "__main__":
    parse(sys.argv[1:])  # --help and mistakes end here, before PyTorch is imported, which takes seconds

# isort: split
from common.cli import run
from preprocessing.cli import main

if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
