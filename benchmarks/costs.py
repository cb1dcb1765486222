"""The texts on which the power table takes the cost of a candidate: a model's own answers in chat, and prose."""

from __future__ import annotations

import re
from dataclasses import dataclass

from steer2edit.data.everyday import everyday_prompts
from steer2edit.data.questions import Question
from steer2edit.data.templates import templated
from steer2edit.engines.own_answers import own_answers
from steer2edit.runtime.model import LoadedModel
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.settle import neutral_text


@dataclass(frozen=True)
class Costs:
    """The text that a KL is met on, called ``kind``, and prose, where the text is another."""

    kind: str
    budget: NeutralText
    other: NeutralText | None


def costs_of(loaded: LoadedModel, fingerprint: str, rows: int) -> Costs:
    """The texts, of so many answers and windows of 128 tokens each."""
    prose = neutral_text(loaded, limit=rows)
    if not templated(loaded.tokenizer):
        return Costs("prose", prose, None)
    prompts = everyday_prompts("neutral")
    chosen = [prompts[i * len(prompts) // rows] for i in range(min(rows, len(prompts)))]
    texts = [loaded.tokenizer.decode(one.ids) for one in own_answers(loaded, chosen, fingerprint=fingerprint)]
    return Costs("chat", NeutralText(loaded, texts, max_tokens=1 << 20), prose)


def names_right(answer: str, question: Question) -> bool:
    """Whether an answer names the right choice and no wrong one."""
    said = f" {_words(answer)} "
    named = [f" {_words(choice)} " in said for choice in question.choices]
    marks = list(zip(named, question.labels, strict=True))
    return (True, True) in marks and (True, False) not in marks


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
