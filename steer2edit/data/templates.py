"""Prompts as a chat template writes them, checked before a model reads them.

A template is a stranger's program, and what it does shows only when it runs. For each sequence of roles it is tried once on
messages whose contents are marks: every mark must be in the text, a user's exactly once. The same trial shows where the template
puts an answer: after the generation prompt, after the assistant's header where there is no generation prompt, or after a
thought. Prompts end there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from steer2edit.data.foreign import run_foreign
from steer2edit.data.prompts import Message, Prompt
from steer2edit.errors import DataError, first_line, listing, shown
from steer2edit.files.sandbox import limited
from steer2edit.files.untrusted import JSON_BYTES, parse_json, read_bytes
from steer2edit.notices import notice

TemplateArguments = Mapping[str, Any]
"""Keyword arguments for a chat template, such as ``{"enable_thinking": False}``; ``chat_template`` names another template."""

_SECONDS = 5.0
_BYTES = 1 << 30
_CHARACTERS = 1 << 20
"""What a template may write around its messages."""
_RESERVED = {
    *("conversation", "messages", "add_generation_prompt", "continue_final_message", "tokenize", "tokenizer_kwargs"),
    *("sanitize_control_tokens", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
}
_ANSWER = "Forty-two"
_BROKEN = "syntax: "
# the tags that models put around a thought; Magistral's are in brackets
_OPEN_THOUGHT = re.compile(r"(?:<((?:\w+:)?(?:think|thinking|thought|reason|reasoning))>|\[(THINK)\])\s*\Z")
_END_OF_THOUGHT = re.compile(r"</(?:\w+:)?(?:think|thinking|thought|reason|reasoning)>|\[/THINK\]")
_SYSTEM_REMEDY = "leave the system text out, or write it into the user's messages"


class _Request(NamedTuple):
    """One call of a template: its messages, whether contents are lists of parts, and whether an answer is to follow."""

    messages: tuple[Message, ...]
    parts: bool
    generation_prompt: bool = True


class _Text(NamedTuple):
    """What a template wrote, or why it wrote nothing."""

    text: str
    fault: str = ""


@dataclass(frozen=True)
class _Trial:
    """What a template does with one sequence of roles: a ``fault``, or how contents are given and what follows the prompt.

    ``lead`` stands between the generation prompt and an answer. ``tail`` follows an answer.
    """

    fault: str = ""
    parts: bool = False
    lead: str = ""
    tail: str = ""
    remarks: tuple[str, ...] = ()


_trials: WeakKeyDictionary[Any, dict[tuple[str, tuple[str, ...]], _Trial]] = WeakKeyDictionary()


def templated(tokenizer: Any) -> bool:
    """Whether prompts are written by a chat template, which also writes the special tokens."""
    return bool(getattr(tokenizer, "chat_template", None))


def processor_template(folder: Path) -> str | None:
    """The template in ``chat_template.json``, where repositories of multimodal models keep it; None where there is none.

    Raises DataError where the file holds something else.
    """
    path = folder / "chat_template.json"
    if not path.is_file():
        return None
    try:
        described = parse_json(read_bytes(path, JSON_BYTES))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    template = described.get("chat_template") if isinstance(described, dict) else None
    if not isinstance(template, str):
        raise DataError(f'{path} holds {shown(described)}; expected {{"chat_template": "…"}}')
    notice("the chat template is that of chat_template.json; the tokenizer has none of its own")
    return template


def check_arguments(arguments: TemplateArguments | None) -> dict[str, Any]:
    """Template arguments as JSON values. Raises DataError for those that are not, or that would set how a prompt is rendered."""
    found = dict(arguments or {})
    if taken := sorted(_RESERVED & found.keys()):
        raise DataError(
            f"the chat template's arguments cannot set {', '.join(taken)}: these are set here for every prompt"
        )
    try:
        json.dumps(found)
    except (TypeError, ValueError) as error:
        raise DataError(f"the chat template's arguments must be JSON values: {error}") from None
    return found


def render_prompts(
    places: Mapping[Prompt, str],
    tokenizer: Any,
    system: str | None = None,
    chat_template_kwargs: TemplateArguments | None = None,
    *,
    writing: bool = False,
) -> dict[Prompt, str]:
    """The text before the response of each prompt; ``places`` says where each comes from ("x.jsonl line 3").

    A tokenizer without a chat template gives plain text. A response stands after a thought that is empty, where the template
    or the model thinks first; if the model is ``writing`` and the arguments have ``enable_thinking`` (or ``thinking``), the
    thought is left to it. Raises DataError, with each reason once, for prompts that the template rejects or changes.
    """
    characters = sum(len(p) if isinstance(p, str) else sum(len(m.content) for m in p) for p in places)
    texts = run_foreign(
        tokenizer,
        _ordered,
        list(places.items()),
        system,
        check_arguments(chat_template_kwargs),
        writing,
        characters=characters + len(places) * len(system or ""),
        what="the chat template",
    )
    return dict(zip(places, texts, strict=True))


def render_prompt(
    prompt: Prompt,
    tokenizer: Any,
    system: str | None = None,
    chat_template_kwargs: TemplateArguments | None = None,
    *,
    writing: bool = False,
) -> str:
    """The text before the response of one prompt; see :func:`render_prompts`."""
    return render_prompts({prompt: ""}, tokenizer, system, chat_template_kwargs, writing=writing)[prompt]


def rendered_prompts(
    places: Mapping[Prompt, str],
    tokenizer: Any,
    system: str | None,
    chat_template_kwargs: TemplateArguments | None,
    *,
    writing: bool = False,
) -> dict[Prompt, str]:
    """What :func:`render_prompts` gives, computed in this process."""
    arguments = check_arguments(chat_template_kwargs)
    if arguments and not templated(tokenizer):
        raise DataError(
            f"the tokenizer has no chat template to take the arguments {', '.join(arguments)}; leave them out"
        )
    texts: dict[Prompt, str] = {}
    chats: dict[Prompt, tuple[Message, ...]] = {}
    problems: list[tuple[str, str]] = []
    for prompt, where in places.items():
        try:
            if templated(tokenizer):
                chats[prompt] = _messages(prompt, system)
            else:
                texts[prompt] = _plain(prompt, system)
        except DataError as error:
            problems.append((str(error), where))
    if chats:
        _check_choice(tokenizer, arguments)
        trials = _tried({_roles(chat) for chat in chats.values()}, tokenizer, arguments)
        sound = {prompt: chat for prompt, chat in chats.items() if not trials[_roles(chat)].fault}
        problems += [(trials[_roles(chat)].fault, places[p]) for p, chat in chats.items() if p not in sound]
        requests = [_Request(chat, trials[_roles(chat)].parts) for chat in sound.values()]
        for (prompt, chat), found in zip(sound.items(), _apply(requests, tokenizer, arguments), strict=True):
            trial = trials[_roles(chat)]
            fault = found.fault and _rejection(found.fault, chat)
            if fault := fault or _lost_words(found.text, chat):
                problems.append((fault, places[prompt]))
                continue
            thinks = writing and bool(arguments.get("enable_thinking") or arguments.get("thinking"))
            lead = "" if thinks and _END_OF_THOUGHT.search(trial.lead) else trial.lead
            texts[prompt] = found.text + lead
            for remark in trial.remarks if lead == trial.lead else ():
                notice(remark)
    if problems:
        raise DataError(_summary(problems))
    return texts


def after_an_answer(tokenizer: Any, chat_template_kwargs: TemplateArguments | None = None) -> str:
    """What the chat template writes behind the last answer of a chat, in this process; "" where it has no place for one."""
    if not templated(tokenizer):
        return ""
    return _tried({("user",)}, tokenizer, check_arguments(chat_template_kwargs))[("user",)].tail


def without_thought(answer: str) -> str:
    """A model's answer without the finished thought before it."""
    ends = [found.end() for found in _END_OF_THOUGHT.finditer(answer)]
    return answer[ends[-1] :].strip() if ends else answer


