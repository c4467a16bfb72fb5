"""Record SIGINT and SIGTERM instead of being ended by them."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def record_signals(on_signal: Callable[[], object] = lambda: None) -> Iterator[list[int]]:
    """Inside this context, SIGINT and SIGTERM are appended to the list that it yields, and `on_signal` is called.
    Afterwards the former handlers are active again. Only the main thread can set handlers: in others, nothing is
    recorded."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: object) -> None:
        received.append(number)
        on_signal()

    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
