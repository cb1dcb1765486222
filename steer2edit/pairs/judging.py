"""A judge's opinion on rows, through the journal: whether answers are coherent, and whether they show their side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from steer2edit.data.prompts import Prompt
from steer2edit.errors import DataError
from steer2edit.pairs.filters import CONTRADICTS, INCOHERENT
from steer2edit.pairs.journal import Journal, key_of, without_versions
from steer2edit.pairs.measure import Difference, difference
from steer2edit.pairs.samples import Pair, Row, Sample
from steer2edit.pairs.writing import alone
from steer2edit.progress import Progress, silent

COHERENT = 0.5
"""Least probability of yes of an answer that is called coherent."""
_BATCH = 64


class Judge(Protocol):
    """Probabilities of yes, one for each answer; nan where the judge says neither yes nor no."""

    @property
    def knows_traits(self) -> bool:
        """Whether it told labelled answers apart, which show a trait or do not."""

    def shows(self, trait: str, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """How likely it is that each answer shows the trait."""

    def coherent(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """How likely it is that each answer is coherent and to the point."""

    def described(self) -> dict[str, Any]:
        """For the receipt."""


class Judged:
    """A judge with a journal. ``trait`` is what answers are to show; None where there is none to look for.

    Within a run an answer is judged once. What the journal has of another judge, or of this one after another trial, is not used.
    """

    def __init__(self, judge: Judge, journal: Journal, trait: str | None, progress: Progress = silent) -> None:
        self._judge, self._journal, self._trait, self._progress = judge, journal, trait, progress
        described = judge.described()
        self._identity, self._alone = without_versions(described), alone(described.get("engine") or {})
        self._known: dict[str, float] = {}

    def shows(self, samples: Sequence[Sample]) -> list[float]:
        """How likely each answer shows the trait; nan for all without a trait."""
        if self._trait is None:
            return [math.nan] * len(samples)
        return self._asked("shows", self._trait, samples)

    def sorted(self, samples: Sequence[Sample]) -> list[float]:
        """What answers are sorted by. Raises DataError where the judge has no opinion on any of them."""
        found = self.shows(samples)
        if all(map(math.isnan, found)):
            raise DataError("the judge has no opinion on any answer: it says neither yes nor no; give another --judge")
        return found

    def coherent(self, samples: Sequence[Sample]) -> list[float]:
        """How likely each answer is coherent."""
        return self._asked("coherent", "", samples)

    def described(self) -> dict[str, Any]:
        """What was asked, for the receipt."""
        return {"trait": self._trait, "least_coherence": COHERENT}

    def faults(self, rows: Sequence[Row]) -> list[str | None]:
        """Why each row is left out: incoherent, or the negative answer shows the trait as much as the positive.

        Where the judge says neither yes nor no, the row stays.
        """
        samples = [sample for row in rows for _, sample in row.sides]
        sound = dict(zip(map(id, samples), self.coherent(samples), strict=True))
        shown = dict(zip(map(id, samples), self.shows(samples), strict=True))
        found: list[str | None] = []
        for row in rows:
            if any(sound[id(sample)] < COHERENT for _, sample in row.sides):
                found.append(INCOHERENT)
            elif isinstance(row, Pair) and shown[id(row.positive)] <= shown[id(row.negative)]:
                found.append(CONTRADICTS)
            else:
                found.append(None)
        return found

    def differences(self, rows: Sequence[Row]) -> list[Difference]:
        """Positive minus negative answers in the probability that they show the trait, of all rows before the sifting."""
        samples = [sample for row in rows for _, sample in row.sides]
        shown = dict(zip(map(id, samples), self.shows(samples), strict=True))
        found = difference(rows, lambda sample: shown[id(sample)])
        return [] if found is None else [Difference("the judge's yes", "more", found)]

    def _asked(self, what: str, trait: str, samples: Sequence[Sample]) -> list[float]:
        keys = [key_of(what, trait, _plain(one.question.prompt), one.answer.text) for one in samples]
        places = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._known}
        order = sorted(places.values(), key=lambda i: keys[i])
        with self._progress(f"judge: {what}", total=len(order)) as advance:
            for first in range(0, len(order), _BATCH):
                batch = [samples[i] for i in order[first : first + _BATCH]]
                values = self._said(what, trait, batch)
                self._known.update(zip((keys[i] for i in order[first : first + _BATCH]), values, strict=True))
                advance(len(batch))
        return [self._known[key] for key in keys]

    def _said(self, what: str, trait: str, samples: Sequence[Sample]) -> list[float]:
        """The judge's values for a batch, which the journal keeps by all that is in the batch.

        So they do not depend on what was asked before. The answers of a server do not depend on their batch, and are kept one
        by one.
        """
        texts = [[_plain(one.question.prompt), one.answer.text] for one in samples]
        groups = [[i] for i in range(len(samples))] if self._alone else [list(range(len(samples)))]
        names = [key_of("judge", self._identity, what, trait, [texts[i] for i in group]) for group in groups]
        missing = [number for number, name in enumerate(names) if name not in self._journal]
        asked = [samples[i] for number in missing for i in groups[number]]
        prompts, answers = [one.question.prompt for one in asked], [one.answer.text for one in asked]
        if asked:
            ask = partial(self._judge.shows, trait) if what == "shows" else self._judge.coherent
            values = iter(ask(prompts, answers))
            for number in missing:
                found = [next(values) for _ in groups[number]]
                self._journal.add(names[number], [None if math.isnan(value) else value for value in found])
            self._journal.sync()
        return [math.nan if value is None else float(value) for name in names for value in self._journal[name]]


def _plain(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps([list(message) for message in prompt])