def _ordered(
    tokenizer: Any,
    places: Sequence[tuple[Prompt, str]],
    system: str | None,
    arguments: TemplateArguments | None,
    writing: bool,
) -> list[str]:
    texts = rendered_prompts(dict(places), tokenizer, system, arguments, writing=writing)
    return [texts[prompt] for prompt, _ in places]


def _check_choice(tokenizer: Any, arguments: dict[str, Any]) -> None:
    templates = getattr(tokenizer, "chat_template", None)
    chosen = arguments.get("chat_template")
    if (
        chosen is not None
        and "{" not in str(chosen)
        and chosen not in (templates if isinstance(templates, dict) else ())
    ):
        held = f"has {', '.join(sorted(templates))}" if isinstance(templates, dict) else "has one, without a name"
        raise DataError(f"there is no chat template called {shown(chosen)}; the tokenizer {held}")
    if isinstance(templates, dict) and "default" not in templates and "chat_template" not in arguments:
        raise DataError(
            f"the tokenizer has {len(templates)} chat templates ({', '.join(sorted(templates))}) and none is called default; "
            "choose one with --chat-template-kwargs chat_template=NAME"
        )


def _messages(prompt: Prompt, system: str | None) -> tuple[Message, ...]:
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if system is None:
        return messages
    if any(message.role == "system" for message in messages):
        raise DataError("the prompt has a system message of its own, and a system text is given too: keep one")
    return (Message("system", system), *messages)


