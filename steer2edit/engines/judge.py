"""A judge: a model that says whether an answer shows a trait, and whether it is coherent.

It says so by the probabilities of yes and no. A judge is tried before it is used, on answers that people labelled
(``agreement.py``). What it cannot tell apart it is not asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steer2edit.data.prompts import Prompt
from steer2edit.engines.agreement import LEAST_AUC, Agreement, LabelledAnswer, agreement_of, labelled_answers
from steer2edit.engines.engine import Engine, Request
from steer2edit.notices import notice
from steer2edit.progress import Progress, silent

Asked = Literal["shows", "coherent"]
TRIED = 32
"""Labels of each kind that a judge is tried on, at most, where there are more."""
AT_A_TIME = 32
"""Questions to a judge after which its progress is shown."""
_CHARACTERS = 4000
"""Of a prompt and of an answer no more characters are shown to a judge: the beginning tells."""


@dataclass(frozen=True)
class Judge:
    """An engine with what is known of its judgement: ``shows`` and ``coherent`` as it agrees with labels.

    Probabilities are moved so that 0.5 lies where the labels part best. What the judge tells apart too badly, it gives as nan.
    """

    engine: Engine
    on_traits: Agreement
    on_coherence: Agreement

    @property
    def knows_traits(self) -> bool:
        """Whether it told labelled answers apart, which show a trait or do not."""
        return self.on_traits.trusted

    def shows(self, trait: str, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """How likely each answer shows ``trait``, a description in words; nan where the judge says neither yes nor no."""
        return self._said(self.on_traits, [trait_request(trait, p, a) for p, a in zip(prompts, answers, strict=True)])

    def coherent(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """How likely each answer makes sense; nan where the judge says neither yes nor no."""
        requests = [coherence_request(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return self._said(self.on_coherence, requests)

    def described(self) -> dict[str, Any]:
        """What judges, and how it agrees with labels, for a receipt."""
        return {
            "engine": self.engine.described(),
            "least_auc": LEAST_AUC,
            "shows": self.on_traits.described(),
            "coherent": self.on_coherence.described(),
        }

    def _said(self, agreement: Agreement, requests: Sequence[Request]) -> list[float]:
        if not agreement.trusted or not requests:
            return [math.nan] * len(requests)
        return [agreement.moved(yes) for yes in self.engine.yes(requests)]


def tried(
    engine: Engine,
    labelled: Sequence[LabelledAnswer] | None = None,
    general: Sequence[LabelledAnswer] | None = None,
    progress: Progress = silent,
) -> Judge:
    """A judge whose agreement with labels is measured now, by one question for each label.

    ``labelled`` are answers that show the trait in question or do not, such as a behaviour's pairs; None for the packaged ones,
    of three other traits. ``general`` are answers that make sense or do not; None for the packaged ones. A notice says what the
    judge is not used for.
    """
    packaged = labelled_answers() if labelled is None or general is None else []
    of_traits = packaged if labelled is None else labelled
    of_sense = packaged if general is None else general
    asked = [trait_request(one.trait, one.prompt, one.answer) for one in of_traits]
    asked += [coherence_request(one.prompt, one.answer) for one in of_sense]
    with progress("try the judge on labelled answers", total=len(asked)) as advance:
        said = []
        for first in range(0, len(asked), AT_A_TIME):
            said += engine.yes(asked[first : first + AT_A_TIME])
            advance(len(said) - first)
    shown, sense = said[: len(of_traits)], said[len(of_traits) :]
    judge = Judge(
        engine,
        agreement_of("traits", shown, [one.shows for one in of_traits]),
        agreement_of("coherence", sense, [one.coherent for one in of_sense]),
    )
    for agreement in (judge.on_traits, judge.on_coherence):
        if not agreement.trusted:
            notice(f"the judge is not used for {agreement.what}: {agreement}")
    return judge


def trait_request(trait: str, prompt: Prompt, answer: str) -> Request:
    """The question whether an answer shows a trait."""
    return Request(f"Trait: {trait.strip()}\n\n{_shown(prompt, answer)}\n\nDoes the answer show the trait? Yes or No?")


def coherence_request(prompt: Prompt, answer: str) -> Request:
    """The question whether an answer makes sense."""
    return Request(f"{_shown(prompt, answer)}\n\nIs the answer clear, and does it make sense? Reply with Yes or No.")


def _shown(prompt: Prompt, answer: str) -> str:
    asked = prompt if isinstance(prompt, str) else prompt[-1].content
    return f"Question: {asked[:_CHARACTERS].strip()}\n\nAnswer: {answer[:_CHARACTERS].strip()}"
