"""How long work tells how far it is; the library itself is silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Opens a stage of ``total`` units; what it yields is called with each further amount done."""

    def __call__(self, stage: str, total: float) -> AbstractContextManager[Callable[[float], None]]: ...


@contextmanager
def silent(stage: str, total: float) -> Iterator[Callable[[float], None]]:
    """No progress at all."""
    yield lambda amount: None


@contextmanager
def bar(stage: str, total: float) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr, when that is a terminal; one line when the stage ends, when it is not."""
    import sys

    from tqdm import tqdm

    with tqdm(total=total, desc=stage, unit_scale=True, file=sys.stderr, leave=False, disable=None) as line:
        yield lambda amount: line.update(amount) and None
    if not sys.stderr.isatty():
        print(f"{stage}: done", file=sys.stderr)