def _plain(prompt: Prompt, system: str | None) -> str:
    if isinstance(prompt, str):
        return prompt if system is None else f"{system}\n\n{prompt}"
    messages = _messages(prompt, system)
    notice('the tokenizer has no chat template: chats are written as plain text, "User: … Assistant:"')
    turns = [f"{m.role.capitalize()}: {m.content}\n" for m in messages if m.role != "system"]
    return "".join([f"{m.content}\n\n" for m in messages if m.role == "system"] + turns) + "Assistant:"


def _roles(chat: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message.role for message in chat)


def _tried(
    structures: set[tuple[str, ...]], tokenizer: Any, arguments: dict[str, Any]
) -> dict[tuple[str, ...], _Trial]:
    """The trial of each sequence of roles, with texts as contents and, where these fail, with lists of parts."""
    known = _trials.setdefault(tokenizer, {})
    key = json.dumps([getattr(tokenizer, "chat_template", None), arguments], default=repr)
    missing = sorted(structure for structure in structures if (key, structure) not in known)
    for parts in (False, True):
        chosen = [s for s in missing if not parts or known[key, s].fault]
        for structure, trial in zip(chosen, _run_trials(chosen, parts, tokenizer, arguments), strict=True):
            first = known.get((key, structure))
            known[key, structure] = trial if first is None or not trial.fault else _worse(first, trial)
    return {structure: known[key, structure] for structure in structures}


def _worse(first: _Trial, second: _Trial) -> _Trial:
    """Of two trials that failed, with texts and with parts, what to say."""
    if "content" in first.fault and second.fault != first.fault:
        return _Trial(f"{first.fault}; with contents as lists of parts: {second.fault}")
    return first


def _run_trials(
    structures: Sequence[tuple[str, ...]], parts: bool, tokenizer: Any, arguments: dict[str, Any]
) -> list[_Trial]:
    requests = []
    for roles in structures:
        chat = tuple(Message(role, _mark(i)) for i, role in enumerate(roles))
        answered = (*chat, Message("assistant", _ANSWER))
        requests += [_Request(chat, parts), _Request(chat, parts, False), _Request(answered, parts, False)]
    texts = _apply(requests, tokenizer, arguments)
    return [
        _judged(requests[at].messages, parts, *texts[at : at + 3], arguments=arguments)
        for at in range(0, len(requests), 3)
    ]


