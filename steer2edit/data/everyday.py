"""Everyday prompts: what people give to language models, and nothing that asks for a built-in behaviour.

A row of the packaged file has a ``prompt``, its ``kind`` (such as "poem" or "code") and its ``use``.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from typing import Any, Literal, get_args

from steer2edit.data.prompts import Fault, Message, Prompt, prompt_text, read_text
from steer2edit.data.readers import key_of, read_json
from steer2edit.data.records import parse_rows
from steer2edit.data.templates import templated
from steer2edit.errors import DataError, shown

Use = Literal["neutral", "background", "pairs"]
EVERYDAY_FILE = "everyday.jsonl"
_COLUMNS = frozenset({"prompt", "kind", "use"})
_USES = ", ".join(get_args(Use))


def everyday_prompts(use: Use) -> list[Prompt]:
    """The packaged prompts of one use, each as one user message, in the file's order.

    The answers to the 120 "neutral" prompts measure what an edit costs where questions are answered; second moments are
    measured on answers to the 120 "background" prompts, which are of the same kinds. The 200 "pairs" prompts are there to be
    answered twice, with a behaviour and without it: opinions, feelings, drafts to review and situations are among them, and no
    request that fixes the form of the answer. No prompt has two uses. Raises DataError on another use.
    """
    if use not in get_args(Use):
        raise DataError(f"there is no use {shown(use)} of everyday prompts; there are {_USES}")
    data = (importlib.resources.files("steer2edit") / "behaviors" / EVERYDAY_FILE).read_bytes()
    rows = parse_rows(data, EVERYDAY_FILE, read_json, _COLUMNS, "everyday prompts", 'expected "prompt" and "use"', _row)
    return [prompt for prompt, its_use in rows if its_use == use]


def as_asked(prompts: Sequence[Prompt], tokenizer: Any) -> list[Prompt]:
    """Prompts as the users of a model ask them.

    Without a chat template there is no one form. So every second prompt is a text that the model goes on with, and the others
    are chats, written "User: … Assistant:". Data files hold the one and the other.
    """
    if templated(tokenizer):
        return list(prompts)
    return [prompt_text(prompt) if i % 2 == 0 else prompt for i, prompt in enumerate(prompts)]


def _row(row: object, _where: str, _index: int) -> list[tuple[Prompt, str]]:
    if not isinstance(row, dict):
        raise Fault(f"expected an object, found {shown(row)}")
    keyed = {key_of(key): value for key, value in row.items()}
    prompt = (Message("user", read_text("prompt", keyed.get("prompt"), filled=True)),)
    if keyed.get("use") not in get_args(Use):
        raise Fault(f"use is {shown(keyed.get('use'))}; expected one of {_USES}")
    return [(prompt, str(keyed["use"]))]
