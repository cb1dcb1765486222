"""The way from a sentence: instructions and questions are written first, then answers under the instructions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steer2edit.data.questions import Question
from steer2edit.engines.engine import Sampling
from steer2edit.notices import notice
from steer2edit.pairs.questions import chosen_questions
from steer2edit.pairs.telling import Instructions
from steer2edit.pairs.trait import Trait, instructions, write_opposite, write_questions
from steer2edit.pairs.ways import Opposites, PositiveOnly, Way, check_samples, prompts_asked
from steer2edit.pairs.writing import Writer


@dataclass(frozen=True)
class FromTrait:
    """A trait whose instructions, and ``questions`` of whose prompts, a model writes.

    Instructions of the user's come in place of written ones. With a ``background`` answers of the positive side alone are
    written.
    """

    trait: Trait
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    questions: int = 0
    samples: int = 1
    background: Sequence[Question] = ()

    def described(self) -> dict[str, Any]:
        """The settings in plain values, for the receipt."""
        return {
            "way": "trait",
            "trait": self.trait.name,
            "description": self.trait.description,
            "positive": list(self.positive),
            "negative": list(self.negative),
            "questions": self.questions,
            "samples": self.samples,
            "background": len(self.background),
        }

    def asked(self, questions: Sequence[Question]) -> dict[str, Any]:
        """What the answers depend on of these settings and of the prompts: a run that goes on has the same."""
        return {**self.described(), **prompts_asked(questions)}

    def check(self, _questions: Sequence[Question], sampling: Sampling) -> None:
        """Raise DataError where a prompt would get the same answer several times."""
        check_samples(self.samples, sampling)

    def resolved(
        self, writer: Writer, questions: Sequence[Question], seed: int = 0
    ) -> tuple[Way, list[Question], dict[str, Any]]:
        """The way with its instructions, the prompts, and what was written for the receipt.

        Written questions come first, and the given ones fill up to the number that there was.
        """
        asked = list(questions)
        written: list[Question] = []
        if self.questions:
            written = write_questions(self.trait, writer, self.questions, seed)
            if len(written) < self.questions:
                notice(
                    f"the writer gave {len(written)} usable questions of the {self.questions} asked for; other prompts fill up"
                )
            asked = chosen_questions([*written, *asked], None)[: max(len(asked), len(written))]
        opposite = None
        if not self.negative and not self.background:
            opposite = write_opposite(self.trait, writer, seed)
        both = instructions(self.trait, opposite)
        both = Instructions(self.positive or both.positive, self.negative or both.negative)
        more = {"opposite": opposite, "written_questions": len(written)}
        if self.background:
            return PositiveOnly(self.background, both.positive), asked, more
        return Opposites(both, self.samples), asked, more
