"""The stages of preprocessing: frames -> features -> filtered flow of pairs -> chains -> correspondence store.

Notation
    T         frames
    i, j      frames; a task is some unordered pairs (flow both ways), then one source frame (its chains, its row file)
Threads do the tasks: OpenCV and PyTorch compute outside Python's lock, and threads share what is known of the frames.
What a task writes depends on the frames and settings alone, so a resumed store has the bytes of an uninterrupted one.
"""

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from loaders.correspondences import CorrespondenceStore, StoreWriter, finished_store, open_correspondences
from loaders.sequence import VideoSequence
from preprocessing.chaining import LINK_ERROR_TH, chain_row
from preprocessing.features import FEATURE_EXTRACTORS, FeatureExtractor
from preprocessing.filtering import filter_bytes, filter_flow
from preprocessing.flow import FLOW_MODELS, FlowModel, ModelOptions
from preprocessing.frame_cache import FrameCache
from preprocessing.pair_selection import Cost, check_disk, chunks, estimate, intervals, pairs_at

log = logging.getLogger(__name__)
BINS = ((1, 1), (2, 2), (3, 5), (6, 10), (11, 20), (21, 40), (41, 10_000))  # intervals of the summary
BASE_BYTES = 500 << 20  # of the process before any work: Python, PyTorch, OpenCV
CACHE_BYTES = 200 << 20  # at least this much for what is known of the frames
HALF_ABOVE = 256 * 256   # pixels of a frame from which on "auto" keeps half of a distant pair


@dataclass(frozen=True)
class Method:
    """How correspondences are made; the store keeps it in meta.json."""
    flow: str = "dis"
    features: str = "sift"
    cycle_th: float = 3.0  # pixels
    chain: str = ""        # a rule of preprocessing.chaining, or none
    pairs: str = "all"     # all | window:K | log
    keep: str = "auto"     # of distant pairs: all correspondences, or half of them (a checkerboard)

    def settings(self, size: tuple[int, int], flow: dict, features: dict) -> dict:
        """What meta.json says. Settings younger than the format are left out where they are what was done before."""
        out = {"flow": self.flow, "features": self.features, "cycle_th": self.cycle_th,
               **chain_settings(self.chain)}
        if self.pairs != "all":
            out["pairs"] = self.pairs
        if self.keep == "half" or (self.keep == "auto" and size[0] * size[1] > HALF_ABOVE):
            out["keep"] = "half"
        return {**out, **{f"flow_{k}": v for k, v in flow.items()}, **{f"feature_{k}": v for k, v in features.items()}}


def chain_settings(rule: str | None) -> dict:
    """What files say of a rule of chaining, or none: those from before there was a choice only say whether, those from
    before trusted chains had to close within `chain_fb` pixels do not have that."""
    return {"chain": rule, "chain_fb": LINK_ERROR_TH} if rule == "trusted" else {"chain": bool(rule)}


