"""One video of a benchmark: frames -> correspondences -> model -> tracks -> score. The output of every stage is a file,
and a second run computes only missing files.

Files
    SEQUENCES/NAME/            the video as a sequence folder, made from the benchmark file, with its annotations and
                               query points; shared by experiments
    RESULTS/../runs/           the runs of train.py
    RESULTS/TRACKER/NAME.npz   tracks of the query points
    RESULTS/TRACKER/NAME.json  the result: metrics, times, versions; NAME.failed.json if there is none
    RESULTS/NAME.running       current stage, process and host; removed at the end
"""

import logging
import os
import platform
import shlex
import shutil
import socket
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.files import read_json, write_json
from configs.options import run_dir
from evaluation.baselines import static_tracks
from evaluation.scoring import BASELINES, as_point_tracks, baseline_tracks, error_curve, load_predictions, score
from inference.load_run import load_run
from inference.processes import train
from loaders.images import write_png
from loaders.sequence import FLOW_FRAMES, data_hash, open_sequence
from loaders.tapvid import TapVideo, resize_frames
from loaders.track_arrays import SUFFIXES
from loaders.track_files import (
    Annotations,
    PointTracks,
    load_annotations,
    sample_queries,
    save_annotations,
    save_queries,
    save_tracks,
)
from preprocessing.cli import preprocess
from preprocessing.extract_frames import say_without_flow_frames, write_flow_frame
from training.failure_modes import diagnosis_at
from training.run_metadata import versions

log = logging.getLogger("eval")
QUERY_MODES = ("first", "strided")


@dataclass(frozen=True)
class Job:
    """One video and its trackers. Jobs are pickled for other processes and machines, so all paths are absolute."""
    name: str
    sequence: Path             # sequence folder
    results: Path              # folder of the trackers' results in this query mode
    trackers: tuple[str, ...]  # "model", "static", "chain", "multiflow", or the name of a folder of predictions
    options: Namespace         # the options of eval.py, with the video's own data_dir and save_dir
    threads: int               # PyTorch threads; the rounding of sums on the CPU depends on it
    cwd: Path                  # base of relative paths in the options

    def result(self, tracker: str) -> Path:
        """The tracker's result file."""
        return self.results / tracker / f"{self.name}.json"

    def failure(self, tracker: str) -> Path:
        """The tracker's failure file, which has the reason why there is no result."""
        return self.results / tracker / f"{self.name}.failed.json"

    def is_done(self) -> bool:
        """Whether all results exist. Predictions are always scored again, since their files may have changed."""
        return not self.options.predictions and all(
            self.result(tracker).is_file() and not self.failure(tracker).is_file() for tracker in self.trackers)


