"""Held-out questions: what an edit is chosen by and what it is reported on, never the same.

A row has a ``prompt`` and any of: ``positive`` and ``negative`` (responses to prefer and not to), ``choices`` with
``answer`` (an index) or ``labels`` (1 for each true one, as TruthfulQA has them), ``answer`` alone (a text, or a list of
accepted ones). A prompt belongs to the split "select" or "report" by its own hash, whatever file or order it is in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from steer2edit.data import formats
from steer2edit.data.prompts import Fault, Message, Prompt, prompt_digest, prompt_text, read_prompt, text_fault
from steer2edit.data.readers import key_of
from steer2edit.data.records import read_source
from steer2edit.errors import DataError, listing, shown

Split = Literal["select", "report"]
_COLUMNS = frozenset({"prompt", "positive", "negative", "choices", "labels", "answer"})
_PURPOSE = "held-out questions"
_EXPECTED = 'expected at least "prompt"'


@dataclass(frozen=True)
class Question:
    """One held-out row; what it does not have is empty. ``labels`` says of each choice whether it is true.

    ``split`` is the split that a folder of data put it in; None where the prompt's hash decides.
    """

    prompt: Prompt
    where: str
    positive: str = ""
    negative: str = ""
    choices: tuple[str, ...] = ()
    labels: tuple[bool, ...] = ()
    answers: tuple[str, ...] = ()
    split: Split | None = None

    @property
    def digest(self) -> str:
        """16 hex digits that stand for the prompt."""
        return prompt_digest(self.prompt)


def read_questions(source: str | Path, purpose: str = _PURPOSE) -> list[Question]:
    """Questions from a file or a Hub dataset. Raises DataError listing every problem, ``purpose`` says of what."""
    return _chat(read_source(source, _COLUMNS | formats.columns(), purpose, _EXPECTED, _question))


def knowledge_questions() -> list[Question]:
    """The packaged questions of general knowledge, which no edit should lose."""
    return read_questions(Path(__file__).parents[1] / "behaviors" / "heldout" / "knowledge.jsonl")


def take(questions: Iterable[Question], split: Split, seed: int = 0) -> list[Question]:
    """The questions of one split. Another ``seed`` deals out otherwise those that do not say their split."""
    if split not in get_args(Split):
        raise DataError(f"there is no split {shown(split)}; there are select and report")
    return [question for question in questions if (question.split or _side(question.digest, seed)) == split]


def refuse_seen(questions: Sequence[Question], seen: Iterable[str], what: str) -> None:
    """Raise DataError where a question's prompt is among the digests ``seen`` by ``what``: no number may rest on it."""
    known = set(seen)
    repeated = [
        f"{question.where}: {shown(prompt_text(question.prompt))}" for question in questions if question.digest in known
    ]
    if repeated:
        raise DataError(
            f"{len(repeated)} of {len(questions)} prompts to report on were used to make or choose {what}; "
            f"report on others:\n{listing(repeated)}"
        )


def _side(digest: str, seed: int) -> Split:
    return "select" if hashlib.sha256(f"{seed} {digest}".encode()).digest()[0] % 2 else "report"


def _chat(questions: list[Question]) -> list[Question]:
    from dataclasses import replace

    return [replace(q, prompt=(Message("user", q.prompt),)) if isinstance(q.prompt, str) else q for q in questions]


def _question(row: object, where: str, _index: int) -> list[Question]:
    if not isinstance(row, dict):
        raise Fault(f"expected an object, found {shown(row)}")
    keyed = {key_of(key): value for key, value in row.items()}
    if keyed.get("prompt") is None or {"chosen", "completion"} & keyed.keys():
        return _preferred(row, where)
    faults: list[str] = []
    prompt: Prompt = ""
    try:
        prompt = read_prompt("prompt", keyed["prompt"])
    except Fault as fault:
        faults += map(str, fault.args)
    pair = [key for key in ("positive", "negative") if keyed.get(key) is not None]
    if len(pair) == 1:
        faults.append(f"{pair[0]} stands alone; expected both positive and negative, or neither")
    faults += [text_fault(key, keyed[key], filled=True) for key in pair]
    choices, answer, labels = keyed.get("choices"), keyed.get("answer"), keyed.get("labels")
    answers: tuple[str, ...] = ()
    if choices is not None:
        wrong, marks = _labels(choices, answer, labels)
        faults.append(wrong)
    else:
        marks = ()
        texts = [] if answer is None else answer if isinstance(answer, list) else [answer]
        answers = tuple(str(one) for one in texts if isinstance(one, (str, int, float)))
        if len(answers) != len(texts) or any(not one.strip() for one in answers):
            faults.append(f"answer is {shown(answer)}; expected a text or a list of texts")
    if any(faults):
        raise Fault(*filter(None, faults))
    choices = tuple(choices) if isinstance(choices, list) else ()
    positive, negative = (str(keyed[key]) if pair else "" for key in ("positive", "negative"))
    return [Question(prompt, where, positive, negative, choices, marks, answers)]


def _preferred(row: dict[str, object], where: str) -> list[Question]:
    """A question from a row of a preference format, whose responses are those to prefer and not to."""
    form, keyed = formats.recognise(row)
    answers = form.read(keyed) if form.read else []
    sides = {label: response for _, response, label in answers}
    if len(sides) < 2 or not answers[0][0]:
        raise Fault(
            f'"prompt" is missing, found {shown(list(row))}; {_EXPECTED}, or pairs in one of the formats in docs/data.md'
        )
    return [Question(answers[0][0], where, sides["positive"], sides["negative"])]


def _labels(choices: object, answer: object, labels: object) -> tuple[str, tuple[bool, ...]]:
    """What is wrong with a row's choices, and which of them are true."""
    if not isinstance(choices, list) or len(choices) < 2 or any(text_fault("", c, filled=True) for c in choices):
        return f"choices are {shown(choices)}; expected a list of at least two texts", ()
    if labels is not None:
        if not isinstance(labels, list) or len(labels) != len(choices) or any(x not in (0, 1) for x in labels):
            return f"labels are {shown(labels)}; expected a 0 or 1 for each of the {len(choices)} choices", ()
        marks = tuple(bool(x) for x in labels)
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        marks = tuple(index == answer for index in range(len(choices)))
    elif isinstance(answer, str) and choices.count(answer) == 1:
        marks = tuple(choice == answer for choice in choices)
    else:
        return f"answer is {shown(answer)}; expected the index of one of the {len(choices)} choices, or labels", ()
    return ("", marks) if 0 < sum(marks) < len(marks) else ("labels must mark some choices as true and not all", ())
