"""Which answers are left out, and why: each filter is one entry, and each answer that it takes is counted.

An answer is left out for the first reason that holds. What a judge says comes last, because it costs a pass over the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from steer2edit.data.degeneration import is_empty
from steer2edit.pairs.near_duplicates import copies, repeated, words_of
from steer2edit.pairs.samples import Pair, Row, Sample, Think

EMPTY = "empty"
CUT = "cut off at the limit of tokens"
LOOPS = "goes round in a loop"
REFUSES = "refuses to play along, or speaks of its instruction"
ALIKE = "both sides say the same"
REPEATED = "repeats another answer"
INCOHERENT = "incoherent, by the judge"
CONTRADICTS = "contradicts its label, by the judge"
REASONS = (EMPTY, CUT, LOOPS, REFUSES, ALIKE, REPEATED, INCOHERENT, CONTRADICTS)
"""All reasons, in the order in which they are looked for."""

_REFUSES = (
    r"\b(?:as|i am|i'm)(?: just| only)? an? (?:ai|artificial intelligence|(?:large )?language model)\b",
    r"\bi(?: cannot|'m unable| am unable|'m not able| am not able| can't| can not| won't| will not)(?: to)? "
    r"(?:respond|answer|speak|talk|act|behave|pretend|play|role-?play|adopt|use (?:that|this|such)|engage)\b",
    r"\bi(?: don't| do not) feel comfortable\b",
    r"\b(?:answer|reply|respond|write)(?:ing)? (?:in|with) (?:a|an|the) [\w-]+ (?:style|tone|manner|way)\b",
    r"\bhere(?:'s| is| are) (?:a|an|my|the|your|some) (?:very |more )?[\w-]+ (?:answer|reply|response|version)\b",
    r"\b(?:my|your|the) (?:system prompt|instructions?) (?:say|says|tell|tells|ask|asks)\b",
)
_OPENING = 200
"""Characters of an answer in which a refusal is looked for: later ones are part of a text."""
_REFUSAL = re.compile("|".join(_REFUSES), re.IGNORECASE)
_LOOP_WORDS, _LOOP_TAIL = 12, 48


@dataclass(frozen=True)
class Tally:
    """How many rows there were, and for each reason how many of them were left out."""

    offered: int
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """How many are left."""
        return self.offered - sum(self.reasons.values())

    def __str__(self) -> str:
        why = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items() if count)
        return f"kept {self.kept} of {self.offered}" + (f" ({why})" if why else "")


@dataclass(frozen=True)
class Allowed:
    """What is not left out though a filter would."""

    cut: bool = False
    refusals: bool = False


def sample_fault(sample: Sample, allowed: Allowed = Allowed()) -> str | None:
    """Why one answer is left out, whatever the others say; None for an answer that is not."""
    text = sample.answer.text
    if is_empty(text):
        return EMPTY
    if _loops(text, sample.answer.ended):
        return LOOPS
    if not sample.answer.ended and not allowed.cut:
        return CUT
    if not allowed.refusals and _REFUSAL.search(text[:_OPENING]):
        return REFUSES
    return None


def row_fault(row: Row, allowed: Allowed = Allowed(), think: Think = "strip") -> str | None:
    """Why a row is left out: for one of its answers, or because both sides say the same.

    Sides are compared in what a row holds of a thought and an answer (``think``). They say the same where they differ in spaces
    alone: one word, a capital, a mark or an emoji may be the behaviour.
    A pair is read up to the end of its shorter answer, so that the longer one may be cut off after it.
    """
    samples = (row.positive, row.negative) if isinstance(row, Pair) else (row.sample,)
    if isinstance(row, Pair) and min(samples, key=_reach).answer.ended:
        allowed = replace(allowed, cut=True)
    faults = [fault for sample in samples if (fault := sample_fault(sample, allowed))]
    if faults:
        return min(faults, key=REASONS.index)
    if isinstance(row, Pair) and len({_without_spacing(sample.response(think)) for sample in samples}) == 1:
        return ALIKE
    return None


def sift(
    rows: Sequence[Row],
    allowed: Allowed = Allowed(),
    judge: Callable[[Sequence[Row]], Sequence[str | None]] | None = None,
    think: Think = "strip",
) -> tuple[list[Row], Tally]:
    """The rows that stay, in their order, and the count of the others.

    A row repeats another where either of its answers nearly repeats an earlier one of the same side to another row. Short answers
    may agree: a row of short ones alone repeats another where its prompt and all its answers are the same.
    What is compared is what rows hold of a thought and an answer (``think``). ``judge`` gives for each row the reason why it is
    left out, or None; it sees the rows alone that no other filter takes.
    """
    reasons: Counter[str] = Counter()
    left: list[Row] = []
    for row in rows:
        fault = row_fault(row, allowed, think)
        if fault is None:
            left.append(row)
        else:
            reasons[fault] += 1
    again = _repeats(left, think)
    reasons[REPEATED] += len(again)
    left = [row for index, row in enumerate(left) if index not in again]
    if judge is not None and left:
        verdicts = judge(left)
        reasons.update(fault for fault in verdicts if fault is not None)
        left = [row for row, fault in zip(left, verdicts, strict=True) if fault is None]
    return left, Tally(len(rows), {reason: reasons[reason] for reason in REASONS if reasons[reason]})


def _without_spacing(text: str) -> str:
    """A text without its empty lines, and with one space where it has several. Where lines break is part of it."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _reach(sample: Sample) -> tuple[int, bool]:
    """How far an answer goes: where two are equally long, that which was cut off goes further."""
    return sample.answer.tokens, not sample.answer.ended


def _repeats(rows: Sequence[Row], think: Think) -> set[int]:
    found: set[int] = set()
    for side in ("positive", "negative"):
        answers = [
            (index, sample.response(think))
            for index, row in enumerate(rows)
            for its_side, sample in row.sides
            if its_side == side
        ]
        found |= {answers[i][0] for i in repeated([text for _, text in answers])}
    left = [index for index in range(len(rows)) if index not in found]
    texts = [[sample.response(think) for _, sample in rows[index].sides] for index in left]
    contexts = [(rows[index].question.digest, *(side for side, _ in rows[index].sides)) for index in left]
    return found | {left[i] for i in copies(texts, contexts)}


def _loops(text: str, ended: bool) -> bool:
    """Whether a text went round in a loop: as ``data.degeneration.loops`` says of tokens, said of words."""
    words = words_of(text)
    if ended or len(words) < _LOOP_WORDS:
        return False
    seen: set[tuple[str, ...]] = set()
    again = []
    for at in range(len(words) - 3):
        gram = tuple(words[at : at + 4])
        again.append(gram in seen)
        seen.add(gram)
    tail = again[-_LOOP_TAIL:]
    return 2 * sum(tail) >= len(tail)
