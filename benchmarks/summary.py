"""The README's table of results, readme.json: python -m benchmarks.summary --clips OUT --demo METRICS --bear METRICS

CLIPS is the folder of the results of benchmarks.real_clips. DEMO and BEAR are each the metrics.json of eval.py with
baselines, and that of the model alone (--no-follow_flow --out FILE).
"""

from pathlib import Path

from common.cli import Parser, run
from common.errors import UserError
from common.files import read_json, write_json
from evaluation.tables import COLUMNS, markdown

BASELINES = {"static": "points that do not move", "chain": "DIS flow from frame to frame",
             "multiflow": "DIS flow over several intervals"}
TITLES = list(COLUMNS.values())  # AJ, delta_avg, OA, TC
COMMAND = ("python -m benchmarks.real_clips --clips davis`, `make demo`, and, for the bear, `eval.py --config "
           "configs/fast.txt --expname bear --data_dir seqs/bear --annotations annotations.npz --query_mode first "
           "--baselines static,chain,multiflow")


def rows_of_clips(folder: Path) -> list[list]:
    """Rows of the mean over the real clips."""
    path = folder / "real_clips.json"
    table = read_json(path, "run benchmarks.real_clips first")
    try:
        means = dict(zip(table["columns"], table["rows"][-1], strict=True))
        name = f"{len(table['rows']) - 1} DAVIS clips, last frame"
        trackers = BASELINES | {"tracks": "`fast.txt`", "model": "`fast.txt`, model only (`--no-follow_flow`)"}
        return [[f"{name}: {text}", *map(float, means[tracker].split(" / ")), None]
                for tracker, text in trackers.items()]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is no table of benchmarks.real_clips: run it again") from error


def rows_of_clip(name: str, preset: str, files: list[str], coherence: bool) -> list[list]:
    """Rows of a clip. files: metrics of its tracks with baselines, and of the model alone."""
    tracks, alone = (read_json(Path(file), "score the run with eval.py") for file in files)
    scored = {text: tracks["baselines"][key] for key, text in BASELINES.items() if key in tracks.get("baselines", {})}
    scored |= {preset: tracks, f"{preset}, model only": alone}
    return [[f"{name}: {text}", *(metrics[key] if title != "TC" or coherence else None
                                  for key, title in COLUMNS.items())] for text, metrics in scored.items()]


def main() -> None:
    parser = Parser(prog="python -m benchmarks.summary", description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=Path, required=True, help="folder with real_clips.json")
    for name in ("demo", "bear"):
        parser.add_argument(f"--{name}", nargs=2, required=True, metavar=("METRICS", "ALONE"),
                            help="its metrics.json, and that of the model alone")
    parser.add_argument("--out", type=Path, default=Path("out/readme.json"), help="file of the table")
    args = parser.parse_args()
    rows = [*rows_of_clips(args.clips), *rows_of_clip("`make demo`", "`demo.txt`, 1,000 steps", args.demo, True),
            *rows_of_clip("bear, 82 frames", "`fast.txt`, 3,000 steps", args.bear, False)]
    columns = ["clip and tracker", *TITLES]
    write_json(args.out, {"title": "", "columns": columns, "rows": rows, "digits": 3, "command": COMMAND})
    print(markdown(columns, [["" if cell is None else str(cell) for cell in row] for row in rows]))


if __name__ == "__main__":
    run(main)
