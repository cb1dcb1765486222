"""A user's neutral text (``--neutral``): prose, or chats whose answers have nothing to do with the behaviour.

Chats are rows, told by the file's name (.jsonl, .json, .csv, .parquet). A row has ``messages``, a ``prompt`` with a ``response``,
or a ``prompt`` alone, which the base answers. Any other file is prose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer2edit.data.prompts import Fault, Prompt, read_chat, read_prompt, read_text
from steer2edit.data.readers import key_of
from steer2edit.data.records import READERS, read_source
from steer2edit.errors import DataError, shown
from steer2edit.files.untrusted import read_bytes

_CHATS = ("messages", "conversations", "conversation")
_COLUMNS = frozenset({*_CHATS, "prompt", "response"})
_EXPECTED = 'expected "messages", "prompt" with "response", or "prompt" alone in each row'
_TEXT_BYTES = 256 << 20


@dataclass(frozen=True)
class NeutralChat:
    """A prompt and its answer; an empty answer is the base's to write. ``where`` is the row's place in its file."""

    prompt: Prompt
    answer: str
    where: str


@dataclass(frozen=True)
class NeutralChats:
    """Chats to measure the KL on, in their order."""

    chats: tuple[NeutralChat, ...]


OwnNeutral = str | Sequence[str] | NeutralChats
"""A user's neutral text: running prose, documents, or chats."""


def read_neutral(path: str | Path) -> str | NeutralChats:
    """The text of a file, or its chats. Raises DataError, which lists every fault, for a file that is neither."""
    path = Path(path).expanduser()
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    if suffixes and suffixes[-1] in READERS and suffixes[-1] != ".txt":
        return NeutralChats(tuple(read_source(path, _COLUMNS, "neutral chats", _EXPECTED, _chat)))
    try:
        return read_bytes(path, _TEXT_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def _chat(row: object, where: str, _index: int) -> list[NeutralChat]:
    if not isinstance(row, dict):
        raise Fault(f"expected an object, found {shown(row)}")
    keyed = {key_of(key): value for key, value in row.items()}
    name = next((key for key in _CHATS if keyed.get(key) is not None), None)
    if name is not None:
        return [_conversation(name, keyed, where)]
    if keyed.get("prompt") is None:
        raise Fault(f"there are {', '.join(map(shown, row)) or 'no columns'}; {_EXPECTED}")
    prompt = read_prompt("prompt", keyed["prompt"])
    if not isinstance(prompt, str) and prompt[-1].role == "assistant":
        raise Fault('prompt ends in an answer; call the column "messages"')
    if isinstance(prompt, str):
        prompt = read_chat("prompt", [{"role": "user", "content": read_text("prompt", prompt, filled=True)}])
    response = keyed.get("response")
    return [NeutralChat(prompt, "" if response is None else read_text("response", response, filled=True), where)]


def _conversation(name: str, keyed: Mapping[str, Any], where: str) -> NeutralChat:
    messages = read_chat(name, keyed[name])
    if messages[-1].role != "assistant":
        return NeutralChat(messages, "", where)
    if len(messages) == 1:
        raise Fault(f"{name} holds an answer and no prompt before it")
    return NeutralChat(messages[:-1], read_text("the last answer", messages[-1].content, filled=True), where)
