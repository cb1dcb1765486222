"""A statistics file: its names, the kind of its description, and the check of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from steer2edit.capture.populations import POPULATIONS, RESAMPLES, Population
from steer2edit.data.answers import LABELS
from steer2edit.errors import listing
from steer2edit.files.schema import TEXT

FORMAT = "steer2edit.statistics.4"
OLDER = ("steer2edit.statistics.2", "steer2edit.statistics.3")
"""Formats that are read too: the second had no chats in the background, the third no differences of pairs."""
_OPTIONAL = ("chat", "keep")
_STORED = {"background": "neutral"}
"""How files name what has another name here: once the background text was called neutral."""


def stored_name(population: str) -> str:
    """A population or source as files name it."""
    return _STORED.get(population, population)


def read_name(stored: str) -> str:
    """The population or source that files name ``stored``."""
    return next((name for name, theirs in _STORED.items() if theirs == stored), stored)


def stored_counts(counts: Mapping[Population, int]) -> dict[str, int]:
    """Counts by population as files hold them: without chats and texts to keep where there are none."""
    return {stored_name(p): count for p, count in counts.items() if count or p not in _OPTIONAL}


_COUNTS: Any = {f"{stored_name(p)}{'?' if p in _OPTIONAL else ''}": int for p in POPULATIONS}
DESCRIBED: Any = {
    "examples": _COUNTS,
    "tokens": _COUNTS,
    "source": {
        **{
            f"{name}?": TEXT
            for name in (
                "name",
                "data",
                "system",
                "span",
                "vector",
                "background",
                "chat",
                "keep",
                "fingerprint",
                "model",
                "dtype",
            )
        },
        "prompts?": [str],
        "pairs?": [int],
        "protect?": [str],
        "distinct_prompts?": dict.fromkeys(LABELS, int),
        "chat_template_kwargs?": dict,
    },
}


def check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError, listing all of them, for tensors of a statistics file that are not finite or do not fit."""
    problems = []
    widths: dict[str, int] = {}
    for name, tensor in sorted(tensors.items()):
        site, _, what = name.rpartition(".")
        site, _, group = site.rpartition(".")
        axes = {"mean": 1, "m2": 1, "means": 3, "blocks": 3, "weights": 2, "differences": 2}.get(what)
        if name.startswith("routed."):  # their shapes are ExpertMoments' affair
            axes = tensor.ndim
        if axes is None or tensor.ndim != axes or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            problems.append(f"{name} {list(tensor.shape)} is none of its tensors, or not finite")
        elif name.startswith("routed."):
            continue
        elif (
            what in ("mean", "m2", "means", "differences")
            and widths.setdefault(site, tensor.shape[-1]) != tensor.shape[-1]
        ):
            problems.append(f"{name} has {tensor.shape[-1]} features, others of {site} have {widths[site]}")
        elif what in ("weights", "means"):
            kind = name.removesuffix(".weights") if what == "weights" else group
            if kind not in RESAMPLES or tuple(tensor.shape[:2]) != (RESAMPLES[kind], 2):  # type: ignore[index]
                problems.append(f"{name} has the shape {list(tensor.shape)}, which fits no kind of resampling")
        elif what == "blocks" and tensor.shape[1] != tensor.shape[2]:
            problems.append(f"{name} has the shape {list(tensor.shape)}, expected square blocks")
    if problems:
        raise ValueError(f"its tensors do not fit together:\n{listing(problems)}")
