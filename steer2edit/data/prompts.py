"""Prompts: texts and chats, as rows of data files give them, and what is wrong with one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import NamedTuple

from steer2edit.errors import shown


class Message(NamedTuple):
    """One turn of a chat; a tuple, so that prompts can be compared and hashed."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]

# ShareGPT calls the keys and the roles otherwise
_KEYS = {"from": "role", "value": "content"}
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
_HH_TURN = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):[ \t]*")


class Fault(ValueError):
    """What is wrong with a row, in words for its owner."""


def prompt_digest(prompt: Prompt) -> str:
    """16 hex digits of SHA-256 over a prompt, without its case and white space. One user message counts as its text."""
    if not isinstance(prompt, str) and len(prompt) == 1 and prompt[0].role == "user":
        prompt = prompt[0].content
    text = prompt if isinstance(prompt, str) else json.dumps([list(message) for message in prompt])
    return hashlib.sha256(" ".join(text.split()).casefold().encode("utf-8", "surrogatepass")).hexdigest()[:16]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as text: the last message of a chat."""
    return prompt if isinstance(prompt, str) else prompt[-1].content


def read_prompt(key: str, value: object) -> Prompt:
    """The prompt that a row holds under ``key``: a text or a list of chat messages. Raises Fault for anything else."""
    if isinstance(value, str):
        return read_text(key, value)
    if not isinstance(value, list):
        raise Fault(f"{key}: expected a string or a list of chat messages, found {shown(value)}")
    return read_chat(key, value)


def read_chat(key: str, value: object) -> tuple[Message, ...]:
    """Chat messages, with the keys role and content, or from and value. Raises Fault, which names the message."""
    if not isinstance(value, list) or not value:
        raise Fault(f"{key}: the list of chat messages is empty" if value == [] else f"{key} is not a list of messages")
    return tuple(_message(f"{key}, message {number}", message) for number, message in enumerate(value, start=1))


def read_text(key: str, value: object, filled: bool = False) -> str:
    """A text of a row; ``filled`` texts hold more than white space. Raises Fault for anything else."""
    if fault := text_fault(key, value, filled):
        raise Fault(fault)
    return str(value)


def text_fault(key: str, value: object, filled: bool = False) -> str:
    """What is wrong with a text of a row; "" if nothing is."""
    if not isinstance(value, str):
        return f"{key}: expected a string, found {shown(value)}"
    if filled and not value.strip():
        return f"{key} is empty" if not value else f"{key} holds nothing but white space"
    half = re.search("[\ud800-\udfff]", value)
    return f"{key} holds half of a surrogate pair, which is not a character" if half else ""


def transcript(text: str) -> tuple[Message, ...] | None:
    """The chat in a text with the turns "Human:" and "Assistant:", as hh-rlhf has them; None for any other text."""
    pieces = _HH_TURN.split(text)
    if len(pieces) < 5 or pieces[0].strip() or pieces[1] != "Human" or "Assistant" not in pieces[3::2]:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(roles[role], content.strip()) for role, content in zip(pieces[1::2], pieces[2::2], strict=True)
    )


def _message(where: str, value: object) -> Message:
    if not isinstance(value, Mapping):
        raise Fault(f'{where}: expected {{"role", "content"}}, found {shown(value)}')
    fields = {_KEYS.get(key, key): entry for key, entry in value.items() if key not in _KEYS or _KEYS[key] not in value}
    for key in Message._fields:
        if key not in fields:
            raise Fault(f'{where}: "{key}" is missing')
    content = fields["content"]
    if isinstance(content, list):
        content = _joined_parts(where, content)
    if fault := text_fault("role", fields["role"], filled=True) or text_fault("content", content):
        raise Fault(f"{where}: {fault}")
    role = str(fields["role"])
    return Message(_ROLES.get(role, role) if "from" in value else role, str(content))


def _joined_parts(where: str, parts: list[object]) -> str:
    """The text of a message whose content is a list of parts."""
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise Fault(f"{where}: content has a part that is not a text ({shown(kind)})")
        texts.append(str(part["text"]))
    return "".join(texts)
