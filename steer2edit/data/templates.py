"""Prompts as a chat template writes them, checked before a model reads them.

A prompt ends where the template puts an answer, as ``template_trials`` finds out. Templates run in the tokenizer's child process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer2edit.data.foreign import run_foreign
from steer2edit.data.prompts import Message, Prompt
from steer2edit.data.records import grouped
from steer2edit.data.template_trials import (
    END_OF_THOUGHT,
    FIRST_THOUGHT,
    OPEN_THOUGHT,
    Request,
    apply,
    rejection,
    roles_of,
    tried,
)
from steer2edit.errors import DataError, listing, shown
from steer2edit.files.untrusted import JSON_BYTES, parse_json, read_bytes
from steer2edit.notices import notice

TemplateArguments = Mapping[str, Any]
"""Keyword arguments for a chat template, such as ``{"enable_thinking": False}``; ``chat_template`` names another template."""

_NEXT_TURN = re.compile(r"\s*^(System|User|Assistant):", re.MULTILINE)
_THINKING = ("enable_thinking", "thinking")
_RESERVED = {
    *("conversation", "messages", "add_generation_prompt", "continue_final_message", "tokenize", "tokenizer_kwargs"),
    *("sanitize_control_tokens", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
}


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
    values = dict(arguments or {})
    if reserved := sorted(_RESERVED & values.keys()):
        raise DataError(
            f"the chat template's arguments cannot set {', '.join(reserved)}: these are set here for every prompt"
        )
    try:
        json.dumps(values)
    except (TypeError, ValueError) as error:
        raise DataError(f"the chat template's arguments must be JSON values: {error}") from None
    return values


def note_unread(tokenizer: Any, arguments: TemplateArguments | None) -> None:
    """Say which arguments the chat template never names, and so cannot read."""
    template = getattr(tokenizer, "chat_template", None)
    chosen = (arguments or {}).get("chat_template", "default")
    if isinstance(template, dict):
        template = template.get(chosen)
    elif "{" in str(chosen):
        template = chosen
    if not isinstance(template, str):
        return
    # where a template opens a thought, these two say who thinks, whether it reads them or not
    heeded = {"chat_template", *(_THINKING if re.search("think|thought|reason", template) else ())}
    names = [name for name in arguments or () if name not in heeded]
    if unread := [name for name in names if not re.search(rf"\b{re.escape(name)}\b", template)]:
        notice(f"the chat template does not read {', '.join(unread)}: as arguments for it they change nothing")


def render_prompts(
    places: Mapping[Prompt, str],
    tokenizer: Any,
    system: str | None = None,
    chat_template_kwargs: TemplateArguments | None = None,
    *,
    writing: bool = False,
    own_thought: bool = False,
) -> dict[Prompt, str]:
    """The text before the response of each prompt; ``places`` says where each comes from ("x.jsonl line 3").

    A tokenizer without a chat template gives plain text. A response stands after a thought that is empty, where the template
    or the model thinks first; if the model is ``writing`` and the arguments have ``enable_thinking`` (or ``thinking``), the
    thought is left to it. With ``own_thought`` it is left to it unless the arguments forbid one. Raises DataError, with each
    reason once, for prompts that the template rejects or changes.
    """
    characters = sum(len(p) if isinstance(p, str) else sum(len(m.content) for m in p) for p in places)
    texts = run_foreign(
        tokenizer,
        _ordered,
        list(places.items()),
        system,
        check_arguments(chat_template_kwargs),
        writing,
        own_thought,
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
    own_thought: bool = False,
) -> str:
    """The text before the response of one prompt; see :func:`render_prompts`."""
    texts = render_prompts(
        {prompt: ""}, tokenizer, system, chat_template_kwargs, writing=writing, own_thought=own_thought
    )
    return texts[prompt]


def rendered_prompts(
    places: Mapping[Prompt, str],
    tokenizer: Any,
    system: str | None,
    chat_template_kwargs: TemplateArguments | None,
    *,
    writing: bool = False,
    own_thought: bool = False,
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
        note_unread(tokenizer, arguments)
        trials = tried({roles_of(chat) for chat in chats.values()}, tokenizer, arguments)
        sound = {prompt: chat for prompt, chat in chats.items() if not trials[roles_of(chat)].fault}
        problems += [(trials[roles_of(chat)].fault, places[p]) for p, chat in chats.items() if p not in sound]
        requests = [Request(chat, trials[roles_of(chat)].parts) for chat in sound.values()]
        for (prompt, chat), result in zip(sound.items(), apply(requests, tokenizer, arguments), strict=True):
            trial = trials[roles_of(chat)]
            fault = result.fault and rejection(result.fault, chat)
            if fault := fault or _lost_words(result.text, chat):
                problems.append((fault, places[prompt]))
                continue
            asked = any(arguments.get(name) for name in _THINKING)
            thinks = own_thought or (writing and asked)
            lead = "" if thinks and END_OF_THOUGHT.search(trial.lead) else trial.lead
            texts[prompt] = result.text + lead
            for remark in trial.remarks if lead == trial.lead else ():
                notice(remark)
    if problems:
        raise DataError(_summary(problems))
    return texts


def after_an_answer(tokenizer: Any, chat_template_kwargs: TemplateArguments | None = None) -> str:
    """What the chat template writes behind the last answer of a chat.

    It runs in this process. The text is empty where the template has no place for one.
    """
    if not templated(tokenizer):
        return ""
    return tried({("user",)}, tokenizer, check_arguments(chat_template_kwargs))[("user",)].tail


def before_next_turn(text: str) -> str:
    """What stands before the next turn in an answer to "User: … Assistant:".

    A model without a chat template goes on with further turns.
    """
    found = _NEXT_TURN.search(text)
    return text if found is None else text[: found.start()]


def without_thought(answer: str) -> str:
    """A model's answer without the finished thought before it."""
    ends = [match.end() for match in END_OF_THOUGHT.finditer(answer)]
    return answer[ends[-1] :].strip() if ends else answer


