"""The ways to contrast data: answers under opposite instructions, the ends of sorted answers, and answers of one side alone.

A way is a frozen value: ``described`` gives its settings in plain values, ``rows`` writes the answers and puts them together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from steer2edit.data.metric_choice import Goal
from steer2edit.data.prompts import prompt_digest
from steer2edit.data.questions import Question
from steer2edit.engines.engine import Answer, Request, Sampling
from steer2edit.errors import DataError, count_of
from steer2edit.notices import notice
from steer2edit.pairs.filters import REASONS, Allowed, Tally, sample_fault
from steer2edit.pairs.journal import key_of
from steer2edit.pairs.samples import Labelled, Pair, Row, Sample
from steer2edit.pairs.sorting import (
    SortBy,
    Values,
    by_answer,
    by_function,
    by_length,
    by_pattern,
    has_key,
    is_right,
)
from steer2edit.pairs.tails import LEAST_PAIRED, ends
from steer2edit.pairs.telling import Instructions, takes_system, told
from steer2edit.pairs.writing import Writer


@dataclass(frozen=True)
class Written:
    """The rows that a way gave before they are sifted; ``answers`` counts single answers that were left out before."""

    rows: Sequence[Row]
    answers: Tally | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further plain values for the receipt."""


def check_samples(samples: int, sampling: Sampling) -> None:
    """Raise DataError where a prompt would get the same answer several times."""
    if samples > 1 and not sampling.temperature:
        raise DataError(f"{samples} answers at a temperature of 0 are all the same; give a higher temperature")


def prompts_asked(questions: Sequence[Question]) -> dict[str, Any]:
    """The prompts as a setting, in plain values: what their rows accept as right changes no answer."""
    return {"prompts": key_of([question.digest for question in questions]), "number_of_prompts": len(questions)}


class Way(Protocol):
    """How rows come about."""

    def described(self) -> dict[str, Any]:
        """The settings in plain values, for the receipt."""

    def asked(self, questions: Sequence[Question]) -> dict[str, Any]:
        """What the answers depend on of these settings and of the prompts: a run that goes on has the same."""

    def check(self, questions: Sequence[Question], sampling: Sampling) -> None:
        """Raise DataError where no rows can come of it, before an answer is written."""

    def rows(self, questions: Sequence[Question], writer: Writer, sampling: Sampling, allowed: Allowed) -> Written:
        """Write the answers to ``questions``, and make rows of them."""


@dataclass(frozen=True)
class Opposites:
    """Answers under opposite instructions, ``samples`` of each to a prompt."""

    instructions: Instructions
    samples: int = 1

    def described(self) -> dict[str, Any]:
        return {
            "way": "instructions",
            "positive": list(self.instructions.positive),
            "negative": list(self.instructions.negative),
            "samples": self.samples,
        }

    def asked(self, questions: Sequence[Question]) -> dict[str, Any]:
        return {**self.described(), **prompts_asked(questions)}

    def check(self, _questions: Sequence[Question], sampling: Sampling) -> None:
        check_samples(self.samples, sampling)

    def rows(self, questions: Sequence[Question], writer: Writer, sampling: Sampling, _allowed: Allowed) -> Written:
        self.check(questions, sampling)
        system = takes_system(writer.engine, self.instructions.positive[0])
        requests = [
            told(question.prompt, instruction, number, system)
            for index, question in enumerate(questions)
            for number in range(self.samples)
            for instruction in self.instructions.of(index)
        ]
        answers = iter(writer.write(requests, sampling, "answers under both instructions"))
        rows = [
            Pair(Sample(question, next(answers), number), Sample(question, next(answers), number))
            for question in questions
            for number in range(self.samples)
        ]
        return Written(rows, more={"told_as": "system message" if system else "beginning of the user's message"})


