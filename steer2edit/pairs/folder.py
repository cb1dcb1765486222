"""The folder of data: three files of rows, disjoint by prompt, and the receipt ``data.json``.

A row of ``train.jsonl`` is a pair, or one labelled answer. ``select.jsonl`` and ``report.jsonl`` hold questions, with both
answers where there are both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from steer2edit.data.data_folder import FORMAT, HELD_OUT, RECEIPT, TRAIN
from steer2edit.data.prompts import Prompt, prompt_digest
from steer2edit.data.questions import Question
from steer2edit.errors import TargetError, listing
from steer2edit.files.atomic import write_text
from steer2edit.pairs.journal import JOURNAL
from steer2edit.pairs.samples import Pair, Row, Think
from steer2edit.pairs.split import Part

FILES: Mapping[Part, str] = {"train": TRAIN, "select": HELD_OUT["select"], "report": HELD_OUT["report"]}
"""The file of each part."""


def check_folder(folder: Path) -> None:
    """Raise TargetError unless data may be written at ``folder``.

    The folder is absent, empty, or holds what this command writes and nothing else. Whether it is of the same settings is the
    journal's to say.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise TargetError(f"{folder} exists and is not a folder")
    if not folder.exists():
        return
    own = {JOURNAL, RECEIPT, *FILES.values()}
    names = sorted(one.name for one in folder.iterdir())
    if foreign := [name for name in names if name not in own]:
        raise TargetError(
            f"{folder} holds files that steer2edit data did not write:\n{listing(foreign)}\nGive another folder"
        )
    if names and JOURNAL not in names:
        raise TargetError(f"{folder} holds data without its {JOURNAL}; give another folder")


def clear_folder(folder: Path) -> None:
    """Remove what another run wrote at ``folder``: first the receipt, last the journal, which holds every answer."""
    clear_rows(folder)
    (folder / JOURNAL).unlink(missing_ok=True)


def clear_rows(folder: Path) -> None:
    """Remove the receipt at ``folder`` and then the rows; the journal and its answers stay."""
    for name in (RECEIPT, *FILES.values()):
        (folder / name).unlink(missing_ok=True)


def train_rows(rows: Sequence[Row], think: Think) -> list[dict[str, Any]]:
    """Contrast data: a pair in one row, or one labelled answer."""
    found = []
    for row in rows:
        prompt = _prompt(row.question.prompt)
        if isinstance(row, Pair):
            sides: dict[str, str] = {"positive": row.positive.response(think), "negative": row.negative.response(think)}
        else:
            sides = {"response": row.sample.response(think), "label": row.side}
        found.append({"prompt": prompt, **sides})
    return found


def question_rows(rows: Sequence[Row], asked: Collection[str]) -> list[dict[str, Any]]:
    """Held-out questions, one for each prompt: with both answers of its first pair, and what its own row accepts.

    ``asked`` holds the digests of the prompts that data is made from: the others are the background's, and not questions.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        digest = prompt_digest(row.question.prompt)
        if digest in found or digest not in asked:
            continue
        # without a thought: held-out responses are compared as they are read
        both: dict[str, str] = {}
        if isinstance(row, Pair):
            both = {"positive": row.positive.response(), "negative": row.negative.response()}
        found[digest] = {"prompt": _prompt(row.question.prompt), **both, **_accepted(row.question)}
    return list(found.values())


def write_folder(folder: Path, files: Mapping[Part, Sequence[Mapping[str, Any]]], receipt: Mapping[str, Any]) -> None:
    """Write the three files and then the receipt, each whole or not at all.

    The receipt names the files' hashes. Raises Steer2EditError where the disk is full.
    """
    hashes = {}
    for part, name in FILES.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in files[part])
        hashes[name] = hashlib.sha256(text.encode("utf-8")).hexdigest()
        write_text(folder / name, text, "rows")
    content = {"format": FORMAT, **receipt, "files": hashes}
    write_text(folder / RECEIPT, json.dumps(content, indent=1, ensure_ascii=False) + "\n", "data")


def _prompt(prompt: Prompt) -> Any:
    """A prompt as a row has it: a text for a single user message."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return [message._asdict() for message in prompt]


def _accepted(question: Question) -> dict[str, Any]:
    if question.choices:
        return {"choices": list(question.choices), "labels": [int(label) for label in question.labels]}
    return {"answer": list(question.answers)} if question.answers else {}