def opens_thought(text: str) -> bool:
    """Whether a text ends in the tag that begins a thought, as some templates write it for the model."""
    return OPEN_THOUGHT.search(text) is not None


def thought_and_answer(text: str, opened: bool = False) -> tuple[str | None, str]:
    """The thought of what a model wrote, without its tags, and the answer behind it.

    ``opened`` says that the prompt began the thought. A thought without an end has no answer behind it: the answer is "".
    """
    start = FIRST_THOUGHT.match(text)
    begin = start.end() if start else 0
    ends = list(END_OF_THOUGHT.finditer(text))
    if ends:
        return text[begin : ends[-1].start()].strip(), text[ends[-1].end() :]
    return (text[begin:].strip(), "") if opened or start else (None, text)


def brings_thought(response: str) -> bool:
    """Whether a response holds a thought of its own, with the tag that ends it."""
    return END_OF_THOUGHT.search(response) is not None


def continued_thought(text: str, response: str) -> str:
    """A response that brings its thought, as it goes on from a prompt.

    It is in the prompt's own tags where the prompt opens one.
    """
    opening = OPEN_THOUGHT.search(text)
    if opening is None:
        return response
    thought, answer = thought_and_answer(response)
    closing = "[/THINK]" if opening[2] else f"</{opening[1]}>"
    return f"{thought}\n{closing}" + (f"\n\n{answer.strip()}" if answer.strip() else "")


def _ordered(
    tokenizer: Any,
    places: Sequence[tuple[Prompt, str]],
    system: str | None,
    arguments: TemplateArguments | None,
    writing: bool,
    own_thought: bool,
) -> list[str]:
    texts = rendered_prompts(dict(places), tokenizer, system, arguments, writing=writing, own_thought=own_thought)
    return [texts[prompt] for prompt, _ in places]


def _check_choice(tokenizer: Any, arguments: dict[str, Any]) -> None:
    templates = getattr(tokenizer, "chat_template", None)
    name = arguments.get("chat_template")
    if name is not None and "{" not in str(name) and name not in (templates if isinstance(templates, dict) else ()):
        present = f"has {', '.join(sorted(templates))}" if isinstance(templates, dict) else "has one, without a name"
        raise DataError(f"there is no chat template called {shown(name)}; the tokenizer {present}")
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
    notice('the tokenizer has no chat template: a chat is written as plain text, "User: … Assistant:"')
    turns = [f"{m.role.capitalize()}: {m.content}\n" for m in messages if m.role != "system"]
    return "".join([f"{m.content}\n\n" for m in messages if m.role == "system"] + turns) + "Assistant:"


def _lost_words(text: str, chat: Sequence[Message]) -> str:
    """The fault where words of a user's or system message are not in the text. Case and white space do not count."""
    letters = _letters(text)
    for message in chat:
        escaped = json.dumps(message.content, ensure_ascii=False)[1:-1]
        if message.role in ("user", "system") and all(
            _letters(content) not in letters for content in (message.content, escaped)
        ):
            return f"the chat template drops or changes words of the {message.role} message"
    return ""


def _letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


def _summary(problems: Sequence[tuple[str, str]]) -> str:
    """Each reason once, with the first place that has it and the number of the others."""
    lines = grouped((where, reason) for reason, where in problems)
    if len(lines) == 1 and not problems[0][1]:
        return lines[0]
    return f"prompts that cannot be rendered:\n{listing(lines)}"
