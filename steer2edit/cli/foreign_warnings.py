"""Warnings of other libraries while a command runs: held back, and told as notices, once each, when it ends."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

from steer2edit.notices import notice

_WARNING = re.compile(r"(?P<file>.*?):\d+: (?P<kind>\w+): (?P<text>.*)")
"""A warning as Python formats it, in its first line."""
_DEPRECATED = re.compile(r"deprecat|will be removed", re.IGNORECASE)


class _Held(logging.Handler):
    """Keeps Python's warnings, and of transformers' log what it says of deprecated uses."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().strip()
        if record.name != "py.warnings":
            if _DEPRECATED.search(text):
                self.texts.append(f"{record.name.partition('.')[0]}: {text.splitlines()[0]}")
        elif warning := _WARNING.match(text):
            self.texts.append(f"{_library(warning['file'])}: {warning['text']} ({warning['kind']})")
        else:
            self.texts.append(text)


_held = _Held()


@contextmanager
def holding_warnings() -> Iterator[None]:
    """Within the block warnings do not reach stderr; those that were not told before are told at its end."""
    loggers = [logging.getLogger(name) for name in ("py.warnings", "transformers")]
    for logger in loggers:
        logger.addHandler(_held)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger in loggers:
            logger.removeHandler(_held)
        tell_warnings()


def tell_warnings() -> None:
    """Make notices of the warnings that were held so far."""
    texts, _held.texts = _held.texts, []
    for text in texts:
        notice(text)


def _library(file: str) -> str:
    """The package that a file is of: transformers, for …/site-packages/transformers/utils/generic.py."""
    parts = PurePath(file).parts
    at = [index for index, part in enumerate(parts) if part in ("site-packages", "dist-packages")]
    return PurePath(parts[at[-1] + 1]).stem if at and at[-1] + 1 < len(parts) else PurePath(file).stem
