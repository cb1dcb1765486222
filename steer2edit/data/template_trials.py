"""Trials of a chat template: what it does with messages whose contents are marks.

A template is a stranger's program, and what it does shows only when it runs. For each sequence of roles it is tried once: every
mark must be in the text, a user's exactly once. The same trial shows whether contents are texts or lists of parts, and where an
answer stands: after the generation prompt, after the assistant's header where there is no generation prompt, or after a thought.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from steer2edit.data.prompts import Message
from steer2edit.errors import first_line, shown
from steer2edit.files.sandbox import limited

_SECONDS = 5.0
_BYTES = 1 << 30
_CHARACTERS = 1 << 20
"""What a template may write around its messages."""
_ANSWER = "Forty-two"
_BROKEN = "syntax: "
# the tags that models put around a thought; Magistral's are in brackets
_TAG = r"(?:<((?:\w+:)?(?:think|thinking|thought|reason|reasoning))>|\[(THINK)\])"
OPEN_THOUGHT, FIRST_THOUGHT = re.compile(rf"{_TAG}\s*\Z"), re.compile(rf"\s*{_TAG}")
END_OF_THOUGHT = re.compile(r"</(?:\w+:)?(?:think|thinking|thought|reason|reasoning)>|\[/THINK\]")
_SYSTEM_REMEDY = "leave the system text out, or write it into the user's messages"


class Request(NamedTuple):
    """One call of a template: its messages, whether contents are lists of parts, and whether an answer is to follow."""

    messages: tuple[Message, ...]
    parts: bool
    generation_prompt: bool = True


class Written(NamedTuple):
    """What a template wrote, or why it wrote nothing."""

    text: str
    fault: str = ""


@dataclass(frozen=True)
class Trial:
    """The result of a template for one sequence of roles: a ``fault``, or what it writes.

    That is how contents are given, and what follows the prompt.

    ``lead`` stands between the generation prompt and an answer. ``tail`` follows an answer.
    """

    fault: str = ""
    parts: bool = False
    lead: str = ""
    tail: str = ""
    remarks: tuple[str, ...] = ()


_known: WeakKeyDictionary[Any, dict[tuple[str, tuple[str, ...]], Trial]] = WeakKeyDictionary()


def roles_of(chat: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message.role for message in chat)


def tried(structures: set[tuple[str, ...]], tokenizer: Any, arguments: dict[str, Any]) -> dict[tuple[str, ...], Trial]:
    """The trial of each sequence of roles, with texts as contents and, where these fail, with lists of parts."""
    known = _known.setdefault(tokenizer, {})
    key = json.dumps([getattr(tokenizer, "chat_template", None), arguments], default=repr)
    missing = sorted(structure for structure in structures if (key, structure) not in known)
    for parts in (False, True):
        pending = [s for s in missing if not parts or known[key, s].fault]
        for structure, trial in zip(pending, _run_trials(pending, parts, tokenizer, arguments), strict=True):
            first = known.get((key, structure))
            known[key, structure] = trial if first is None or not trial.fault else _worse(first, trial)
    return {structure: known[key, structure] for structure in structures}


def _worse(first: Trial, second: Trial) -> Trial:
    """Of two trials that failed, with texts and with parts, what to say."""
    if "content" in first.fault and second.fault != first.fault:
        return Trial(f"{first.fault}; with contents as lists of parts: {second.fault}")
    return first


def _run_trials(
    structures: Sequence[tuple[str, ...]], parts: bool, tokenizer: Any, arguments: dict[str, Any]
) -> list[Trial]:
    requests = []
    for roles in structures:
        chat = tuple(Message(role, _mark(i)) for i, role in enumerate(roles))
        answered = (*chat, Message("assistant", _ANSWER))
        requests += [Request(chat, parts), Request(chat, parts, False), Request(answered, parts, False)]
    texts = apply(requests, tokenizer, arguments)
    return [
        _judged(requests[at].messages, parts, *texts[at : at + 3], arguments=arguments)
        for at in range(0, len(requests), 3)
    ]


def _judged(
    chat: tuple[Message, ...],
    parts: bool,
    prompt: Written,
    bare: Written,
    answered: Written,
    *,
    arguments: dict[str, Any],
) -> Trial:
    if prompt.fault:
        return Trial(rejection(prompt.fault, chat))
    text = prompt.text.casefold()
    for message in chat:
        count = text.count(message.content.casefold())
        if not count:
            remedy = f"; {_SYSTEM_REMEDY}" if message.role == "system" else ""
            return Trial(f"the chat template drops the {message.role} message{remedy}")
        if count > 1 and message.role == "user":
            return Trial(f"the chat template writes the user message {count} times; expected once")
    before, mark, tail = answered.text.rpartition(_ANSWER)
    place = before[len(prompt.text) :] if mark and before.startswith(prompt.text) else None
    lead, remarks = "", []
    if place is not None and place.strip():
        lead = place
        if END_OF_THOUGHT.search(place):
            remarks.append(_thought_remark(prompt.text + place, arguments))
        elif prompt.text == bare.text:
            remarks.append(
                f"the chat template has no generation prompt; the assistant's header {shown(place)} is taken from the way "
                "it writes an answer"
            )
        else:
            remarks.append(f"responses stand after {shown(place)}, where the chat template puts an answer")
    elif thought := OPEN_THOUGHT.search(prompt.text):
        closing = "[/THINK]" if thought[2] else f"</{thought[1]}>"
        lead = ("\n" if prompt.text.endswith("\n") else "\n\n") + closing + "\n\n"
        remarks.append(_thought_remark(prompt.text + lead, arguments))
    elif place is None and prompt.text == bare.text:
        remarks.append(
            "the chat template has no generation prompt and shows no assistant's header: responses follow the prompt directly"
        )
    return Trial("", parts, lead, tail if mark else "", tuple(remarks))


def _thought_remark(text: str, arguments: dict[str, Any]) -> str:
    end = [match.group() for match in END_OF_THOUGHT.finditer(text)][-1]
    choice = (
        "the model's own thought is cut from its answers"
        if arguments.get("enable_thinking") or arguments.get("thinking")
        else "--chat-template-kwargs enable_thinking=true lets the model think where it writes answers"
    )
    return f"the chat template thinks before it answers: responses stand after an empty thought ({end}); {choice}"


def rejection(reason: str, chat: Sequence[Message]) -> str:
    roles = ", ".join(roles_of(chat))
    if reason.startswith(_BROKEN):
        return f"the chat template is not valid Jinja ({reason.removeprefix(_BROKEN)}); take the one of the model's publisher"
    sentence = f"the chat template rejects messages with roles {roles} ({reason})"
    if "system" in roles:
        return f"{sentence}; {_SYSTEM_REMEDY}"
    if re.search(r"\brole|alternate", reason, re.IGNORECASE) and "content" not in reason:
        return f"{sentence}; check the order and the names of the roles"
    return sentence


def _mark(number: int) -> str:
    return "Mark" + "".join(chr(ord("g") + int(digit)) for digit in f"{number:05d}") + "z"


def apply(requests: Sequence[Request], tokenizer: Any, arguments: dict[str, Any]) -> list[Written]:
    """What the template writes for each request."""
    return [_bounded(request, *_applied(request, tokenizer, arguments)) for request in requests]


def _applied(request: Request, tokenizer: Any, arguments: dict[str, Any]) -> Written:
    wrapped: Callable[[str], Any] = (lambda text: [{"type": "text", "text": text}]) if request.parts else str
    chat = [{"role": message.role, "content": wrapped(message.content)} for message in request.messages]
    try:
        with limited(_SECONDS, _BYTES):
            text = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=request.generation_prompt, **arguments
            )
    except Exception as error:  # whatever a template raises: Jinja's errors, TypeError, ValueError
        reason = first_line(error)
        broken = type(error).__name__ in ("TemplateSyntaxError", "TemplateAssertionError")
        return Written("", f"{_BROKEN}{reason}" if broken else reason)
    return Written(text) if isinstance(text, str) else Written("", f"it gives {shown(text)} and not a text")


def _bounded(request: Request, text: str, fault: str) -> Written:
    allowed = _CHARACTERS + 4 * sum(len(message.content) for message in request.messages)
    if len(text) <= allowed:
        return Written(text, fault)
    return Written("", f"it writes {len(text)} characters, and at most {allowed} are read")
