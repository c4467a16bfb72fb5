"""The stages of preprocessing: frames -> features -> filtered flow of pairs -> chains -> correspondence store.

Notation
    T         number of frames
    d         interval of a pair: number of frames between its frames
    i, j      source and target frame

The work is done by tasks on several threads, because OpenCV and PyTorch release Python's global lock and threads share
the caches of frames. A task is first a chunk of pairs (flow in both directions), then one source frame (its chains and
its row file). The results of a task depend on the frames and settings only, so a store that was interrupted and resumed
has the same bytes as one that was not.

Pairs are made within scenes (preprocessing/scenes.py). Adjacent frames of different scenes, or with a blank frame, have
flow but no flags, and chains pass over blank frames by the pair of the frames around them.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from loaders.correspondence_format import block_bytes
from loaders.correspondences import FOLDER, CorrespondenceStore, open_correspondences, read_meta
from loaders.sequence import VideoSequence
from preprocessing.chaining import LINK_ERROR_TH, TrustedChains, chain_row
from preprocessing.correspondence_writer import StoreWriter, finished_store
from preprocessing.features import FEATURE_EXTRACTORS, FeatureExtractor
from preprocessing.filtering import filter_bytes, filter_flow
from preprocessing.flow import FLOW_MODELS, FlowModel, ModelOptions, resize_flow
from preprocessing.frame_cache import FrameCache
from preprocessing.pair_selection import (
    Cost,
    check_disk,
    chunks,
    estimate,
    intervals,
    ordered_pairs,
    pairs_at,
    with_gaps,
)
from preprocessing.scenes import scenes_of

log = logging.getLogger(__name__)
PROCESS_BYTES = 500 << 20    # memory of the process before any work: Python, PyTorch, OpenCV
MIN_CACHE_BYTES = 200 << 20  # reserved for the caches of frames, features and encodings
HALF_FROM = 256 * 256        # pixels per frame from which on keep "auto" means "half"
SUMMARY_BINS = ((1, 1), (2, 2), (3, 5), (6, 10), (11, 20), (21, 40), (41, 10_000))  # first and last interval


@dataclass(frozen=True)
class Method:
    """How correspondences are computed; written to the store's meta.json."""
    flow: str = "dis"      # a key of FLOW_MODELS
    features: str = "sift"  # a key of FEATURE_EXTRACTORS
    cycle_th: float = 3.0  # pixels: largest forward-backward error
    chain: str = "trusted"  # a name in preprocessing.options.RULES; empty: no chains
    pairs: str = "log"     # all | window:K | log
    keep: str = "auto"     # correspondences of non-adjacent frames to store: all | half (a checkerboard) | auto
    find_scenes: bool = True  # find cuts and blank frames; False: the video is one scene
    flow_frames: bool = True  # compute flow from flow_frames/, if there are any

    def settings(self, flow: dict, features: dict, flow_frames: str = "") -> dict:
        """The entry "method" of meta.json.

        flow, features: settings of the models
        flow_frames:    hash of the flow frames; empty: none are used
        Settings that were added after the first version of the format are left out at their default, so that older
        stores are recognized as the same."""
        out = {"flow": self.flow, "features": self.features, "cycle_th": self.cycle_th, **chain_settings(self.chain)}
        if self.pairs != "all":
            out["pairs"] = self.pairs
        if self.keep == "half":
            out["keep"] = "half"
        if not self.find_scenes:
            out["find_scenes"] = False
        if flow_frames:
            out["flow_frames"] = flow_frames
        out |= {f"flow_{key}": value for key, value in flow.items()}
        out |= {f"feature_{key}": value for key, value in features.items()}
        return out


def chain_settings(rule: str | None) -> dict:
    """The settings of a rule of chaining (None or empty: no chains) in meta.json.

    The unfiltered rule is written as True, as it was when it was the only one. Trusted chains also name LINK_ERROR_TH,
    because its value was different at first."""
    return {"chain": rule, "chain_fb": LINK_ERROR_TH} if rule == "trusted" else {"chain": bool(rule)}