@dataclass(frozen=True)
class Sorted:
    """Several answers of a model's own to each prompt, sorted. The ends make pairs, or classes where pairs are few.

    ``judge`` gives the values for "judge", ``function`` those for "function", which is named for the receipt.
    """

    by: SortBy
    goal: Goal
    samples: int = 8
    share: float = 0.1
    pattern: str | None = None
    function: Callable[[str, str], float] | None = None
    named: str | None = None
    judge: Callable[[Sequence[Sample]], Values] | None = None
    only_correct: bool = False

    def described(self) -> dict[str, Any]:
        return {
            "way": "sorted",
            "by": self.by,
            "goal": self.goal,
            "samples": self.samples,
            "tails": self.share,
            "pattern": self.pattern,
            "function": self.named,
            "only_correct": self.only_correct,
        }

    def asked(self, questions: Sequence[Question]) -> dict[str, Any]:
        # whatever they are sorted by, they are the same answers
        return {"way": "sorted", "samples": self.samples, **prompts_asked(questions)}

    def check(self, questions: Sequence[Question], sampling: Sampling) -> None:
        check_samples(self.samples, sampling)
        if (self.by == "answer" or self.only_correct) and not any(q.answers or q.choices for q in questions):
            raise DataError("no row of the prompts has an answer to compare with; expected a column answer or choices")

    def rows(self, questions: Sequence[Question], writer: Writer, sampling: Sampling, allowed: Allowed) -> Written:
        self.check(questions, sampling)
        places = [(question, number) for question in questions for number in range(self.samples)]
        requests = [Request(question.prompt, sample=number) for question, number in places]
        answers = writer.write(requests, sampling, "answers to sort")
        samples = [Sample(q, answer, number) for (q, number), answer in zip(places, answers, strict=True)]
        # an answer that is cut off is one of the longest
        left, tally = self._sifted(samples, replace(allowed, cut=True) if self.by == "length" else allowed)
        if not left:
            return Written([], tally)
        values = self._values(left)
        # what a prompt asks for multiplies a length
        compared = [math.log1p(value) for value in values] if self.by == "length" else values
        owners = [prompt_digest(sample.question.prompt) for sample in left]
        found = ends(compared, owners, self.share, more=self.goal == "more")
        more = {"prompts_with_both_ends": found.prompts}
        if not (found.better and found.worse):
            cut = self.by == "length" and not any(sample.answer.ended for sample in left)
            instead = (
                "All were cut off: give a larger --max-new-tokens"
                if cut
                else "Give other --prompts, more --samples, or a higher --temperature"
            )
            raise DataError(
                f"the {len(left)} answers that can be sorted (of {len(samples)}) do not differ by {self.by}: there are no ends "
                f"to take. {instead}"
            )
        rows: list[Row] = [Pair(left[good], left[bad]) for good, bad in found.pairs]
        if not found.paired:
            notice(
                f"{count_of(found.prompts, 'prompt has', 'prompts have')} answers at both ends, and pairs take {LEAST_PAIRED}: "
                "the ends are taken over all prompts as two classes, which may differ in their topics too; more --samples "
                "give pairs"
            )
            rows = [Labelled(left[i], "positive") for i in found.better]
            rows += [Labelled(left[i], "negative") for i in found.worse]
        return Written(rows, tally, {**more, "paired": found.paired})

    def _sifted(self, samples: Sequence[Sample], allowed: Allowed) -> tuple[list[Sample], Tally]:
        """The answers that can be sorted, and the count of the others."""
        wrong, without = "wrong", "without a right answer in its row"
        reasons: Counter[str] = Counter()
        left = []
        for sample in samples:
            fault = sample_fault(sample, allowed)
            if fault is None and (self.only_correct or self.by == "answer") and not has_key(sample):
                fault = without
            if fault is None and self.only_correct and not is_right(sample):
                fault = wrong
            if fault is None:
                left.append(sample)
            else:
                reasons[fault] += 1
        return left, Tally(
            len(samples), {reason: reasons[reason] for reason in (*REASONS, without, wrong) if reasons[reason]}
        )

    def _values(self, samples: Sequence[Sample]) -> Values:
        if self.by == "pattern":
            assert self.pattern is not None  # the command line asks for it
            return by_pattern(samples, self.pattern)
        if self.by == "function":
            assert self.function is not None
            return by_function(samples, self.function)
        if self.by == "judge":
            assert self.judge is not None
            return self.judge(samples)
        return by_answer(samples) if self.by == "answer" else by_length(samples)


@dataclass(frozen=True)
class PositiveOnly:
    """Answers that show the behaviour, against a model's own answers to background prompts (mean-centring, arXiv 2312.03813).

    Positive answers are written under ``instructions``, or are ``texts`` by the digests of their prompts.
    """

    background: Sequence[Question]
    instructions: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        return {
            "way": "positive only",
            "positive": list(self.instructions),
            "own_texts": len(self.texts),
            "background": len(self.background),
            **({"own_texts_key": key_of(sorted(self.texts.items()))} if self.texts else {}),
        }

    def asked(self, questions: Sequence[Question]) -> dict[str, Any]:
        # where the positive side is there, the background alone is answered
        prompts = {} if self.texts else prompts_asked(questions)
        background = key_of([question.digest for question in self.background])
        return {"way": "positive only", "positive": list(self.instructions), "background": background, **prompts}

    def check(self, _questions: Sequence[Question], _sampling: Sampling) -> None:
        """One answer to each prompt can always be written."""

    def rows(self, questions: Sequence[Question], writer: Writer, sampling: Sampling, _allowed: Allowed) -> Written:
        notice(
            "--positive-only compares answers with the model's answers to other prompts: their topics differ too, and the "
            "vector is weaker than that of pairs"
        )
        plain = writer.write([Request(q.prompt) for q in self.background], sampling, "answers to background prompts")
        if self.texts:
            texts = [self.texts[question.digest] for question in questions]
            answers = [Answer(text, writer.engine.count_tokens(text) or len(text.split()), True) for text in texts]
        else:
            system = takes_system(writer.engine, self.instructions[0])
            requests = [
                told(q.prompt, self.instructions[i % len(self.instructions)], 0, system)
                for i, q in enumerate(questions)
            ]
            answers = writer.write(requests, sampling, "answers under the instruction")
        rows: list[Row] = [Labelled(Sample(q, a), "positive") for q, a in zip(questions, answers, strict=True)]
        rows += [Labelled(Sample(q, a), "negative") for q, a in zip(self.background, plain, strict=True)]
        return Written(rows)
