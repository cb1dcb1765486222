"""Contrast data: prompts with labelled responses, read from a file or the Hub.

The formats of rows are in ``data.formats``.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from steer2edit.data import formats
from steer2edit.data.answers import LABELS, Label
from steer2edit.data.prompts import Message, Prompt, prompt_digest
from steer2edit.data.records import Build, read_source
from steer2edit.errors import DataError, count_of, listing
from steer2edit.notices import notice

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # its place since Python 3.11


@dataclass(frozen=True)
class Example:
    """One response and its class. ``row`` is the source's row, which a pair's two examples share."""

    prompt: Prompt
    response: str
    label: Label
    where: str
    row: int


def read_contrast(source: str | Path, limit: int | None = None) -> list[Example]:
    """Examples from a file, or from a Hub dataset ``user/name`` or ``user/name:file``, in the source's order.

    ``limit`` bounds the rows that are used. Which ones are used depends on what is in the rows and not on their order.
    Raises DataError, which lists every problem with its line or row.
    """
    names: Counter[str] = Counter()
    examples = read_source(source, formats.columns(), "contrast data", formats.EXPECTED, _builder(names))
    name = Path(source).name
    if set(names) - {formats.FORMATS[0].name, formats.FORMATS[1].name}:
        summary = ", ".join(f"{count_of(count, 'row')} of {form}" for form, count in names.items())
        notice(f"{name} holds {summary}")
    return _both(chosen_rows(examples, limit, name), str(source))


def as_chats(examples: Iterable[Example]) -> list[Example]:
    """The examples with each text prompt as one user message."""
    return [replace(e, prompt=(Message("user", e.prompt),)) if isinstance(e.prompt, str) else e for e in examples]


@dataclass(frozen=True)
class Counts:
    """How much contrast data says: its rows, distinct prompts, distinct rows, and rows whose two responses are the same."""

    rows: int
    prompts: int
    distinct_rows: int
    identical: int


def count(examples: Iterable[Example]) -> Counts:
    """Count rows and what repeats in them; prompts that differ in case or white space alone are one."""
    rows: dict[tuple[str, int], list[Example]] = {}
    for example in examples:
        rows.setdefault((prompt_digest(example.prompt), example.row), []).append(example)
    contents = {(digest, *((e.label, e.response) for e in row)) for (digest, _), row in rows.items()}
    identical = sum(len(row) > 1 and len({e.response for e in row}) == 1 for row in rows.values())
    return Counts(len(rows), len({digest for digest, _ in rows}), len(contents), identical)


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


def _builder(names: Counter[str]) -> Build[Example]:
    """What makes the one or two examples of a row, and counts the formats of rows."""

    def build(row: object, where: str, index: int) -> list[Example]:
        form, answers = formats.answered(row)
        names[form.name] += 1
        return [Example(prompt, response, label, where, index) for prompt, response, label in answers]

    return build


def chosen_rows(examples: Sequence[Example], limit: int | None, name: str) -> list[Example]:
    """At most ``limit`` rows, chosen by digests of their prompts, then of their responses, in the order that they have."""
    rows: dict[int, list[Example]] = {}
    for example in examples:
        rows.setdefault(example.row, []).append(example)
    if limit is None or len(rows) <= limit:
        return list(examples)

    def drawn(row: int) -> tuple[str, str]:
        # a hash of the hash: the digest itself is what prompts are known by elsewhere
        prompt = hashlib.sha256(prompt_digest(rows[row][0].prompt).encode("ascii")).hexdigest()
        return prompt, data_hash(rows[row])

    rows_used = set(sorted(rows, key=drawn)[:limit])
    notice(f"{name}: {limit} of {len(rows)} rows are used (the limit); the same ones whatever their order")
    return [example for example in examples if example.row in rows_used]