def build_store(sequence: VideoSequence, method: Method, resume: bool = False, num_workers: int = 1,
                models: ModelOptions | None = None, max_memory: int = 2 << 30) -> CorrespondenceStore:
    """Compute the sequence's correspondence store, or open it if it is finished.

    resume:      continue an unfinished store of the same frames and method
    num_workers: number of threads; fewer are used if memory is short, and one on CUDA
    models:      options of the flow model and the features
    max_memory:  bytes of main memory to stay below
    UserError if there is a store (with `resume`: also an unfinished one) of other frames or another method, or if
    memory or disk space is too small."""
    models = models or ModelOptions()
    method = replace(method, keep=_density(method.keep, sequence, resume))
    chosen = intervals(method.pairs, len(sequence))
    new_scenes = partial(scenes_of, sequence, method.find_scenes)
    budget = max_memory - PROCESS_BYTES - MIN_CACHE_BYTES
    filtering = filter_bytes(sequence.size)
    extract = FEATURE_EXTRACTORS[method.features](models)
    flow_size = sequence.flow_size if method.flow_frames else sequence.size
    model = FLOW_MODELS[method.flow](models, flow_size, budget - filtering)
    thresholds = {"th": extract.threshold}
    if method.chain == "trusted":
        thresholds["chain_th"] = extract.chain_threshold
    settings = method.settings(model.settings, thresholds | extract.settings,
                               sequence.flow_frames_hash if method.flow_frames else "")
    if finished := finished_store(sequence, settings, chosen):
        return finished
    row = len(chosen) * 2 * block_bytes(sequence.size[0] * sequence.size[1], sequence.size) if method.chain else 0
    per_worker = model.working_bytes(flow_size) + filtering + row
    wanted = 1 if models.device == "cuda" else num_workers
    workers = min(wanted, budget // per_worker)
    if workers < 1:
        raise UserError(f"--memory_gib {max_memory / 2**30:.3g} is too little for {method.flow} at this frame size: "
                        f"about {(max_memory - budget + per_worker) / 2**30:.1f} GiB are needed; give more, or use "
                        "smaller frames")
    if workers < wanted:
        log.info("using %d of %d threads to stay below %.3g GiB (--memory_gib)", workers, wanted, max_memory / 2**30)
    writer = StoreWriter(sequence, settings, resume, new_scenes)
    if method.pairs == "log":  # "all" has every interval, and "window" is a limit
        chosen = with_gaps(chosen, writer.scenes)
    decoded = 0 if sequence.decoded is None else sequence.decoded.nbytes
    cache_bytes = max(max_memory - PROCESS_BYTES - workers * per_worker - decoded, MIN_CACHE_BYTES)
    with _single_threaded_libraries():
        _StoreBuilder(sequence, writer, method, chosen, model, extract, workers, models.device, cache_bytes).run()
    writer.finish(ordered_pairs(chosen, writer.scenes))
    return open_correspondences(sequence)


def _density(keep: str, sequence: VideoSequence, resume: bool) -> str:
    """`Method.keep` without "auto", which stands for that of the store if there is one, else depends on the size."""
    if keep != "auto":
        return keep
    root = sequence.root / FOLDER
    for path in (root / "meta.json", root / "unfinished.json"):
        if path.is_file() and (resume or path.name == "meta.json"):
            return read_meta(path)["method"].get("keep", "all")
    return "half" if sequence.size[0] * sequence.size[1] >= HALF_FROM else "all"


@dataclass
class _StoreBuilder:
    """The stages of one run of `build_store` and what they share."""

    sequence: VideoSequence
    writer: StoreWriter
    method: Method
    intervals: dict[int, int]  # with their steps; 0: only over a gap in a scene
    model: FlowModel
    extract: FeatureExtractor
    workers: int
    device: str
    cache_bytes: int

    def __post_init__(self):
        frame = self.sequence.frame
        budget = self.cache_bytes // 6
        encodings = self.writer.scratch("encodings") if self.model.spill else None
        self.frames = FrameCache(lambda t: (frame(t),), budget)
        self.scenes = self.writer.scenes
        flow_frame = self.sequence.flow_frame if self.method.flow_frames else self.sequence.frame
        self.features = FrameCache(lambda t: (self.extract(self.frames[t][0]),), budget,
                                   self.writer.scratch("features"))
        self.encodings = FrameCache(lambda t: self.model.encode(flow_frame(t)), budget, encodings)
        self.path = lru_cache(self._path)  # of the 128 frames that were asked for last
        self.chains = None
        if self.method.chain == "trusted":
            self.chains = TrustedChains(self.writer.dense, self.sequence.size, self.path, self.device,
                                        self.cache_bytes // 2, len(self.sequence))

    def run(self) -> None:
        """Run all stages, skipping pairs and rows that are already written."""
        T = len(self.sequence)
        rows = [i for i in range(T) if not self.writer.has_row(i)]
        chunks_by_interval = [self._missing_chunks(d) for d in self.intervals]
        if rows:
            run_tasks(self.features.__getitem__, [range(T)], self.workers, "features")
        if any(chunks_by_interval):
            if self.model.spill:
                run_tasks(self.encodings.__getitem__, [range(T)], self.workers, "encoding")
            left = sum(len(chunk) for group in chunks_by_interval for chunk in group)
            with ThreadPoolExecutor(1) as pool:  # what its thread keeps for flow is freed at its end
                cost = pool.submit(self._cost, left).result()
            log.info("%s", cost)
            check_disk(cost.peak_disk, self.writer.root, self.writer.used_bytes())
            self._flow_stage(chunks_by_interval)
            self.encodings.clear()  # the chains need the memory
        run_tasks(self._finish_row, [rows], self.workers, "chains" if self.method.chain else "packing")

    def _missing_chunks(self, d: int) -> list[list[tuple[int, int]]]:
        """The pairs of interval d in chunks of the model's batch size, without chunks that are completely written."""
        has = self.writer.has
        return [chunk for chunk in chunks(self._pairs(d), self.model.batch)
                if not all(has(i, j) and has(j, i) for i, j in chunk)]

    def _pairs(self, d: int) -> list[tuple[int, int]]:
        return pairs_at(d, self.intervals[d], self.scenes)

    def _flow_stage(self, chunks_by_interval: list[list[list]]) -> None:
        """Compute, filter and write the flow of all pairs in both directions.

        With a warm start, all pairs of one interval are finished before those of the next interval begin."""
        previous = dict(pairwise(reversed([d for d, step in self.intervals.items() if step])))
        groups = chunks_by_interval
        if not self.model.warm:
            groups = [[chunk for group in chunks_by_interval for chunk in group]]

        def after(k: int) -> None:  # flow of the interval before is not needed as a start any more
            if self.model.warm and k > 0:
                self.writer.drop_starts(list(self.intervals)[k - 1])

        run_tasks(lambda chunk: self._flow_task(chunk, previous), groups, self.workers, "flow", after)

    def _flow_task(self, chunk: list, previous: dict[int, int]) -> None:
        """Compute, filter and write the flow of a chunk of pairs. previous: interval -> next smaller interval."""
        d = chunk[0][1] - chunk[0][0]
        flows = iter(self._both_ways(chunk, previous.get(d)))
        for i, j in chunk:
            forward, next_start = next(flows)
            backward, next_start_back = next(flows)
            flags = self._filter(i, j, forward, backward)
            flags_back = self._filter(j, i, backward, forward)
            if next_start is not None:
                self.writer.keep_start(i, j, next_start)
                self.writer.keep_start(j, i, next_start_back)
            self.writer.write(i, j, forward, *flags)
            self.writer.write(j, i, backward, *flags_back)

    def _filter(self, a: int, b: int, flow_ab: np.ndarray, flow_ba: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cycle and occlusion flags of the flow from frame a to frame b; none between different scenes."""
        if not self.scenes.same(a, b):
            return np.zeros(self.sequence.size, bool), np.zeros(self.sequence.size, bool)
        return filter_flow(flow_ab, flow_ba, self.features[a][0], self.features[b][0], abs(a - b),
                           self.method.cycle_th, self.extract.threshold, self.device, self.writer.kept_at_first(a, b))

    def _both_ways(self, chunk: list, previous: int | None) -> list[tuple]:
        """(flow, start of the next pair) of each pair (i, j) of the chunk, each followed by that of (j, i).

        previous: the next smaller interval, whose flow a warm start begins from."""
        ordered = [pair for i, j in chunk for pair in ((i, j), (j, i))]
        out = []
        for part in chunks(ordered, self.model.batch):  # on the CPU, one direction at a time takes less memory
            a = [self.encodings[i] for i, _ in part]
            b = [self.encodings[j] for _, j in part]
            starts = [None] * len(part)
            if self.model.warm and previous:
                starts = [self._start(i, i + previous if j > i else i - previous) for i, j in part]
            adjacent = abs(part[0][0] - part[0][1]) == 1
            out += [(resize_flow(flow, self.sequence.size), start)
                    for flow, start in self.model.flow(a, b, starts, adjacent)]
        return out

    def _start(self, i: int, j: int) -> np.ndarray | None:
        """What the flow of the next farther pair than (i, j) starts from."""
        return self.writer.start(i, j) if self.scenes.wanted(i, j) else None

    def _finish_row(self, i: int) -> None:
        """Compute the chains of source frame i, if the method has chains, and write its row file."""
        rule = self.method.chain
        chained = {}
        if rule:
            feature_th = self.extract.chain_threshold if rule == "trusted" else self.extract.threshold
            for j, *found in chain_row(
                    i, self.writer.targets(i), lambda t: self.frames[t][0], lambda t: self.features[t][0],
                    self.writer.dense, feature_th, self.chains, self.device, self.path, self.writer.kept):
                if abs(i - j) > 1:
                    chained[j] = self.writer.block(i, j, *found)
        self.writer.pack(i, chained)

    def _path(self, i: int, step: int) -> list[int]:
        """The frames that chains from frame i pass, up to where the store lacks the pair that would lead on."""
        out = []
        a = i
        while (b := self.scenes.next(a, step)) is not None and abs(a - b) in self.intervals:
            out.append(b)
            a = b
        return out

    def _cost(self, left: int) -> Cost:
        """Estimate time and disk space from the flow of three sample pairs, which is not kept. left: pairs to do."""
        T = len(self.sequence)
        numbers = {d: 2 * len(self._pairs(d)) for d in self.intervals}
        numbers = {d: number for d, number in numbers.items() if number}
        present = list(numbers)
        shares = {}
        seconds = []
        for d in sorted({present[0], present[len(present) // 2], present[-1]}):
            begin = time.perf_counter()
            sample = self._pairs(d)
            i = sample[len(sample) // 2][0]
            (forward, _), (backward, _) = self._both_ways([(i, i + d)], None)
            cycle, occlusion = self._filter(i, i + d, forward, backward)
            kept = self.writer.kept_at_first(i, i + d)
            shares[d] = (cycle | occlusion).mean() / (1 if kept is None else kept.mean())
            seconds.append((time.perf_counter() - begin) / 2)
        if self.method.chain:  # chains add correspondences; their number is not known before
            shares = dict.fromkeys(shares, 1.0)
        scratch_bytes = self.features[0][0].nbytes * T
        if self.model.spill:
            scratch_bytes += sum(x.nbytes for x in self.encodings[0]) * T
        return estimate(numbers, self.sequence.size, shares, float(np.median(seconds)) / self.workers,
                        0.5 if self.writer.half else 1.0, sum(numbers.values()) - 2 * left, scratch_bytes)


def run_tasks(task: Callable, groups: Sequence[Sequence], num_workers: int, name: str,
              after: Callable[[int], None] = lambda k: None) -> None:
    """Call `task(item)` for the items of all groups on `num_workers` threads, with a progress bar called `name`.

    Groups are processed one after the other; `after(k)` is called when group k is done. After an exception in a task
    no further tasks are started, and it is raised."""
    total = sum(map(len, groups))
    with ThreadPoolExecutor(num_workers) as pool, tqdm(total=total, desc=name, disable=not total) as bar:
        for k, group in enumerate(groups):
            for _ in pool.map(task, group):  # an exception here cancels the tasks that wait
                bar.update()
            after(k)


@contextmanager
def _single_threaded_libraries():
    """Make OpenCV and PyTorch use one thread per call: tasks run in parallel instead, and results do not depend on the
    number of threads."""
    opencv_threads = cv2.getNumThreads()
    torch_threads = torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(opencv_threads)
        torch.set_num_threads(torch_threads)


def summary(store: CorrespondenceStore, root: Path) -> str:
    """One line: number of pairs, size on disk, and the share of pixels with a valid correspondence by interval."""
    interval = np.abs(store.pairs[:, 0] - store.pairs[:, 1])
    share = store.counts[store.pairs[:, 0], store.pairs[:, 1]] / np.prod(store.size)
    half = store.meta["method"].get("keep") == "half"
    if half:
        share = np.where(interval > 1, 2 * share, share)
    bins = []
    for low, high in SUMMARY_BINS:
        inside = (interval >= low) & (interval <= high)
        if inside.any():
            high = min(high, interval.max())
            name = str(low) if low == high else f"{low}-{high}"
            bins.append(f"{name}: {share[inside].mean():.0%}")
    size = sum(path.stat().st_size for path in root.iterdir())
    note = " (before every other one of non-adjacent frames was dropped)" if half else ""
    return f"{len(store.pairs)} pairs, {size / 2**20:.0f} MiB; valid pixels by interval{note}: " + ", ".join(bins)
