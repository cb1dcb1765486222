"""Answers through the journal: what is there is not written again, and what is new is written down at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steer2edit.engines.engine import Answer, Engine, Request, Sampling
from steer2edit.errors import DataError
from steer2edit.files.schema import TEXT, check
from steer2edit.pairs.journal import Journal, key_of
from steer2edit.progress import Progress, silent

BATCH = 64
"""Answers that are asked for at a time: a kill loses these at most."""
_ANSWER: Any = {"text": str, "tokens": int, "ended": bool, "thought": TEXT, "thought_tokens": int, "counted": bool}


@dataclass
class Pace:
    """How many answers and tokens were written, and in how many seconds; answers from the journal do not count."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers together, by the clock."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def timed(self, answers: Iterable[tuple[int, Answer]]) -> Iterator[tuple[int, Answer]]:
        """The answers as they come, counted; what is done with them meanwhile counts as time too."""
        before = time.monotonic()
        for place, answer in answers:
            now = time.monotonic()
            self.seconds, before = self.seconds + now - before, now
            self.answers += 1
            self.tokens += answer.tokens + answer.thought_tokens
            yield place, answer


@dataclass(frozen=True)
class Writer:
    """An engine, and the journal that its answers go through.

    ``name`` tells apart the answers of several engines. Where ``alone``, an answer does not depend on its batch by even a
    rounding, as a server's; then what is there of a broken batch is kept.
    """

    engine: Engine
    journal: Journal
    name: str = "answers"
    batch: int = BATCH
    alone: bool = False
    progress: Progress = silent
    pace: Pace = field(default_factory=Pace)

    def write(self, requests: Sequence[Request], sampling: Sampling, stage: str) -> list[Answer]:
        """The answers in the order of the requests. A request that comes twice is asked once."""
        keys = [self._key(request, sampling) for request in requests]
        # prompts of like length are answered together; the same batches in every run
        order = sorted(
            {key: i for i, key in reversed(list(enumerate(keys)))}.values(), key=lambda i: (_size(requests[i]), keys[i])
        )
        with self.progress(stage, total=len(order)) as advance:
            for first in range(0, len(order), self.batch):
                chosen = order[first : first + self.batch]
                missing = [i for i in chosen if keys[i] not in self.journal]
                if missing and not self.alone:
                    missing = chosen
                advance(len(chosen) - len(missing))
                if not missing:
                    continue
                for place, answer in self.pace.timed(self.engine.write([requests[i] for i in missing], sampling)):
                    self.journal.add(keys[missing[place]], {name: getattr(answer, name) for name in _ANSWER})
                    advance(1, f"{self.pace.tokens_per_second:.0f} tokens/s")
                self.journal.sync()
        return [_read(self.journal[key]) for key in keys]

    def _key(self, request: Request, sampling: Sampling) -> str:
        asked = [list(message) for message in request.messages]
        return key_of(self.name, asked, request.prefix, request.sample, drawn(sampling))


def drawn(sampling: Sampling) -> dict[str, Any]:
    """What answers depend on of a sampling. At a temperature of 0 nothing is drawn, whatever the seed and top-p."""
    greedy = Sampling(sampling.max_new_tokens, 0.0, repetition_penalty=sampling.repetition_penalty)
    return (sampling if sampling.temperature else greedy).described()


def alone(described: Mapping[str, Any]) -> bool:
    """Whether an engine's answers do not depend on what is asked with them, by its description: those of a server."""
    return described.get("engine") == "server"


def _size(request: Request) -> int:
    return sum(len(message.content) for message in request.messages)


def _read(value: Mapping[str, Any]) -> Answer:
    try:
        check(value, _ANSWER, "an answer of the journal")
    except ValueError as error:
        raise DataError(str(error)) from None
    return Answer(**{key: value[key] for key in _ANSWER})
