"""Score or write tracks: python eval.py --config configs/default.txt --data_dir seqs/clip --annotations gt.npz

--annotations GT               score the model's tracks against ground truth; --baselines static,chain adds baselines
--queries Q --out TRACKS       write tracks of any query points, without a score
--predictions TRACKS --annotations GT   score tracks of any tracker (.npz .npy .pt), without a model
--predictions TRACKS --out FILE         convert tracks; the ending of FILE sets the format: .npz .csv .pt .nuke .ae
                                        .blender.py .rrd
--tapvid FILE                  run a benchmark: preprocess, train, track and score every video
"""

import common.interrupts  # first: Ctrl-C prints one line also while PyTorch is imported
import common.threads  # noqa: F401, before PyTorch: it loads OpenMP

# isort: split
from configs.options import parse

if __name__ == "__main__":
    parse("eval")  # --help and mistakes end here, before PyTorch is imported, which takes seconds

# isort: split
from argparse import Namespace

import torch

from common.cli import run, start_logging
from common.errors import UserError
from evaluation.benchmark import run_benchmark
from evaluation.single_video import check_modes, convert_tracks, score_model, score_predictions, track_queries
from inference.load_run import run_options


def evaluate(options: Namespace) -> None:
    """Run the mode that the options select."""
    check_modes(options)
    if options.tapvid:
        run_benchmark(options)
    elif options.predictions and options.out and not options.annotations:
        convert_tracks(options)
    elif options.predictions:
        score_predictions(options)
    elif options.queries:
        track_queries(options)
    elif options.annotations:
        score_model(options)
    else:
        raise UserError("nothing to do: say --annotations FILE, --queries FILE, --predictions FILE, or --tapvid FILE")


def main() -> None:
    start_logging()
    torch.set_flush_denormal(True)  # see train.py
    options = parse("eval", stored=lambda given: {} if given.tapvid or given.predictions else run_options(given))
    evaluate(options)


if __name__ == "__main__":
    run(main)
