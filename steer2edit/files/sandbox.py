"""Limits on what a stranger's code may take while it runs in this process: chat templates and regular expressions."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

try:
    import resource
except ImportError:  # not on this system
    resource = None  # type: ignore[assignment]


class TooMuchError(Exception):
    """It took longer than it was given."""


@contextmanager
def limited(seconds: float, memory: int | None = None) -> Iterator[None]:
    """Raise TooMuchError in the block after ``seconds``, and MemoryError where it wants more than ``memory`` bytes.

    Python code and regular expressions are interrupted. Without effect outside the main thread, and of the clock where
    somebody else has set it: there is one for a whole process.
    """
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not usable or signal.getitimer(signal.ITIMER_REAL)[0]:
        with _memory(memory):
            yield
        return

    def late(_number: int, _frame: FrameType | None) -> None:
        raise TooMuchError(f"it took longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with _memory(memory):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory(allowed: int | None) -> Iterator[None]:
    status = Path("/proc/self/statm")
    if allowed is None or resource is None or not status.is_file():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(status.read_text().split()[0]) * resource.getpagesize() + allowed
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