def write_sequence(root: Path, video: TapVideo, side: int, flow_frames: bool = True) -> None:
    """Write a benchmark's video as the sequence folder `root`, atomically; an existing folder is not changed.

    side: pixels, of square frames; 0: the video's own size. Image files of the right size are copied as they are.
    flow_frames: where frames have fewer pixels than the video, also write flow_frames/.
    UserError if the folder holds another video or another size of it."""
    before = time.monotonic()
    size = (side, side) if side else video.frames.shape[1:3]
    truth = video.annotations
    parts = (video.frames, truth.points[~truth.occluded], truth.occluded, truth.evaluated, truth.query_points)
    source = {"frames": len(video.frames), "size": list(size),
              "hash": data_hash(np.ascontiguousarray(part) for part in parts if part is not None)}
    path = root / "source.json"
    if path.is_file():
        if read_json(path, "remove its folder, or give another --sequences") != source:
            raise UserError(f"{root} was made from another video or with another --tapvid_size: remove it, or give "
                            "another --sequences")
        if flow_frames:
            say_without_flow_frames(root, video.frames.shape[1:3], size)
        return
    if root.exists():
        raise UserError(f"{root} is there already and was not made from a benchmark: give another --sequences")
    partial = root.with_name(f".tmp-{os.getpid()}-{root.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_frames(partial / "color", video, size)
        if flow_frames:
            for t, frame in enumerate(video.frames):
                write_flow_frame(partial / FLOW_FRAMES / f"{t:05d}.jpg", frame, size)
        truth = truth.resized(size)
        save_annotations(partial / "annotations.npz", truth)
        for mode in QUERY_MODES:
            if _has_queries(truth, mode):
                save_queries(partial / f"queries_{mode}.npz", sample_queries(truth, mode)[0], size)
        write_json(partial / "source.json", source)
        _add_seconds(partial, "frames", time.monotonic() - before)
        try:
            partial.replace(root)
        except OSError:
            if not path.is_file():  # otherwise another process wrote it first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def run_video(job: Job) -> None:
    """Run all trackers on one video and write a result file for each. An error is written to the tracker's failure file
    and does not stop the other trackers. SystemExit 130 if a signal stopped training."""
    os.chdir(job.cwd)
    torch.set_num_threads(job.threads)
    prepare = cache(lambda: _preprocess(job))  # once for all trackers
    try:
        for tracker in job.trackers:
            job.failure(tracker).unlink(missing_ok=True)
            if job.result(tracker).is_file() and not job.options.predictions:
                continue
            try:
                _run_tracker(job, tracker, prepare)
            except UserError as error:
                record_failure(job, tracker, str(error))
            except Exception as error:  # one failed video must not end the benchmark; its traceback is kept
                record_failure(job, tracker, f"{type(error).__name__}: {error}", traceback.format_exc())
    finally:
        running_file(job).unlink(missing_ok=True)


def record_failure(job: Job, tracker: str, error: str, details: str = "") -> None:
    """Write the failure file of a tracker: the error, and its traceback in `details`."""
    failure = {"video": job.name, "error": " ".join(error.split()), "details": details}
    write_json(job.failure(tracker), failure)


def running_file(job: Job) -> Path:
    """The file with the current stage of the video."""
    return job.results / f"{job.name}.running"


def _run_tracker(job: Job, tracker: str, prepare: Callable[[], None]) -> None:
    mode = job.options.query_mode
    run = run_dir(job.options)
    seconds = {}
    truth = load_annotations(job.sequence / "annotations.npz")
    queries, rows = sample_queries(truth, mode)
    static = static_tracks(queries, truth.points.shape[1], truth.frame_size)
    score(static, truth, rows, mode)  # raises UserError if there is nothing to score, before hours of training
    if job.options.predictions:
        tracks, truth, rows = _predictions(job, truth)
    elif tracker == "static":
        tracks = static
    else:
        if tracker != "multiflow":  # which needs the frames only
            prepare()
            seconds |= _seconds(job.sequence)
        if tracker == "model":
            with _stage(job, "train", run):
                train(job.options, job.threads)
            seconds |= _seconds(run)
        before = time.monotonic()
        with _stage(job, "track"):
            tracks = _track(job, tracker, queries)
        seconds["track"] = round(time.monotonic() - before, 2)
    diagnosis = diagnosis_at(run, job.options.num_iters) if tracker == "model" else None
    save_tracks(job.result(tracker).with_suffix(".npz"), tracks)
    write_json(job.result(tracker), {
        "video": job.name, "query_mode": mode, "num_queries": len(tracks.tracks),
        "num_frames": tracks.tracks.shape[1], "frame_size": list(tracks.frame_size),
        "metrics": score(tracks, truth, rows, mode), "error_since_query": error_curve(tracks, truth, rows, mode),
        "seconds": seconds, "seed": job.options.seed, "threads": job.threads,
        "machine": machine(job.options.device), "versions": versions(),
        **({"diagnosis": diagnosis} if diagnosis else {})})


def _preprocess(job: Job) -> None:
    with _stage(job, "preprocess", job.sequence):
        preprocess(["--data_dir", str(job.sequence), "--resume", *shlex.split(job.options.preprocessing)])


def _predictions(job: Job, truth: Annotations) -> tuple[PointTracks, Annotations, np.ndarray]:
    folder = Path(job.options.predictions)
    paths = [path.with_name(path.name + suffix) for path in (folder / job.name, folder / job.name / "tracks")
             for suffix in SUFFIXES]
    found = [path for path in paths if path.is_file()]
    queries = job.sequence / f"queries_{job.options.query_mode}.npz"
    if not found:
        raise UserError(f"no file {paths[0]}: track the query points of {queries} in {job.sequence / 'color'}")
    return load_predictions(found[0], truth, job.options.query_mode, str(queries), job.options.visible_th)


def _track(job: Job, tracker: str, queries: np.ndarray) -> PointTracks:
    if tracker in BASELINES:
        sequence = open_sequence(job.sequence, None, job.options.max_pixels)
        return baseline_tracks(tracker, sequence, queries, job.options.preprocessing)
    run = load_run(job.options)
    return as_point_tracks(run.tracker.track(queries), queries, run.sequence.size)


@contextmanager
def _stage(job: Job, stage: str, folder: Path | None = None) -> Iterator[None]:
    """Write the running file, and add the wall time of the stage to FOLDER/seconds.json, also if it is interrupted."""
    running = {"video": job.name, "stage": stage, "pid": os.getpid(), "host": socket.gethostname()}
    write_json(running_file(job), running)
    before = time.monotonic()
    try:
        yield
    finally:
        if folder is not None:
            _add_seconds(folder, stage, time.monotonic() - before)


def _add_seconds(folder: Path, stage: str, seconds: float) -> None:
    total = _seconds(folder)
    total[stage] = round(total.get(stage, 0.0) + seconds, 2)
    write_json(folder / "seconds.json", total)


def _seconds(folder: Path) -> dict[str, float]:
    """Wall time in seconds of the stages whose output is in the folder, summed over interrupted runs."""
    path = folder / "seconds.json"
    found = read_json(path, "remove it") if path.is_file() else {}
    return {stage: float(value) for stage, value in found.items() if isinstance(value, int | float)}


def _write_frames(color: Path, video: TapVideo, size: tuple[int, int]) -> None:
    color.mkdir(parents=True)
    if video.files and video.frames.shape[1:3] == tuple(size):
        for path in video.files:
            shutil.copyfile(path, color / path.name)
        return
    for t, frame in enumerate(resize_frames(video.frames, size)):
        write_png(color / f"{t:05d}.png", frame)


def _has_queries(truth: Annotations, mode: str) -> bool:
    try:
        return len(sample_queries(truth, mode)[0]) > 0
    except UserError:  # no point is visible; run_video reports this error
        return False


def machine(device: str) -> str:
    """The processor, or the GPU, that results were computed on."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
