"""What writes answers: one interface for transformers in this process, vLLM, and a server.

The same interface serves the answers of an evaluation, the making of contrast data, and a judge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from steer2edit.data.prompts import Message, Prompt
from steer2edit.errors import DataError
from steer2edit.progress import Progress, silent

YES = ("Yes", "yes", "YES", " Yes", " yes")
NO = ("No", "no", "NO", " No", " no")
"""Spellings of the two answers to a question of :meth:`Engine.yes`; their probabilities are summed."""
LEAST_YES_OR_NO = 0.001
"""Where yes and no together are less likely than this, the model was not answering the question."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. ``temperature`` 0 is greedy decoding; ``max_new_tokens`` counts a thought too.

    ``repetition_penalty`` (CTRL, Keskar et al. 2019) weakens the tokens of the prompt and of the answer so far. None is that of
    the model's generation_config.json.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float | None = None

    def described(self) -> dict[str, Any]:
        """Plain values; a repetition penalty only where one is asked for, as older files have it."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise DataError(f"max_new_tokens is {self.max_new_tokens}; expected 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise DataError(f"temperature is {self.temperature}; expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p is {self.top_p}; expected a number above 0, and 1 at most")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < float("inf"):
            raise DataError(f"repetition_penalty is {self.repetition_penalty}; expected a number above 0 (1 is none)")


@dataclass(frozen=True)
class Request:
    """One answer to write.

    ``prefix`` is the beginning of the answer, from which the model goes on; it is not part of the answer's text. ``sample`` is
    the number of the sample, where several answers to one prompt are drawn. ``where`` says in errors where the prompt is from.
    """

    prompt: Prompt
    system: str | None = None
    prefix: str = ""
    sample: int = 0
    where: str = field(default="", compare=False)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The system text and the prompt as chat messages, without the prefix."""
        chat = (Message("user", self.prompt),) if isinstance(self.prompt, str) else self.prompt
        return chat if self.system is None else (Message("system", self.system), *chat)

    def seed(self, seed: int) -> int:
        """A seed of 31 bits for this request alone, from the seed of a run."""
        content = json.dumps([seed, [list(m) for m in self.messages], self.prefix, self.sample])
        return int.from_bytes(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class Answer:
    """What a model wrote: the text without the thought, and the tokens of both apart.

    ``ended`` says that the model ended the answer by itself; its end token is not counted. ``tokens`` are an estimate, and not
    ``counted``, where a server counts none. ``ids`` are the tokens of both, where the engine knows them.
    """

    text: str
    tokens: int
    ended: bool
    thought: str | None = None
    thought_tokens: int = 0
    counted: bool = True
    ids: tuple[int, ...] | None = field(default=None, compare=False, repr=False)


class Engine(Protocol):
    """What writes answers, and says how likely a yes is."""

    def described(self) -> dict[str, Any]:
        """Kind, model and versions, for a receipt. No secret, and no URL with a password, is in it."""

    def write(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress = silent
    ) -> Iterator[tuple[int, Answer]]:
        """Each request's number and answer, in the order in which they are ready.

        The same seed and request give the same answer, whatever else is asked in the same call; only the rounding of
        numbers can differ where rows are worked on together. Raises EngineError where a request fails for good, and DataError
        for a prompt that cannot be rendered.
        """

    def yes(self, requests: Sequence[Request]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) of the first token of each answer, without a thought.

        It is nan where neither of them is likely. Raises EngineError where the engine gives no probabilities.
        """

    def count_tokens(self, text: str) -> int | None:
        """How many tokens a text has; None where the engine cannot tell."""


def written(
    engine: Engine, requests: Sequence[Request], sampling: Sampling, progress: Progress = silent
) -> list[Answer]:
    """The answers in the order of the requests."""
    answers = dict(engine.write(requests, sampling, progress))
    return [answers[index] for index in range(len(requests))]


def yes_share(yes: float, no: float) -> float:
    """The share of yes in the probabilities of both; nan where they are too small together to mean anything."""
    return yes / (yes + no) if yes + no >= LEAST_YES_OR_NO else float("nan")
