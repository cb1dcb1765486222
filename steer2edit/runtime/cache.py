"""The cache of keys and values in a model's forward, under the name that the installed transformers uses for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

_NAMES = ("cache", "past_key_values", "cache_params")
"""transformers 5.24 names it ``cache``. Before, Mamba and its like had ``cache_params``; a model's code may keep these names."""


def cache_parameter(forward: Callable[..., Any]) -> str | None:
    """The name of the parameter that takes a cache; None where ``forward`` names none."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in _NAMES if name in parameters), None)


def returned_cache(output: Any) -> Any:
    """The cache in a forward's output; None where there is none."""
    # the keys are asked for, not the attribute: reading an older name is a deprecated use
    names = list(output) if isinstance(output, dict) else []
    return next((output[name] for name in _NAMES if name in names), None)
