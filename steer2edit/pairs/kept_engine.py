"""An engine whose answers go through a journal: what is there is not asked for again, whoever asks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from steer2edit.engines.engine import Answer, Engine, Request, Sampling
from steer2edit.pairs.journal import Journal, key_of, without_versions
from steer2edit.pairs.writing import Writer, alone
from steer2edit.progress import Progress, silent


class KeptEngine:
    """Another engine with a journal. What the journal has of an engine that is described otherwise is not used.

    Where an answer depends on what is asked with it, by rounding, it is kept with its whole batch; see ``Writer.alone``.
    """

    def __init__(self, engine: Engine, journal: Journal) -> None:
        self._engine, self._journal = engine, journal
        described = engine.described()
        self._name, self._alone = key_of(without_versions(described)), alone(described)
        self.estimated = False
        """Whether the tokens of an answer so far are an estimate."""

    def described(self) -> dict[str, Any]:
        """The engine's own description."""
        return self._engine.described()

    def write(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress = silent
    ) -> Iterator[tuple[int, Answer]]:
        """Each request's number and answer, when all are there; see :meth:`Engine.write`."""
        writer = Writer(self._engine, self._journal, self._name, alone=self._alone, progress=progress)
        for index, answer in enumerate(writer.write(requests, sampling, "write answers")):
            self.estimated |= not answer.counted
            yield index, answer

    def yes(self, requests: Sequence[Request]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) of each request; see :meth:`Engine.yes`."""
        asked = [[[list(m) for m in one.messages], one.prefix] for one in requests]
        groups = [[i] for i in range(len(requests))] if self._alone else [list(range(len(requests)))]
        keys = [key_of("yes", self._name, [asked[i] for i in group]) for group in groups]
        missing = [number for number, key in enumerate(keys) if key not in self._journal]
        values = iter(self._engine.yes([requests[i] for number in missing for i in groups[number]]) if missing else ())
        for number in missing:
            found = [next(values) for _ in groups[number]]
            self._journal.add(keys[number], [None if math.isnan(value) else value for value in found])
        if missing:
            self._journal.sync()
        return [math.nan if value is None else float(value) for key in keys for value in self._journal[key]]

    def count_tokens(self, text: str) -> int | None:
        """The engine's own count."""
        return self._engine.count_tokens(text)
