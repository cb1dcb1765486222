"""Progress of long work: bars on a terminal, lines in a log; the library itself is silent."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

EVERY_SECONDS = 10.0
"""How long a run without a terminal is silent within one stage, at most."""
LEAST_SHARE = 0.02
"""Of a stage so much is done before the time that is left is told: a batch of answers may end all at once."""


class Advance(Protocol):
    """Takes each further amount done, and a note on how it goes, such as "80 tokens/s"."""

    def __call__(self, amount: float, note: str = "") -> None: ...


class Progress(Protocol):
    """Opens a stage of ``total`` units, and yields what is called as the work goes on."""

    def __call__(self, stage: str, total: float) -> AbstractContextManager[Advance]: ...


@contextmanager
def silent(stage: str, total: float) -> Iterator[Advance]:
    """No progress at all."""
    yield lambda amount, note="": None


@contextmanager
def bar(stage: str, total: float) -> Iterator[Advance]:
    """A progress bar on stderr where that is a terminal, and :func:`lines` where it is not."""
    if not sys.stderr.isatty():
        with lines(stage, total) as advance:
            yield advance
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=stage, unit_scale=True, file=sys.stderr, leave=False) as line:

        def advance(amount: float, note: str = "") -> None:
            if note:
                line.set_postfix_str(note, refresh=False)
            line.update(amount)

        yield advance


@contextmanager
def lines(stage: str, total: float) -> Iterator[Advance]:
    """Lines on stderr, with counts and times: one when the stage ends, and one every ``EVERY_SECONDS`` before that.

    A stage that ends again within that time under the same name is counted and not shown.
    """
    started = shown = time.monotonic()
    done = 0.0

    def advance(amount: float, note: str = "") -> None:
        nonlocal done, shown
        done += amount
        now = time.monotonic()
        if done < total and now - shown >= EVERY_SECONDS:
            shown = now
            left = (
                f", about {_left((now - started) * (total - done) / done)} left" if done >= LEAST_SHARE * total else ""
            )
            rate = f", {note}" if note else ""
            _say(f"{stage}: {_count(done)} of {_count(total)}, {now - started:.0f} s{rate}{left}")

    yield advance
    now = time.monotonic()
    times, last = _ended.get(stage, (0, -math.inf))
    show = now - last >= EVERY_SECONDS
    _ended[stage] = times + 1, now if show else last
    if show:
        again = f" (time {times + 1})" if times else ""
        _say(f"{stage}: {_count(done)} done in {_seconds(now - started)}{again}")


_ended: dict[str, tuple[int, float]] = {}
"""How often a stage of a name has ended, and when that was shown last."""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _count(amount: float) -> str:
    return f"{amount:,.0f}"


def _left(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
