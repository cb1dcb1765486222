"""A user's chats as prompts with answers; where a chat ends in a question, the model answers it."""

from __future__ import annotations

from steer2edit.data.contrast import Example
from steer2edit.data.neutral import NeutralChats
from steer2edit.data.templates import TemplateArguments
from steer2edit.data.tokens import encode
from steer2edit.engines.own_answers import ANSWER_TOKENS, OwnAnswer, own_answers
from steer2edit.notices import notice
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import LoadedModel

CHAT_TOKENS, USER_ANSWER_TOKENS = 16384, 256
"""Of a user's chats so many tokens of answers are read, and of one answer."""


def chat_answers(
    loaded: LoadedModel,
    own: NeutralChats,
    flag: str,
    *,
    limit: int | None = None,
    chat_template_kwargs: TemplateArguments | None = None,
    progress: Progress = silent,
) -> list[OwnAnswer]:
    """The answers of ``own``, and the model's to its questions; ``flag`` is where the chats come from, for a notice.

    Raises DataError for chats that the template rejects or that are too long.
    """
    chats = own.chats[:limit]
    asked = [one.prompt for one in chats if not one.answer][: CHAT_TOKENS // ANSWER_TOKENS]
    examples = [Example(one.prompt, one.answer, "positive", one.where, i) for i, one in enumerate(chats) if one.answer]
    arguments = chat_template_kwargs
    answers = (
        own_answers(loaded, asked, fingerprint=loaded.fingerprint, chat_template_kwargs=arguments, progress=progress)
        if asked
        else []
    )
    encoded = encode(
        examples, loaded.tokenizer, span="response", context=loaded.context, chat_template_kwargs=arguments
    )
    answers += [OwnAnswer(one.ids[: one.start + USER_ANSWER_TOKENS], one.start, True) for one in encoded]
    used: list[OwnAnswer] = []
    tokens = 0
    for answer in answers:
        tokens += len(answer.ids) - answer.start
        if tokens > CHAT_TOKENS:
            break
        used.append(answer)
    if len(used) < len(chats):
        notice(f"{len(used)} of the {len(chats)} chats of {flag} are read: {CHAT_TOKENS} tokens of answers at most")
    return used
