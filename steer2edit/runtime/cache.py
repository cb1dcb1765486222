"""The cache of keys and values in a model's forward, under the name that the installed transformers uses for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

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


def more_than_rounding(difference: float, dtype: torch.dtype) -> bool:
    """Whether two ways to read the same tokens differ by more than rounding does.

    ``difference`` is the mean distance of their log-probabilities, in nats. In bfloat16 rounding makes .05 to .11 of it on a
    model of 135M parameters, and the cache of another prompt, or of none, 3 to 4.
    """
    return difference > (1e-3 if dtype is torch.float32 else 0.5)