def build_store(sequence: VideoSequence, method: Method, resume: bool = False, num_workers: int = 1,
                models: ModelOptions | None = None, max_memory: int = 2 << 30) -> CorrespondenceStore:
    """Make the sequence's correspondence store, or open it if it is there.

    models: where flow and features come from; max_memory: bytes of main memory to stay within.
    UserError if there is a store, or with `resume` an unfinished one, of other frames or another method, or if memory
    or disk does not suffice."""
    models = models or ModelOptions()
    filtering = filter_bytes(sequence.size)
    room = max_memory - BASE_BYTES - CACHE_BYTES
    extract = FEATURE_EXTRACTORS[method.features](models)
    model = FLOW_MODELS[method.flow](models, sequence.size, room - filtering)
    chosen = intervals(method.pairs, len(sequence))
    looks = {"th": extract.threshold} | ({"chain_th": extract.chain_threshold} if method.chain == "trusted" else {})
    settings = method.settings(sequence.size, model.settings, looks | extract.settings)
    if finished := finished_store(sequence, settings):
        return finished
    each = model.working_bytes(sequence.size) + filtering
    wanted = 1 if models.device == "cuda" else num_workers
    workers = min(wanted, room // each)
    if workers < 1:
        raise UserError(f"--max_memory {max_memory / 2**30:.3g} is too little for {method.flow} at these frames: about "
                        f"{(max_memory - room + each) / 2**30:.1f} GiB are needed; give more, or take smaller frames")
    if workers < wanted:
        log.info("%d of %d threads, to stay within %.3g GiB (--max_memory)", workers, wanted, max_memory / 2**30)
    writer = StoreWriter(sequence, settings, resume)
    with _single_threaded():
        _Build(sequence, writer, method, model, extract, chosen, workers, models.device,
               max_memory - BASE_BYTES - workers * each).run()
    writer.finish()
    return open_correspondences(sequence)


class _Build:
    """One run over a sequence: what its stages share."""

    def __init__(self, sequence: VideoSequence, writer: StoreWriter, method: Method, model: FlowModel,
                 extract: FeatureExtractor, chosen: list[int], workers: int, device: str, cache_bytes: int):
        self.sequence, self.writer, self.method, self.model, self.extract = sequence, writer, method, model, extract
        self.chosen, self.workers, self.device = chosen, workers, device
        self.frames = FrameCache(lambda t: (sequence.frame(t),), cache_bytes // 3)
        self.features = FrameCache(lambda t: (extract(sequence.frame(t)),), cache_bytes // 3,
                                   writer.scratch("features"))
        self.encodings = FrameCache(lambda t: model.encode(sequence.frame(t)), cache_bytes // 3,
                                    writer.scratch("encodings") if model.spill else None)

    def run(self) -> None:
        """All stages; what is written already is passed over."""
        writer, T = self.writer, len(self.sequence)
        groups = [[chunk for chunk in chunks(pairs_at(d, T), self.model.batch)
                   if not all(writer.has(i, j) and writer.has(j, i) for i, j in chunk)] for d in self.chosen]
        rows = [i for i in range(T) if not writer.has_row(i)]
        if rows:
            run_tasks(self.features.__getitem__, [range(T)], self.workers, "features")
        if any(groups):
            if self.model.spill:
                run_tasks(self.encodings.__getitem__, [range(T)], self.workers, "encoding")
            cost = self._cost(sum(len(chunk) for group in groups for chunk in group))
            log.info("%s", cost)
            check_disk(cost, writer.root, writer.used_bytes())
            self._flow_stage(groups)
        run_tasks(self._row, [rows], self.workers, "chains" if self.method.chain else "packing")

    def _flow_stage(self, groups: list[list[tuple]]) -> None:
        """Flow of the chosen pairs, both ways, filtered: each flow is computed, judged and written, and not read again.

        If pairs start from those before them, an interval is done before the next begins."""
        previous = dict(zip(self.chosen[1:], self.chosen, strict=False))
        if not self.model.warm:
            groups = [[chunk for group in groups for chunk in group]]
        done = [lambda d=d: self.writer.drop_starts(previous.get(d)) for d in self.chosen] if self.model.warm else None
        run_tasks(lambda chunk: self._flow(chunk, previous), groups, self.workers, "flow", done)

    def _flow(self, chunk: tuple, previous: dict[int, int]) -> None:
        """The pairs of one chunk, all of one interval."""
        d = chunk[0][1] - chunk[0][0]
        for (i, j, flow, low), (_, _, back, low_back) in chunks(self._both_ways(chunk, previous.get(d)), 2):
            a, b = self.features[i][0], self.features[j][0]
            flags = [filter_flow(there, home, x, y, d, self.method.cycle_th, self.extract.threshold, self.device)
                     for there, home, x, y in ((flow, back, a, b), (back, flow, b, a))]
            if low is not None:
                self.writer.keep_start(i, j, low)
                self.writer.keep_start(j, i, low_back)
            self.writer.write(i, j, flow, *flags[0])
            self.writer.write(j, i, back, *flags[1])

    def _both_ways(self, chunk: tuple, before: int | None) -> list[tuple]:
        """(i, j, flow, start of the next) of the chunk's ordered pairs, i < j and j < i in turn."""
        ordered = [pair for i, j in chunk for pair in ((i, j), (j, i))]
        starts = [None] * len(ordered)
        if self.model.warm and before:
            starts = [self.writer.start(i, i + before if j > i else i - before) for i, j in ordered]
        out = []
        for some in chunks(list(zip(ordered, starts, strict=True)), self.model.batch):  # 1 on the CPU: less memory
            a, b = ([self.encodings[pair[k]] for pair, _ in some] for k in (0, 1))
            close = abs(some[0][0][0] - some[0][0][1]) == 1
            found = self.model.flow(a, b, [start for _, start in some], close)
            out += [(*pair, *flow) for (pair, _), flow in zip(some, found, strict=True)]
        return out

    def _row(self, i: int) -> None:
        """The row file of source frame i, with chains if the method has them."""
        if self.method.chain:
            targets, trusted = self.writer.targets(i), self.method.chain == "trusted"
            feature_th = self.extract.chain_threshold if trusted else self.extract.threshold
            for j, flow, cycle, occlusion in chain_row(
                    i, targets, lambda t: self.frames[t][0], lambda t: self.features[t][0], self.writer.dense,
                    feature_th, self.method.chain, self.device):
                if abs(i - j) > 1:
                    self.writer.write(i, j, flow, cycle, occlusion, chained=True)
        self.writer.pack(i)

    def _cost(self, left: int) -> Cost:
        """Time and disk of the run, from the flow of three probed pairs, whose results are thrown away."""
        T, size, pixels = len(self.sequence), self.sequence.size, np.prod(self.sequence.size)
        shares, seconds = {}, []
        for d in sorted({self.chosen[0], self.chosen[len(self.chosen) // 2], self.chosen[-1]}):
            pair, begin = ((T - d) // 2, (T - d) // 2 + d), time.perf_counter()
            (_, _, flow, _), (_, _, back, _) = self._both_ways((pair,), None)
            a, b = (self.features[t][0] for t in pair)
            cycle, occlusion = filter_flow(flow, back, a, b, d, self.method.cycle_th, self.extract.threshold,
                                           self.device)
            shares[d] = (cycle | occlusion).sum() / pixels
            seconds.append((time.perf_counter() - begin) / 2)
        if self.method.chain:  # which adds correspondences; how many is known afterwards only
            shares = dict.fromkeys(shares, 1.0)
        directed = sum(2 * (T - d) for d in self.chosen)
        spilled = sum(x.nbytes for x in self.encodings[0]) * T if self.model.spill else 0
        return estimate(self.chosen, T, size, shares, float(np.median(seconds)) / self.workers,
                        0.5 if self.writer.half else 1.0, directed - 2 * left, spilled)


def run_tasks(task: Callable, groups: Iterable[Iterable], num_workers: int, name: str,
              after: list[Callable] | None = None) -> None:
    """`task(item)` for the items of all groups on `num_workers` threads, one group after the other, with a progress
    bar; `after[k]()` when group k is done. The first error ends it."""
    groups = [list(group) for group in groups]
    total = sum(map(len, groups))
    with ThreadPoolExecutor(num_workers) as pool, tqdm(total=total, desc=name, disable=not total) as bar:
        for k, group in enumerate(groups):
            queue, running = iter(group), set()
            while new := {pool.submit(task, x) for x in islice(queue, 2 * num_workers - len(running))} | running:
                done, running = wait(new, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                bar.update(len(done))
            if after:
                after[k]()


@contextmanager
def _single_threaded():
    """Within it OpenCV and PyTorch use one thread a call: the tasks are what runs in parallel. What is found then does
    not depend on the number of threads."""
    before = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before[0])
        torch.set_num_threads(before[1])


def summary(store: CorrespondenceStore, root: Path) -> str:
    """Share of pixels with a valid correspondence by interval, and the store's size on disk."""
    interval = np.abs(store.pairs[:, 0] - store.pairs[:, 1])
    share = store.counts[store.pairs[:, 0], store.pairs[:, 1]] / np.prod(store.size)
    half = store.meta["method"].get("keep") == "half"
    lines = []
    for low, high in BINS:
        inside = (interval >= low) & (interval <= high)
        if inside.any():
            name = str(low) if low == high else f"{low}-{min(high, interval.max())}"
            lines.append(f"{name}: {share[inside].mean() * (2 if half and low > 1 else 1):.0%}")
    size = sum(path.stat().st_size for path in root.iterdir())
    thinned = " (of distant pairs every other one is kept)" if half else ""
    return f"{len(store.pairs)} pairs, {size / 2**20:.0f} MiB; valid pixels by interval{thinned}: " + ", ".join(lines)
