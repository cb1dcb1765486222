"""The names of what is captured: classes of examples, sources of text, kinds of resampling, and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from steer2edit.data.answers import LABELS

Population = Literal["positive", "negative", "background", "chat", "keep"]
Source = Literal["contrast", "background", "chat", "keep"]
Other = Literal["background", "chat", "keep"]
"""What is both a class of examples and a source: all but the contrast data."""
Side = Literal["input", "output"]
Kind = Literal["bootstrap", "shuffled"]
Scope = Literal["prompt", "response", "all"]
SCOPES: tuple[Scope, ...] = ("prompt", "response", "all")
SOURCES: tuple[Source, ...] = ("contrast", "background", "chat", "keep")
"""The contrast data; running prose; the base's own answers under its template; texts that the edit is to leave alone."""
OTHERS: tuple[Other, ...] = ("background", "chat", "keep")
POPULATIONS: tuple[Population, ...] = (*LABELS, *OTHERS)
RESAMPLES: Mapping[Kind, int] = {"bootstrap": 32, "shuffled": 8}
SOURCE_OF: Mapping[Population, Source] = {
    "positive": "contrast", "negative": "contrast", "background": "background", "chat": "chat", "keep": "keep",
}  # fmt: skip


def routing_key(what: str, scope: Scope, layer: int) -> str:
    """Under which name a layer's routing is kept, each example one draw, over the tokens of ``scope``.

    ``what`` is ``selected`` [experts], the share of tokens that chose the expert; ``mass``, its mean weight; or ``counts``
    [experts + 1], how many tokens chose it, and how many there were.
    """
    return f"{what}.{scope}.{layer}"


def expert_of(key: str) -> tuple[int, int] | None:
    """Layer and number of an expert, of its site's key."""
    role, _, numbers = key.partition(".")
    if role != "expert_out":
        return None
    layer, _, expert = numbers.partition(".")
    return int(layer), int(expert)
