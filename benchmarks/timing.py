"""Times of functions, shared by the benchmarks."""

import time
from collections.abc import Callable

import torch
from tqdm import tqdm


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work()`, including all GPU work that it starts."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(work: dict[str, Callable[[], object]], repeats: int, warm_up: int,
              device: torch.device) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of every function, which take turns, after `warm_up` untimed calls of each."""
    seconds = {name: [] for name in work}
    for _ in tqdm(range(warm_up + repeats), "repeats"):
        for name, function in work.items():
            seconds[name].append(seconds_of(function, device))
    return {name: values[warm_up:] for name, values in seconds.items()}
