"""The stages of preprocessing: frames -> features -> filtered flow of every pair -> chains -> correspondence store.

Notation
    T         frames
    i, j      frames; a task is one unordered pair (flow both ways), then one source frame (its chains, its row file)
Threads do the tasks: OpenCV and PyTorch compute outside Python's lock, and threads share the frames and features. What
a task writes depends on the frames and settings alone, so a resumed store has the bytes of an uninterrupted one.
"""

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from loaders.sequence import VideoSequence
from loaders.store import (
    FOLDER,
    CorrespondenceStore,
    StoreWriter,
    check_same,
    describe,
    open_correspondences,
    read_meta,
)
from preprocessing.chaining import chain_row
from preprocessing.features import FEATURE_EXTRACTORS
from preprocessing.filtering import filter_flow
from preprocessing.flow import FLOW_ESTIMATORS

log = logging.getLogger(__name__)
BINS = ((1, 1), (2, 2), (3, 5), (6, 10), (11, 20), (21, 40), (41, 10_000))  # intervals of the summary


@dataclass(frozen=True)
class Method:
    """How correspondences are made; the store keeps it in meta.json."""
    flow: str = "dis"
    features: str = "sift"
    cycle_th: float = 3.0  # pixels
    chain: bool = False


def build_store(sequence: VideoSequence, method: Method, resume: bool = False,
                num_workers: int = 1) -> CorrespondenceStore:
    """Make the sequence's correspondence store, or open it if it is there.

    UserError if there is a store, or with `resume` an unfinished one, of other frames or another method."""
    extract = FEATURE_EXTRACTORS[method.features]()
    settings = {**vars(method), "feature_th": extract.threshold}
    meta = sequence.root / FOLDER / "meta.json"
    if meta.is_file():
        check_same(read_meta(meta), describe(sequence, settings), meta)
        log.info("%s is finished already: left as it is", meta.parent)
        return open_correspondences(sequence)
    writer = StoreWriter(sequence, settings, resume)
    frames = sequence.frames()
    with _single_threaded():
        features = [None] * len(frames)

        def describe_frame(t: int) -> None:
            features[t] = extract(frames[t])

        run_tasks(describe_frame, range(len(frames)), num_workers, "features")
        _flow_stage(writer, frames, features, method, extract.threshold, num_workers)
        _row_stage(writer, frames, features, method, extract.threshold, num_workers)
    writer.finish()
    return open_correspondences(sequence)


def _flow_stage(writer: StoreWriter, frames: np.ndarray, features: list, method: Method, feature_th: float,
                num_workers: int) -> None:
    """Flow of all pairs, both ways, filtered."""
    estimators = {close: FLOW_ESTIMATORS[method.flow](close) for close in (False, True)}

    def task(pair: tuple[int, int]) -> None:
        i, j = pair
        estimate = estimators[j - i == 1]
        flow_ij, flow_ji = estimate(frames[i], frames[j]), estimate(frames[j], frames[i])
        for a, b, there, back in ((i, j, flow_ij, flow_ji), (j, i, flow_ji, flow_ij)):
            flags = filter_flow(there, back, features[a], features[b], j - i, method.cycle_th, feature_th)
            writer.write(a, b, there, *flags)

    T = len(frames)
    pairs = [(i, j) for i in range(T) for j in range(i + 1, T) if not (writer.has(i, j) and writer.has(j, i))]
    run_tasks(task, pairs, num_workers, "flow")


def _row_stage(writer: StoreWriter, frames: np.ndarray, features: list, method: Method, feature_th: float,
               num_workers: int) -> None:
    """The row file of every source frame, with chains if the method has them."""

    def task(i: int) -> None:
        if method.chain:
            for j, flow, cycle, occlusion in chain_row(i, frames, features, writer.dense, feature_th):
                if abs(i - j) > 1:
                    writer.write(i, j, flow, cycle, occlusion, chained=True)
        writer.pack(i)

    rows = [i for i in range(len(frames)) if not writer.has_row(i)]
    run_tasks(task, rows, num_workers, "chains" if method.chain else "packing")


def run_tasks(task: Callable, items: Iterable, num_workers: int, name: str) -> None:
    """`task(item)` for all items on `num_workers` threads with a progress bar; the first error ends it."""
    items = list(items)
    queue, running = iter(items), set()
    with ThreadPoolExecutor(num_workers) as pool, tqdm(total=len(items), desc=name, disable=not items) as bar:
        while new := {pool.submit(task, item) for item in islice(queue, 2 * num_workers - len(running))} | running:
            done, running = wait(new, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            bar.update(len(done))


class _single_threaded:  # noqa: N801
    """Within it OpenCV and PyTorch use one thread a call: the tasks are what runs in parallel."""

    def __enter__(self) -> None:
        self.before = cv2.getNumThreads(), torch.get_num_threads()
        cv2.setNumThreads(1)
        torch.set_num_threads(1)

    def __exit__(self, *_) -> None:
        cv2.setNumThreads(self.before[0])
        torch.set_num_threads(self.before[1])


def summary(store: CorrespondenceStore, root: Path) -> str:
    """Share of pixels with a valid correspondence by interval, and the store's size on disk."""
    interval = np.abs(store.pairs[:, 0] - store.pairs[:, 1])
    share = store.counts[store.pairs[:, 0], store.pairs[:, 1]] / np.prod(store.size)
    lines = []
    for low, high in BINS:
        inside = (interval >= low) & (interval <= high)
        if inside.any():
            name = str(low) if low == high else f"{low}-{min(high, interval.max())}"
            lines.append(f"{name}: {share[inside].mean():.0%}")
    size = sum(path.stat().st_size for path in root.iterdir())
    return f"{len(store.pairs)} pairs, {size / 2**20:.0f} MiB; valid pixels by interval: " + ", ".join(lines)
