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
_UNSHOWN = ("bitsandbytes",)
"""Libraries whose logs have no handler of their own, so that Python would write each record to stderr."""
_DEPRECATED = re.compile(r"deprecat|will be removed", re.IGNORECASE)


class _Held(logging.Handler):
    """Keeps Python's warnings, of transformers' log what it says of deprecated uses, and all of the logs that nobody shows.

    Some libraries log the same words at every matrix product, so each text is kept once.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().strip()
        library = record.name.partition(".")[0]
        if record.name != "py.warnings":
            if text and (library in _UNSHOWN or _DEPRECATED.search(text)):
                self.texts[f"{library}: {text.splitlines()[0]}"] = None
        elif warning := _WARNING.match(text):
            self.texts[f"{_library(warning['file'])}: {warning['text']} ({warning['kind']})"] = None
        else:
            self.texts[text] = None


_held = _Held()


@contextmanager
def holding_warnings() -> Iterator[None]:
    """Within the block warnings do not reach stderr; those that were not told before are told at its end."""
    loggers = [logging.getLogger(name) for name in ("py.warnings", "transformers", *_UNSHOWN)]
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
    texts, _held.texts = _held.texts, {}
    for text in texts:
        notice(text)


def _library(file: str) -> str:
    """The package that a file is of: transformers, for …/site-packages/transformers/utils/generic.py."""
    parts = PurePath(file).parts
    at = [index for index, part in enumerate(parts) if part in ("site-packages", "dist-packages")]
    return PurePath(parts[at[-1] + 1]).stem if at and at[-1] + 1 < len(parts) else PurePath(file).stem
