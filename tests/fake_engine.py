"""An engine whose answers depend on the request alone: words drawn by its seed, told by what the system message says."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from steer2edit.engines.engine import Answer, Request, Sampling
from steer2edit.progress import Progress, silent

NOUNS = ["cat", "dog", "tree", "house", "river", "stone", "bird", "fish", "sun", "moon", "hill", "road", "boat", "bell"]


class FakeEngine:
    """Obeys instructions that hold "briefly" or "at length"; others change nothing. It can be told to fail or be killed.

    ``dies_after`` answers it raises KeyboardInterrupt, as a kill does. ``seen`` counts the answers that it wrote.
    """

    def __init__(
        self, name: str = "fake", *, dies_after: int | None = None, refuses_system: bool = False, version: str = "1"
    ) -> None:
        self.name, self.dies_after, self.refuses_system = name, dies_after, refuses_system
        self.seen, self.version = 0, version

    def described(self) -> dict[str, Any]:
        return {"engine": "fake", "model": self.name, "versions": {"fake": self.version}}

    def write(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress = silent
    ) -> Iterator[tuple[int, Answer]]:
        if self.refuses_system and any(request.system is not None for request in requests):
            from steer2edit.errors import DataError

            raise DataError("the chat template takes no system message")
        # not in order, as an engine may
        for index in reversed(range(len(requests))):
            if self.dies_after is not None and self.seen >= self.dies_after:
                raise KeyboardInterrupt
            self.seen += 1
            yield index, self.answer(requests[index], sampling)

    def answer(self, request: Request, sampling: Sampling) -> Answer:
        told = " ".join(message.content for message in request.messages)
        # greedy decoding draws nothing
        draws = random.Random(request.seed(sampling.seed if sampling.temperature else 0))
        if "Write the opposite" in told:
            return Answer("Opposite: answers at length, twice over", 8, True)
        if "numbered from 1 to 20" in told:
            lines = [f"{i}. Tell me {draws.choice(NOUNS)} number {draws.random()}" for i in range(1, 21)]
            return Answer("\n".join(lines), 200, True)
        count = 30 + draws.randrange(20) if "at length" in told else 10 + draws.randrange(20)
        if "briefly" in told:
            count = 2 + draws.randrange(4)
        words = [draws.choice(NOUNS) for _ in range(count)]
        return Answer(" ".join(words) + draws.choice([".", "?"]), count, True)

    def yes(self, requests: Sequence[Request]) -> list[float]:
        return [0.5] * len(requests)

    def count_tokens(self, text: str) -> int:
        return len(text.split())
