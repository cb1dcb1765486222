"""Instructions before prompts: as a system message, or at the beginning of the user's where a template takes none."""

from __future__ import annotations

from dataclasses import dataclass

from steer2edit.data.prompts import Message, Prompt
from steer2edit.engines.engine import Engine, Request, Sampling
from steer2edit.errors import DataError
from steer2edit.notices import notice


@dataclass(frozen=True)
class Instructions:
    """Opposite instructions; the same place in both has the same wording, and prompts take turns.

    An empty negative one asks for the model's own answer, under no instruction.
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def of(self, index: int) -> tuple[str, str]:
        """The positive and the negative one of a prompt by its number."""
        return self.positive[index % len(self.positive)], self.negative[index % len(self.negative)]


def told(prompt: Prompt, instruction: str, sample: int = 0, system: bool = True) -> Request:
    """A request for an answer under an instruction, or under none where it is empty.

    A system message that the prompt has comes first.
    """
    if not instruction:
        return Request(prompt, sample=sample)
    if isinstance(prompt, str):
        return (
            Request(prompt, instruction, sample=sample)
            if system
            else Request(f"{instruction}\n\n{prompt}", sample=sample)
        )
    first, *others = prompt
    if first.role == "system":
        return Request((Message("system", f"{first.content}\n\n{instruction}"), *others), sample=sample)
    if system:
        return Request(prompt, instruction, sample=sample)
    return Request((Message(first.role, f"{instruction}\n\n{first.content}"), *others), sample=sample)


def takes_system(engine: Engine, instruction: str) -> bool:
    """Whether an engine takes a system message, tried once with a single token; a notice says where it does not."""
    request = told((Message("user", "Hello"),), instruction)
    try:
        list(engine.write([request], Sampling(max_new_tokens=1)))
    except DataError:
        # the other way is tried too: where it fails as well, the system message was not the reason
        list(engine.write([told(request.prompt, instruction, system=False)], Sampling(max_new_tokens=1)))
        notice("the chat template takes no system message: instructions stand at the beginning of the user's message")
        return False
    return True
