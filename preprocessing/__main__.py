"""`python -m preprocessing`: see preprocessing/cli.py."""

import sys

from common.cli import run
from preprocessing.cli import main

if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
