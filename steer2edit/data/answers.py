"""Reading labelled responses out of rows: pairs, single responses with a label, and whole chats.

Each function gives a reader, for the entries of ``formats.FORMATS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from steer2edit.data.prompts import Fault, Message, Prompt, read_chat, read_prompt, read_text, transcript
from steer2edit.data.readers import key_of
from steer2edit.errors import shown

Label = Literal["positive", "negative"]
LABELS: tuple[Label, Label] = ("positive", "negative")
Row = Mapping[str, Any]
Answered = tuple[Prompt, str, Label]
"""A prompt, a response to it, and the response's class."""
Read = Callable[[Row], list[Answered]]

_YES = {"positive", "pos", "true", "1", "1.0", "chosen"}
_NO = {"negative", "neg", "false", "0", "0.0", "-1", "-1.0", "rejected"}


def pair(good: str, bad: str, prompt: Callable[[Row], Prompt] | None = None) -> Callable[[Row], list[Answered]]:
    """A reader of rows with a response of each class under two keys, and what reads the prompt."""

    def read(row: Row) -> list[Answered]:
        faults: list[str] = []
        question = _collected(faults, lambda: prompt(row) if prompt is not None else "")
        first, second = (_collected(faults, partial(_response, key, row[key])) for key in (good, bad))
        if faults:
            raise Fault(*faults)
        if isinstance(first, tuple) and isinstance(second, tuple):
            question, first, second = _parted(good, bad, first, second)
        elif not isinstance(first, str) or not isinstance(second, str):
            raise Fault(f"one of {good} and {bad} is a whole chat and the other is not")
        return [(question, first, "positive"), (question, second, "negative")]

    return read


def _collected(faults: list[str], read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Fault as fault:
        faults += map(str, fault.args)
        return None


def _response(key: str, value: Any) -> str | tuple[Message, ...]:
    """A response, or the whole chat that it ends."""
    if isinstance(value, str):
        chat = transcript(value)
        if chat is None:
            return read_text(key, value, filled=True)
    else:
        if not isinstance(value, (list, dict)):
            return read_text(key, value, filled=True)
        if isinstance(value, list) and any(isinstance(one, str) for one in value):
            raise Fault(f"{key} is a list of texts; expected one text, or the messages of a chat")
        chat = read_chat(key, [value] if isinstance(value, dict) else value)
        if len(chat) == 1 and chat[0].role not in ("user", "system"):
            return read_text(key, chat[0].content, filled=True)
    if chat[-1].role != "assistant":
        raise Fault(f"{key}: the last message is not the assistant's")
    return chat


def _parted(good: str, bad: str, first: tuple[Message, ...], second: tuple[Message, ...]) -> tuple[Prompt, str, str]:
    """The beginning that two chats share, and the first answer in which they differ; later turns are left out."""
    shorter = min(len(first), len(second))
    at = next((i for i in range(shorter) if first[i] != second[i]), shorter - 1)
    if not (first[at].role == second[at].role == "assistant"):
        raise Fault(f"{good} and {bad} differ before an answer of the assistant")
    responses = [read_text(key, chat[at].content, filled=True) for key, chat in ((good, first), (bad, second))]
    return first[:at], responses[0], responses[1]


def prompt_of(row: Row) -> Prompt:
    return read_prompt("prompt", row["prompt"])


def question_of(row: Row) -> Prompt:
    return _with_system(row, read_text("question", row["question"]))


def instruction_of(row: Row) -> Prompt:
    parts = [read_text(key, row[key]) for key in ("instruction", "input") if row.get(key)]
    return _with_system(row, "\n\n".join(parts))


def chat_of(key: str) -> Callable[[Row], Prompt]:
    return lambda row: read_chat(key, row[key])


def _with_system(row: Row, text: str) -> Prompt:
    system = read_text("system", row.get("system") or "")
    return (Message("system", system), Message("user", text)) if system.strip() else text


def labelled(key: str, prompt: Callable[[Row], Prompt], label: str = "label") -> Callable[[Row], list[Answered]]:
    """A reader of rows with one response and its class."""

    def read(row: Row) -> list[Answered]:
        faults: list[str] = []
        question = _collected(faults, lambda: prompt(row))
        response = _collected(faults, lambda: _response(key, row[key]))
        kind = _collected(faults, lambda: _label(label, row[label]))
        if faults:
            raise Fault(*faults)
        if isinstance(response, tuple):
            question, response = response[:-1], response[-1].content
        return [(question, response, kind)]

    return read


def labelled_chat(key: str, label: str) -> Callable[[Row], list[Answered]]:
    """A reader of rows with a whole chat and the class of its last answer."""

    def read(row: Row) -> list[Answered]:
        chat = read_chat(key, row[key])
        if len(chat) < 2 or chat[-1].role != "assistant":
            raise Fault(f"{key}: expected a question and the assistant's answer at the end")
        return [(chat[:-1], read_text(key, chat[-1].content, filled=True), _label(label, row[label]))]

    return read


def _label(key: str, value: Any) -> Label:
    text = key_of(value) if isinstance(value, (str, bool, int, float)) else ""
    if text in _YES:
        return "positive"
    if text in _NO:
        return "negative"
    raise Fault(f'{key} is {shown(value)}; expected "positive" or "negative" (or true and false, 1 and 0)')


def caa(row: Row) -> list[Answered]:
    keys = ("answer_matching_behavior", "answer_not_matching_behavior")
    answers = [read_text(key, row[key], filled=True).strip() for key in keys]
    return [(question_of(row), answer, label) for answer, label in zip(answers, LABELS, strict=True)]


def openai(row: Row) -> list[Answered]:
    question = read_chat("input", row["input"].get("messages"))
    read = pair("preferred_output", "non_preferred_output", lambda _row: question)
    return read(row)


def ranked(row: Row) -> list[Answered]:
    return pair("output 1", "output 2", instruction_of)(
        {**row, "output 1": row["output"][0], "output 2": row["output"][1]}
    )
