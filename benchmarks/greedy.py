"""Greedy answers to rendered prompts as token ids, for benchmarks that keep them in journals of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from steer2edit.engines.generation import generate
from steer2edit.runtime.model import LoadedModel

Generate = Callable[[LoadedModel, Sequence[str], int], list[list[int]]]
"""Token ids of the continuations of rendered prompts, at most so many for each."""


def through_transformers(loaded: LoadedModel, texts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """What the loaded model writes, under whatever hooks are on it."""
    return generate(loaded, texts, max_new_tokens=max_new_tokens)
