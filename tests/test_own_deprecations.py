"""The watch on deprecations tells our own calls from what a dependency does within itself."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from own_deprecations import watching

LIBRARY = """
import functools, warnings

def old():
    warnings.warn("old() is deprecated", FutureWarning, stacklevel=2)

def helper(name):
    warnings.warn(f"`{name}` is deprecated, use something else", FutureWarning)

def renamed(forward):
    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        if "past" in kwargs:
            warnings.warn("`past` is deprecated", FutureWarning, stacklevel=2)
        return forward(*args, **kwargs)
    return wrapper
"""
OTHER = """
def within(call, *args):
    return call(*args)
def load(where, **settings):
    return settings["helper"]("dtype_of_old") if "dtype_of_old" in settings else None
"""


def library(text: str, file: str) -> dict[str, Any]:
    """A dependency's module: its functions, as if they stood in ``file``."""
    functions: dict[str, Any] = {}
    exec(compile(text, f"/site-packages/{file}", "exec"), functions)
    return functions


LIB, OUTSIDE = library(LIBRARY, "lib/deprecation.py"), library(OTHER, "lib/loading.py")


class Model(torch.nn.Module):
    forward = LIB["renamed"](lambda self, past=None: None)


def noted(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True), watching() as ours:
        warnings.simplefilter("always")
        call()
    return ours


def test_what_we_call_ourselves_is_ours() -> None:
    assert noted(lambda: LIB["old"]()) == ["old() is deprecated"]
    model = Model()
    assert noted(lambda: model(past=1)) == ["`past` is deprecated"]


def test_what_a_library_does_within_itself_is_not() -> None:
    within, old = OUTSIDE["within"], LIB["old"]
    assert noted(lambda: within(old)) == []


def test_an_argument_that_we_name_is_ours_however_deep_it_is_found() -> None:
    load, helper = OUTSIDE["load"], LIB["helper"]
    settings = {"dtype_of" + suffix: True for suffix in ("_old",)}
    assert noted(lambda: load("here", helper=helper, **settings)) == []
    found = noted(lambda: load("here", helper=helper, dtype_of_old=1))
    assert found == ["`dtype_of_old` is deprecated, use something else"]


def test_the_log_is_watched_and_an_except_swallows_nothing() -> None:
    logger = logging.getLogger("own_deprecations_test")
    logger.propagate = False
    with warnings.catch_warnings(record=True), suppress(Exception), watching(logger.name) as ours:
        logger.warning("`past_key_values` are deprecated")
        logger.warning("something else")
        LIB["old"]()
        raise ValueError
    assert ours == ["`past_key_values` are deprecated", "old() is deprecated"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_code_may_still_ignore_a_warning() -> None:
    LIB["old"]()
