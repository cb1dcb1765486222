"""Scores that users bring: a function of their own, and regular expressions."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from steer2edit.errors import DataError


def load_function(where: str) -> Callable[[str, str], float]:
    """The function ``name`` of ``file.py:name``, called with a prompt's text and an answer. Raises DataError if absent."""
    path, _, name = where.rpartition(":")
    if not path or not Path(path).is_file():
        raise DataError(f"--function is {where!r}; expected file.py:name, and {path or 'no file'} to be there")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise DataError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise DataError(f"{path} cannot be run: {type(error).__name__}: {error}") from None
    found = getattr(module, name, None)
    if not callable(found):
        raise DataError(f"{path} has no function {name!r}")
    return found  # type: ignore[no-any-return]


def check_patterns(patterns: Sequence[str]) -> None:
    """Raise DataError for a pattern that is not a regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise DataError(f"--pattern {pattern!r} is not a regular expression: {error}") from None
