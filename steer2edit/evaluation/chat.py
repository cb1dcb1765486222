"""Both answers side by side in the terminal: the base's and the edited model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from steer2edit.data.prompts import Message
from steer2edit.data.templates import TemplateArguments, render_prompt
from steer2edit.data.tokens import texts_of
from steer2edit.engines.generation import generate
from steer2edit.errors import printable
from steer2edit.evaluation.candidates import Candidate
from steer2edit.runtime.model import LoadedModel

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Chat:
    """Two conversations that get the same questions; each model sees its own answers alone."""

    loaded: LoadedModel
    edited: Candidate
    max_new_tokens: int = 200
    system: str | None = None
    chat_template_kwargs: TemplateArguments | None = None
    _histories: tuple[list[Message], list[Message]] = field(default_factory=lambda: ([], []))

    def ask(self, question: str) -> tuple[str, str]:
        """The base's and the edited model's answer."""
        answers = []
        for history, candidate in zip(self._histories, (None, self.edited), strict=True):
            history.append(Message("user", question))
            if candidate is None:
                answer = self._answer(self.loaded, history)
            else:
                with candidate.enter() as model:
                    answer = self._answer(model, history)
            history.append(Message("assistant", answer))
            answers.append(answer)
        return answers[0], answers[1]

    def reset(self) -> None:
        """Forget both conversations."""
        for history in self._histories:
            history.clear()

    def _answer(self, model: LoadedModel, history: Sequence[Message]) -> str:
        text = render_prompt(tuple(history), model.tokenizer, self.system, self.chat_template_kwargs, writing=True)
        ids = generate(model, [text], max_new_tokens=self.max_new_tokens)[0]
        return texts_of(model.tokenizer, [ids])[0].strip()


def side_by_side(answers: Sequence[str], titles: Sequence[str]) -> Table:
    """Answers in columns beside each other, for rich to print; control characters, which could move the cursor, are escaped."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, expand=True, padding=(0, 1))
    for title in titles:
        table.add_column(Text(printable(title)), ratio=1, overflow="fold")
    table.add_row(*(Text(printable(answer)) for answer in answers))
    return table
