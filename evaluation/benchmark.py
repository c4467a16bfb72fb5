"""Run a benchmark (eval.py --tapvid FILE): write the frames of all videos, run the stages of each, write the report."""

import json
import logging
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.errors import UserError
from common.files import read_json, write_json
from configs.options import OPTIONS
from evaluation.plots import draw_plots
from evaluation.report import collect, one_line, print_tables, write_reports
from evaluation.runners import run_here, run_on_ray
from evaluation.scoring import BASELINES, chosen_baselines
from evaluation.video_job import Job, record_failure, write_sequence
from loaders.tapvid import benchmark_name, open_benchmark
from preprocessing.options import main_parser
from preprocessing.pipeline import chain_settings

log = logging.getLogger("eval")
TRAINING = ("data", "model", "optimization")  # groups of options on which a trained model depends
UNCHECKED_OPTIONS = {"num_imgs"}  # options of these groups that may differ: the benchmark defines the frames
# options of `python -m preprocessing` that select frames
FRAME_OPTIONS = ("video", "resize", "short_side", "start", "stop", "stride", "max_frames", "scene", "allow_gaps")
# options of `python -m preprocessing` that do not affect the correspondences
RESOURCE_OPTIONS = {"data_dir", "max_pixels", "num_workers", "resume", "max_memory", "device", "weights_dir", "offline",
                    "batch"}


def run_benchmark(options: Namespace) -> None:
    """Compute missing results and write reports of all results. UserError for a user's mistake; SystemExit 1 if a video
    failed, 130 if a signal stopped the run."""
    check_options(options)
    benchmark = benchmark_name(options.tapvid)
    root = Path(options.save_dir).resolve() / f"{options.expname}_{benchmark}"
    results = root / options.query_mode
    trackers = chosen_trackers(options)
    for tracker in trackers:
        check_settings(results / tracker, "*.npz", tracker_settings(options, tracker))
    if "model" in trackers:
        check_settings(root / "runs", "*/model_*.pth", training_settings(options))
    names, jobs, unreadable = prepare(options, root, trackers)
    todo = [job for job in jobs if job.name not in unreadable and not job.is_done()]
    log.info("%s: %d of %d videos to do", benchmark, len(todo), len(jobs))
    if todo and options.ray:
        run_on_ray(todo, log_result, options.ray, options.num_cpus, options.num_gpus)
    elif todo:
        run_here(todo, log_result)
    compared = [Path(folder) for folder in options.compare.split(",") if folder]
    tables = collect(results, names, compared)
    write_reports(results, benchmark, tables, names, options)
    draw_plots(results, tables, f"{benchmark}, query mode {options.query_mode}")
    print_tables(tables, benchmark, options.query_mode, names)
    log.info("%s", results / "results.md")
    failed = {job.name for job in jobs for tracker in trackers if job.failure(tracker).is_file()}
    if failed:
        log.error("%d of %d videos failed: %s", len(failed), len(jobs), ", ".join(sorted(failed)))
        sys.exit(1)


def check_options(options: Namespace) -> None:
    """UserError for options that cannot be combined or have invalid values."""
    if options.ckpt_path:
        raise UserError("--ckpt_path is one video's model, --tapvid trains one for each video: give one of them")
    if not (options.score_model or options.predictions or options.baselines):
        raise UserError("--no-score_model leaves nothing to score: name baselines, as --baselines static,chain")
    if options.predictions and not Path(options.predictions).is_dir():
        raise UserError(f"no folder {options.predictions}: with --tapvid, --predictions is a folder of NAME.npz")
    chosen_baselines(options.baselines)
    shard_of(options.shard)
    for folder in filter(None, options.compare.split(",")):
        if not Path(folder).is_dir():
            raise UserError(f"no folder {folder}: --compare takes results folders, as out/EXPNAME_BENCHMARK/first")


def chosen_trackers(options: Namespace) -> tuple[str, ...]:
    """The trackers of this command: the model or predictions, then the baselines."""
    main = ["model"] if options.score_model else []
    if options.predictions:
        name = Path(options.predictions).resolve().name
        if name in ("model", *BASELINES):
            raise UserError(f"{options.predictions}: rename this folder, '{name}' names a tracker of this project")
        main = [name]
    return tuple(dict.fromkeys([*main, *chosen_baselines(options.baselines)]))


def shard_of(text: str) -> tuple[int, int]:
    """(I, N) of 'I/N'; (0, 1) if it is empty. UserError unless 0 <= I < N."""
    index, _, count = (text or "0/1").partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard {text}: give I/N with I from 0 to N-1, as 0/8 ... 7/8")
    return int(index), int(count)