def _judged(
    chat: tuple[Message, ...], parts: bool, prompt: _Text, bare: _Text, answered: _Text, *, arguments: dict[str, Any]
) -> _Trial:
    if prompt.fault:
        return _Trial(_rejection(prompt.fault, chat))
    written = prompt.text.casefold()
    for message in chat:
        count = written.count(message.content.casefold())
        if not count:
            remedy = f"; {_SYSTEM_REMEDY}" if message.role == "system" else ""
            return _Trial(f"the chat template drops the {message.role} message{remedy}")
        if count > 1 and message.role == "user":
            return _Trial(f"the chat template writes the user message {count} times; expected once")
    before, found, tail = answered.text.rpartition(_ANSWER)
    place = before[len(prompt.text) :] if found and before.startswith(prompt.text) else None
    lead, remarks = "", []
    if place is not None and place.strip():
        lead = place
        if _END_OF_THOUGHT.search(place):
            remarks.append(_thought_remark(prompt.text + place, arguments))
        elif prompt.text == bare.text:
            remarks.append(
                f"the chat template has no generation prompt; the assistant's header {shown(place)} is taken from the way "
                "it writes an answer"
            )
        else:
            remarks.append(f"responses stand after {shown(place)}, where the chat template puts an answer")
    elif opened := _OPEN_THOUGHT.search(prompt.text):
        closing = "[/THINK]" if opened[2] else f"</{opened[1]}>"
        lead = ("\n" if prompt.text.endswith("\n") else "\n\n") + closing + "\n\n"
        remarks.append(_thought_remark(prompt.text + lead, arguments))
    elif place is None and prompt.text == bare.text:
        remarks.append(
            "the chat template has no generation prompt and shows no assistant's header: responses follow the prompt directly"
        )
    return _Trial("", parts, lead, tail if found else "", tuple(remarks))


def _thought_remark(text: str, arguments: dict[str, Any]) -> str:
    end = [found.group() for found in _END_OF_THOUGHT.finditer(text)][-1]
    choice = (
        "the model's own thought is cut from its answers"
        if arguments.get("enable_thinking") or arguments.get("thinking")
        else "--chat-template-kwargs enable_thinking=true lets the model think where it writes answers"
    )
    return f"the chat template thinks before it answers: responses stand after an empty thought ({end}); {choice}"


def _rejection(reason: str, chat: Sequence[Message]) -> str:
    roles = ", ".join(_roles(chat))
    if reason.startswith(_BROKEN):
        return f"the chat template is not valid Jinja ({reason.removeprefix(_BROKEN)}); take the one of the model's publisher"
    told = f"the chat template rejects messages with roles {roles} ({reason})"
    if "system" in roles:
        return f"{told}; {_SYSTEM_REMEDY}"
    if re.search(r"\brole|alternate", reason, re.IGNORECASE) and "content" not in reason:
        return f"{told}; check the order and the names of the roles"
    return told


def _lost_words(text: str, chat: Sequence[Message]) -> str:
    """What is wrong where words of a user's or system message are not in the text, whatever their case and white space."""
    written = _letters(text)
    for message in chat:
        escaped = json.dumps(message.content, ensure_ascii=False)[1:-1]
        if message.role in ("user", "system") and all(
            _letters(content) not in written for content in (message.content, escaped)
        ):
            return f"the chat template drops or changes words of the {message.role} message"
    return ""


def _letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


def _mark(number: int) -> str:
    return "Mark" + "".join(chr(ord("g") + int(digit)) for digit in f"{number:05d}") + "z"


def _apply(requests: Sequence[_Request], tokenizer: Any, arguments: dict[str, Any]) -> list[_Text]:
    """What the template writes for each request."""
    return [_bounded(request, *_applied(request, tokenizer, arguments)) for request in requests]


def _applied(request: _Request, tokenizer: Any, arguments: dict[str, Any]) -> _Text:
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
        return _Text("", f"{_BROKEN}{reason}" if broken else reason)
    return _Text(text) if isinstance(text, str) else _Text("", f"it gives {shown(text)} and not a text")


def _bounded(request: _Request, text: str, fault: str) -> _Text:
    allowed = _CHARACTERS + 4 * sum(len(message.content) for message in request.messages)
    if len(text) <= allowed:
        return _Text(text, fault)
    return _Text("", f"it writes {len(text)} characters, and at most {allowed} are read")


def _summary(problems: Sequence[tuple[str, str]]) -> str:
    """Each reason once, with the first place that it has and the number of the others."""
    places: dict[str, list[str]] = {}
    for reason, where in problems:
        places.setdefault(reason, []).append(where)
    lines = []
    for reason, found in places.items():
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        lines.append(f"{found[0]}{more}: {reason}" if found[0] else reason)
    if len(lines) == 1 and not problems[0][1]:
        return lines[0]
    return f"prompts that cannot be rendered:\n{listing(lines)}"
