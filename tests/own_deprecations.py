"""A dependency's deprecation fails a test where our own call caused it, and nothing else does.

A warning is ours where we called what is deprecated ourselves, or where it names an argument or attribute that stands in our
code on the stack. It is noted when it is raised and reported when the test ends, so that no ``except`` can swallow it.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
OURS = tuple(str(ROOT / folder) + "/" for folder in ("steer2edit", "tests"))
KINDS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
CARRIERS = re.compile(
    r"/torch/nn/modules/module\.py$|/torch/utils/_contextlib\.py$|/(contextlib|functools|warnings)\.py$"
)
"""Files that hand a call on, between the caller and what is deprecated."""
MACHINERY = re.compile(r"/logging/__init__\.py$|/transformers/utils/logging\.py$|/warnings\.py$")
_SAYS = re.compile(r"deprecat|will be removed|renamed", re.IGNORECASE)
_NAMED = re.compile(r"[`'\"](\w+)[`'\"]")


def stack() -> Iterator[FrameType]:
    """The frames that led here, innermost first, without this file's and those that only deliver the message."""
    frame: FrameType | None = sys._getframe(1)
    inside = True
    while frame is not None:
        file = frame.f_code.co_filename
        inside = inside and (file == __file__ or MACHINERY.search(file) is not None)
        if not inside:
            yield frame
        frame = frame.f_back


def is_ours(message: str, frames: list[FrameType]) -> bool:
    """Whether our own code caused a deprecation."""
    files = [frame.f_code.co_filename for frame in frames]
    if not files:
        return False
    # who warns may be called through helpers in its own file
    callers = [file for file in files if file != files[0] and not CARRIERS.search(file)]
    if files[0].startswith(OURS) or (callers and callers[0].startswith(OURS)):
        return True
    deprecated = _NAMED.search(message)
    return deprecated is not None and any(
        deprecated[1] in names(frame.f_code) for frame in frames if frame.f_code.co_filename.startswith(OURS)
    )


def names(code: CodeType) -> set[str]:
    """Attributes, names of arguments and short strings that stand in a function."""
    found = set(code.co_names)
    waiting: list[Any] = list(code.co_consts)
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            found.add(value)
        elif isinstance(value, (tuple, frozenset)):
            waiting += value
    return found


class Watch(logging.Handler):
    """Notes the deprecations that our own code causes, as warnings or in transformers' log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.ours: list[str] = []

    def note(self, message: str) -> None:
        if is_ours(message, list(stack())):
            self.ours.append(message)

    def emit(self, record: logging.LogRecord) -> None:
        if _SAYS.search(record.getMessage()):
            self.note(record.getMessage())


@contextmanager
def watching(*loggers: str) -> Iterator[list[str]]:
    """Within the block deprecations that our own code causes are added to the list that it yields."""
    watch = Watch()
    show = warnings.showwarning

    def noting(message: Any, category: Any, *place: Any, **more: Any) -> None:
        if issubclass(category, KINDS):
            watch.note(str(message))
        show(message, category, *place, **more)

    warnings.showwarning = noting
    # commands send warnings to the second of them
    listened = [logging.getLogger(name) for name in loggers or ("transformers", "py.warnings")]
    for logger in listened:
        logger.addHandler(watch)
    try:
        yield watch.ours
    finally:
        for logger in listened:
            logger.removeHandler(watch)
        warnings.showwarning = show


def watched(when: str) -> Generator[None, Any, Any]:
    with watching() as ours:
        result = yield
    if ours:
        pytest.fail(f"deprecated, and called by us during the {when}: " + "; ".join(dict.fromkeys(ours)), False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    return (yield from watched("set-up"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    return (yield from watched("test"))
