"""The texts that tell what an edit costs: a model's own answers to everyday prompts, and prose.

An edit can cost ten times as much where a question is answered as on prose, so the KL budget is on the model's own answers, and
prose is a second number. A chat model answers under its template, a base model in plain text. A text of the user's carries the
budget, whichever kind it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from steer2edit.data import contrast
from steer2edit.data.everyday import as_asked, everyday_prompts
from steer2edit.data.neutral import NeutralChats, OwnNeutral
from steer2edit.data.prompts import Prompt
from steer2edit.data.templates import TemplateArguments
from steer2edit.engines.chats import chat_answers
from steer2edit.engines.own_answers import own_answers
from steer2edit.errors import DataError, first_line
from steer2edit.notices import notice
from steer2edit.plan import Divergence
from steer2edit.plan.measured import TextKind
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import LoadedModel
from steer2edit.strength.kl import MAX_TOKENS, WINDOW, NeutralText
from steer2edit.strength.meet import Apply, at

LEAST_ROWS = 4
"""Windows or answers below which a KL's interval, which is over them, says nothing."""
PROMPTS = 64
"""Packaged prompts that the base answers."""


@dataclass(frozen=True)
class NeutralTexts:
    """The text that a KL budget is on, and the other kind of text, where there is one."""

    budget: NeutralText
    other: NeutralText | None = None

    def __iter__(self) -> Iterator[NeutralText]:
        yield self.budget
        if self.other is not None:
            yield self.other

    def costs(self, apply: Apply, strength: float = 1.0, name: str = "") -> dict[TextKind, Divergence]:
        """The divergence on each text at one strength."""
        return {text.kind: at(apply, text, strength, name).divergence for text in self}


def packaged_prompts(limit: int | None = None) -> list[Prompt]:
    """The prompts whose answers tell the cost where questions are answered."""
    prompts = everyday_prompts("neutral")
    count = min(PROMPTS if limit is None else limit, len(prompts))
    # the file's order is that of the kinds of prompts, and each kind takes part
    return [prompts[i * len(prompts) // count] for i in range(count)]


def neutral_texts(
    loaded: LoadedModel,
    own: OwnNeutral | None = None,
    progress: Progress = silent,
    *,
    limit: int | None = None,
    chat_template_kwargs: TemplateArguments | None = None,
) -> NeutralTexts:
    """The texts on which the KL is measured: the packaged ones, or the user's ``own``.

    ``own`` takes the place of the packaged text of its kind, and has the budget.
    ``limit`` bounds each to so many windows of ``WINDOW`` tokens or answers, but to no fewer than ``LEAST_ROWS``. The model's
    answers are generated once and kept (``engines/own_answers.py``); no hook may be on it. Raises DataError for chats of the
    user's that cannot be used.
    """
    limit = None if limit is None else max(limit, LEAST_ROWS)
    tokens = MAX_TOKENS if limit is None else min(MAX_TOKENS, WINDOW * limit)
    if isinstance(own, NeutralChats):
        chat: NeutralText | None = _user_chat(loaded, own, limit, chat_template_kwargs, progress)
    else:
        chat = _packaged_chat(loaded, limit, chat_template_kwargs, progress)
    documents = own if own is not None and not isinstance(own, NeutralChats) else contrast.neutral_text()
    prose = NeutralText(loaded, documents, max_tokens=tokens, progress=progress)
    if chat is None:
        return NeutralTexts(prose)
    return NeutralTexts(chat, prose) if own is None or isinstance(own, NeutralChats) else NeutralTexts(prose, chat)


def _packaged_chat(
    loaded: LoadedModel, limit: int | None, arguments: TemplateArguments | None, progress: Progress
) -> NeutralText | None:
    """The model's own answers to the packaged prompts; None, with a notice, where it cannot be asked."""
    prompts = as_asked(packaged_prompts(limit), loaded.tokenizer)
    try:
        answers = own_answers(
            loaded, prompts, fingerprint=loaded.fingerprint, chat_template_kwargs=arguments, progress=progress
        )
        return NeutralText(loaded, answers, progress=progress)
    except DataError as error:
        notice(f"the model cannot be asked everyday questions ({first_line(error)}): the KL is measured on prose alone")
        return None


def _user_chat(
    loaded: LoadedModel,
    own: NeutralChats,
    limit: int | None,
    arguments: TemplateArguments | None,
    progress: Progress,
) -> NeutralText:
    """The user's own chats; the base answers those that end in a question."""
    used = chat_answers(loaded, own, "--neutral", limit=limit, chat_template_kwargs=arguments, progress=progress)
    return NeutralText(loaded, used, progress=progress)
