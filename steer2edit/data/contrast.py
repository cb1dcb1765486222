"""Contrast data: what a row must hold, and what is built in.

A row is ``{"prompt", "positive", "negative"}`` or ``{"prompt", "response", "label"}``; the rest is ignored.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.resources
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from steer2edit.data.records import (
    Message,
    Prompt,
    Shape,
    parse_json_lines,
    prompt_fault,
    prompt_of,
    read_source,
    text_fault,
)
from steer2edit.errors import DataError, listing, shown

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # its place since Python 3.11

Label = Literal["positive", "negative"]
LABELS: tuple[Label, Label] = ("positive", "negative")
PAIR = ("prompt", "positive", "negative")
LABELLED = ("prompt", "response", "label")
SHAPES = 'expected "prompt", "positive", "negative" or "prompt", "response", "label"'


@dataclass(frozen=True)
class Example:
    """One response and its class. ``row`` is the source's row, which a pair's two examples share."""

    prompt: Prompt
    response: str
    label: Label
    where: str
    row: int


def read_contrast(source: str | Path) -> list[Example]:
    """Examples from a file, or from a Hub dataset ``user/name`` or ``user/name:file``, in the source's order.

    Raises DataError, which lists every problem with its line or row.
    """
    return _both(read_source(source, SHAPE, _examples), str(source))


def behaviors() -> tuple[str, ...]:
    """Names of the built-in behaviours."""
    names = (entry.name for entry in _package_data().iterdir())
    return tuple(sorted(name.removesuffix(".jsonl") for name in names if name.endswith(".jsonl")))


def load_behavior(name: str) -> list[Example]:
    """Pairs of a built-in behaviour, each prompt as one user message. Raises DataError on an unknown name."""
    known = behaviors()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DataError(f"there is no built-in behaviour {shown(name)}; there are {', '.join(known)}.{hint}")
    file = f"{name}.jsonl"
    examples = _both(parse_json_lines((_package_data() / file).read_bytes(), file, SHAPE, _examples), file)
    return [replace(e, prompt=(Message("user", e.prompt),)) if isinstance(e.prompt, str) else e for e in examples]


def neutral_text() -> str:
    """Running English text without any of the behaviours, to measure how far an edit moves the model."""
    return (_package_data() / "neutral.txt").read_text(encoding="utf-8")


def background_text() -> str:
    """Running English text of all kinds, none of it in ``neutral_text``: what the second moments are measured on."""
    return (_package_data() / "background.txt").read_text(encoding="utf-8")


def data_hash(examples: Iterable[Example]) -> str:
    """SHA-256 over prompts, responses and labels in their order; independent of the file and its format."""
    prompts = ((e, e.prompt if isinstance(e.prompt, str) else [m._asdict() for m in e.prompt]) for e in examples)
    rows = [(prompt, e.response, e.label) for e, prompt in prompts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def _package_data() -> Traversable:
    return importlib.resources.files("steer2edit") / "behaviors"


def _both(examples: list[Example], name: str) -> list[Example]:
    missing = [label for label in LABELS if all(e.label != label for e in examples)]
    if missing:
        raise DataError(
            f"{name} cannot be used as contrast data:\n"
            f"{listing(f'{name} holds no {label} example; both classes are needed' for label in missing)}"
        )
    return examples


def _examples(row: dict[str, object], where: str, index: int, problems: list[str]) -> list[Example]:
    """The one or two examples of a row; none, and a note for each fault, if it has any."""
    pair = all(key in row for key in PAIR)
    faults = [prompt_fault(row["prompt"])]
    faults += [text_fault(key, row[key], filled=True) for key in (PAIR[1:] if pair else ("response",))]
    if not pair and row["label"] not in LABELS:
        faults.append(f'label is {shown(row["label"])}; expected "positive" or "negative"')
    found = [f"{where}: {fault}" for fault in faults if fault]
    problems += found
    if found:
        return []
    prompt = prompt_of(row["prompt"])
    given = LABELS if pair else [label for label in LABELS if label == row["label"]]
    return [Example(prompt, str(row[label if pair else "response"]), label, where, index) for label in given]


def _missing(keys: Iterable[str]) -> str:
    held = list(keys)
    if any(all(key in held for key in shape) for shape in (PAIR, LABELLED)):
        return ""
    nearest = max((PAIR, LABELLED), key=lambda shape: sum(key in held for key in shape[1:]))
    if not any(key in held for key in nearest[1:]):
        return f"{SHAPES}, found {shown(held)}"
    absent = ", ".join(json.dumps(key) for key in nearest if key not in held)
    return f"{absent} is missing; {SHAPES}"


SHAPE = Shape(PAIR + LABELLED, _missing, "contrast data", SHAPES)