def prepare(options: Namespace, root: Path, trackers: tuple[str, ...]) -> tuple[list[str], list[Job], set[str]]:
    """Write the sequence folders of the selected videos.

    Returns the names of all videos of the benchmark, the jobs of the selected videos, and the names of those that
    cannot be read; these get a failure file with the reason. UserError if the benchmark lacks a name of --videos."""
    folder = sequences_folder(options)
    wanted = set(filter(None, options.videos.split(",")))
    index, count = shard_of(options.shard)
    flow_frames = preprocessing_settings(options)["flow_frames"]
    names = []
    jobs = []
    unreadable = set()
    with logging_redirect_tqdm():
        for name, read in tqdm(open_benchmark(options.tapvid, options.max_pixels), desc="frames", unit="video"):
            names.append(name)
            if (wanted and name not in wanted) or (len(names) - 1) % count != index:
                continue
            job = _job(options, root, folder / name, trackers)
            jobs.append(job)
            try:
                write_sequence(job.sequence, read(), options.tapvid_size, flow_frames)
            except UserError as error:
                unreadable.add(name)
                for tracker in trackers:
                    record_failure(job, tracker, str(error))
                log.error("%s: %s", name, error)
    if unknown := wanted - set(names):
        raise UserError(f"{options.tapvid} has no video '{min(unknown)}': it has {', '.join(names[:40])}")
    return names, jobs, unreadable


def _job(options: Namespace, root: Path, sequence: Path, trackers: tuple[str, ...]) -> Job:
    own = {"data_dir": str(sequence), "save_dir": str(root / "runs"), "num_imgs": sys.maxsize,
           "predictions": _absolute(options.predictions)}
    return Job(sequence.name, sequence, root / options.query_mode, trackers, Namespace(**{**vars(options), **own}),
               torch.get_num_threads(), Path.cwd())


def sequences_folder(options: Namespace) -> Path:
    """Folder of the videos' sequence folders."""
    if options.sequences:
        return Path(options.sequences).resolve()
    return Path(options.save_dir).resolve() / "sequences" / benchmark_name(options.tapvid)


def training_settings(options: Namespace) -> dict:
    """All settings on which a trained model depends."""
    names = [option.name for option in OPTIONS if option.group in TRAINING]
    return {"seed": options.seed, "num_iters": options.num_iters, **preprocessing_settings(options),
            **{name: getattr(options, name) for name in names if name not in UNCHECKED_OPTIONS}}


def tracker_settings(options: Namespace, tracker: str) -> dict:
    """All settings on which a tracker's tracks depend."""
    if tracker == "model":
        names = [option.name for option in OPTIONS if option.group == "inference"]
        return training_settings(options) | {name: getattr(options, name) for name in names}
    if tracker in ("chain", "multiflow"):
        return preprocessing_settings(options)
    return {"tapvid_size": options.tapvid_size}


def preprocessing_settings(options: Namespace) -> dict:
    """Settings of the correspondences. UserError for an option that selects frames, since the benchmark defines them;
    SystemExit 2 for an option that `python -m preprocessing` does not have."""
    parser = main_parser()
    try:
        words = shlex.split(options.preprocessing)
    except ValueError as error:
        raise UserError(f"--preprocessing {options.preprocessing}: {error}") from error
    method = vars(parser.parse_args(["--data_dir", "", *words]))
    if changed := [name for name in FRAME_OPTIONS if method[name] != parser.get_default(name)]:
        raise UserError(f"--preprocessing {options.preprocessing}: the frames are the benchmark's, leave out "
                        f"--{changed[0]}")
    method |= chain_settings(method["chain"])
    return {"tapvid_size": options.tapvid_size,
            **{name: value for name, value in method.items() if name not in {*RESOURCE_OPTIONS, *FRAME_OPTIONS}}}


def check_settings(folder: Path, evidence: str, settings: dict) -> None:
    """Write the settings of the results in `folder` to settings.json, or compare them with it.

    UserError if the folder has results (files that match `evidence`) that were made with other settings."""
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    if not path.is_file() or not any(folder.glob(evidence)):
        write_json(path, settings)
        return
    before = read_json(path, "remove it and what is beside it")
    table = {option.name: option for option in OPTIONS}
    preprocessing = main_parser()
    for name in settings:
        then = before.get(name)
        if name not in before:  # the file has an old name of the option, or is older than the option
            old = [before[known] for known in table[name].old_names if known in before] if name in table else []
            default = table[name].default if name in table else preprocessing.get_default(name)
            then = old[0] if old else default
        if then != settings[name]:
            raise UserError(f"{folder} was made with {name} {then}, now it is {settings[name]}: give another "
                            "--expname, or remove that folder")


def log_result(job: Job) -> None:
    """Log the result of every tracker on a video, one line each."""
    for tracker in job.trackers:
        log.info("%s", one_line(job, tracker))


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if path else ""
