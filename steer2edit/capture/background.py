"""What is captured beside the contrast data: running prose, and a model's own answers.

Second moments that know prose alone let an edit learn "this is a chat", or "a question is answered here". So the background has
both formats: windows of running text, and the base's own greedy answers to everyday prompts, of which the answers' tokens count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

from steer2edit.data import contrast
from steer2edit.data.everyday import as_asked, everyday_prompts
from steer2edit.data.neutral import NeutralChats, OwnNeutral
from steer2edit.data.templates import TemplateArguments
from steer2edit.data.tokens import Encoded, windows
from steer2edit.engines.chats import chat_answers
from steer2edit.engines.own_answers import OwnAnswer, own_answers
from steer2edit.errors import DataError, first_line
from steer2edit.notices import notice
from steer2edit.progress import Progress, silent
from steer2edit.runtime.distributed import World
from steer2edit.runtime.model import LoadedModel

BACKGROUND_TOKENS = 8192
"""Tokens of running text, at most."""
WINDOW = 256


def prose(loaded: LoadedModel, texts: Sequence[str], label: Literal["background", "keep"]) -> list[Encoded]:
    """Windows of running texts, each read by itself."""
    read = windows(loaded.tokenizer, texts, BACKGROUND_TOKENS, min(WINDOW, loaded.context))
    return [Encoded(tuple(ids), 1, label, row) for row, ids in enumerate(read)]


def chats(answers: Sequence[OwnAnswer], label: Literal["chat", "keep"]) -> list[Encoded]:
    """Answers as examples whose span is the answer."""
    return [Encoded(one.ids, one.start, label, row) for row, one in enumerate(answers)]


def background_examples(
    loaded: LoadedModel, background: OwnNeutral | None = None, progress: Progress = silent
) -> list[Encoded]:
    """The background alone, without answers of the model's own: the packaged prose, or a text or chats in its place."""
    if isinstance(background, NeutralChats):
        return chats(chat_answers(loaded, background, "--background", progress=progress), "chat")
    text = contrast.background_text() if background is None else background
    return prose(loaded, [text] if isinstance(text, str) else list(text), "background")


def texts_to_keep(
    loaded: LoadedModel, texts: OwnNeutral, arguments: TemplateArguments | None = None, progress: Progress = silent
) -> list[Encoded]:
    """Texts on which the edit is to have no push: windows of prose, or chats, of which the answers count."""
    if isinstance(texts, NeutralChats):
        return chats(chat_answers(loaded, texts, "--keep", chat_template_kwargs=arguments, progress=progress), "keep")
    return prose(loaded, [texts] if isinstance(texts, str) else list(texts), "keep")


def own_chat(
    loaded: LoadedModel,
    fingerprint: str | None,
    world: World,
    arguments: TemplateArguments | None = None,
    progress: Progress = silent,
) -> list[OwnAnswer]:
    """The base's answers to the packaged "background" prompts; none, with a notice, where it cannot be asked.

    Of several processes the first one generates them, and the others take them from its cache.
    """
    if any(parameter.is_meta for parameter in loaded.model.parameters()):
        notice("a model that is run layer by layer does not write answers here: the background is prose alone")
        return []

    def answers() -> list[OwnAnswer]:
        try:
            return own_answers(
                loaded,
                as_asked(everyday_prompts("background"), loaded.tokenizer),
                fingerprint=fingerprint,
                chat_template_kwargs=arguments,
                progress=progress,
            )
        except DataError as error:
            notice(f"the model cannot be asked everyday questions ({first_line(error)}): the background is prose alone")
            return []

    first = world.together(lambda: answers() if world.rank == 0 else [])
    return world.together(lambda: first if world.rank == 0 else answers())


def answers_hash(answers: Sequence[OwnAnswer] | Sequence[Encoded]) -> str:
    """SHA-256 over the tokens of prompts and answers."""
    rows = [[one.start, *one.ids] for one in answers]
    return hashlib.sha256(json.dumps(rows).encode("ascii")).hexdigest()
