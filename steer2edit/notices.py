"""Notices: facts about a run that its user should know and that are not errors, each said once.

Examples: a slower path was taken, a file's format was recognised, answers were placed after a thought. Inside
:func:`collected` a notice goes to the caller's list; elsewhere it is a warning of the logger ``steer2edit``, once a process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_logger = logging.getLogger("steer2edit")
_logged: set[str] = set()


class _Collector:
    def __init__(self, say: Callable[[str], object] | None) -> None:
        self.texts: list[str] = []
        self.say = say


_collector: ContextVar[_Collector | None] = ContextVar("notices", default=None)


def notice(text: str) -> None:
    """Say ``text`` to the user, once."""
    collector = _collector.get()
    if collector is None:
        if text not in _logged:
            _logged.add(text)
            _logger.warning(text)
    elif text not in collector.texts:
        collector.texts.append(text)
        if collector.say is not None:
            collector.say(text)


@contextmanager
def collected(say: Callable[[str], object] | None = None) -> Iterator[list[str]]:
    """Collect the notices of the block in the yielded list; ``say`` is also called with each new one."""
    collector = _Collector(say)
    token = _collector.set(collector)
    try:
        yield collector.texts
    finally:
        _collector.reset(token)


def notices() -> list[str]:
    """The notices of the innermost :func:`collected` block so far."""
    collector = _collector.get()
    return [] if collector is None else list(collector.texts)
