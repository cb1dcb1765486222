"""Tasks as a candidate gets them: with an instruction before every prompt, or in brief."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from steer2edit.data.prompts import Message, Prompt
from steer2edit.data.questions import Question
from steer2edit.data.templates import render_prompts
from steer2edit.errors import DataError
from steer2edit.evaluation.answers import Answers
from steer2edit.evaluation.metrics import Choice, Preference, Task


class Tokenized(Protocol):
    """What has a tokenizer with a chat template, such as a loaded model."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""


def told(task: Task, instruction: str, loaded: Tokenized) -> Task | None:
    """The task with ``instruction`` as the system message, after the one that there is.

    Where the chat template takes no system message, the instruction begins the user's message. None for a task without
    prompts, such as the divergence on running text: an instruction has no part in it.
    """
    questions: Sequence[Question] = getattr(task, "questions", ())
    if not questions or not hasattr(task, "system"):
        return None
    changeable: Any = task
    system = getattr(task, "system", None)
    joined = f"{system}\n\n{instruction}" if system else instruction
    own = any(not isinstance(q.prompt, str) and q.prompt[0].role == "system" for q in questions)
    if not own and _takes(loaded, questions[0], joined, getattr(task, "chat_template_kwargs", None)):
        changed: Task = replace(changeable, system=joined)
    else:
        changed = replace(changeable, questions=[replace(q, prompt=_before(q.prompt, instruction)) for q in questions])
    return changed


def brief(tasks: Sequence[Task]) -> list[Task]:
    """The tasks of the cost, and one kind of those of the attribute.

    It is the kind that measures the behaviour's own metric, else by likelihood, else in answers.
    """
    cost = [task for task in tasks if any(m.role == "utility" and m.name.startswith("KL") for m in task.metrics)]
    attribute = [task for task in tasks if any(m.role == "attribute" for m in task.metrics) and task not in cost]
    if own := [task for task in attribute if any(m.own for m in task.metrics)]:
        return [*cost, *own]
    for kinds in ((Preference, Choice), (Answers,)):
        if found := [task for task in attribute if isinstance(task, kinds)]:
            return [*cost, *found]
    return cost


def _takes(loaded: Tokenized, question: Question, system: str, arguments: Any) -> bool:
    """Whether the chat template writes a system message."""
    try:
        render_prompts({question.prompt: question.where}, loaded.tokenizer, system, arguments)
    except DataError:
        return False
    return True


def _before(prompt: Prompt, instruction: str) -> Prompt:
    """The prompt with the instruction at the beginning of its first message."""
    if isinstance(prompt, str):
        return f"{instruction}\n\n{prompt}"
    first, *others = prompt
    if first.role == "system":
        return (Message("system", f"{first.content}\n\n{instruction}"), *others)
    return (Message(first.role, f"{instruction}\n\n{first.content}"), *others)
