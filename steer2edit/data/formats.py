"""Data formats: what the rows of contrast data may look like. A format is one entry of ``FORMATS``.

The command line's help and the table in ``docs/data.md`` are derived from the entries. A row takes the first format whose
columns it has; names are compared without white space around them and in lower case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from steer2edit.data.answers import (
    Answered,
    Read,
    Row,
    caa,
    chat_of,
    instruction_of,
    labelled,
    labelled_chat,
    openai,
    pair,
    prompt_of,
    question_of,
    ranked,
)
from steer2edit.data.prompts import Fault
from steer2edit.data.readers import key_of
from steer2edit.errors import shown

EXPECTED = (
    'expected "prompt", "positive", "negative" or "prompt", "response", "label", or one of the formats in docs/data.md'
)
_SFT = (
    "one response for each prompt; contrast data needs two: call this one positive, and add a response to the same prompt "
    'that does not show the behaviour, called negative (or give each response a row of its own with a "label")'
)
_PROMPTS = (
    "prompts without responses; contrast data needs two responses to each prompt, one that shows the behaviour and one that "
    'does not: write them beside the prompt as "positive" and "negative"'
)
_RESPONSES = {"positive", "negative", "response", "chosen", "rejected"}


@dataclass(frozen=True)
class Format:
    """How rows of one kind become labelled responses.

    ``columns`` must all be there and not null; ``others`` may be. ``read`` raises Fault for what is wrong with a row. A format
    that is known and cannot be used has no ``read``, and says in ``lacks`` what it holds and what to do.
    """

    name: str
    columns: tuple[str, ...]
    example: str = ""
    read: Read | None = None
    others: tuple[str, ...] = ()
    lacks: str = ""
    fits: Callable[[Row], bool] = lambda row: True

    def takes(self, row: Row, filled: bool) -> bool:
        """Whether a row is of this format: it has the columns, ``filled`` ones if asked for."""
        complete = all(column in row and not (filled and row[column] is None) for column in self.columns)
        return complete and self.fits(row)


OWN = (
    Format(
        "pairs",
        ("prompt", "positive", "negative"),
        '{"prompt": "…", "positive": "…", "negative": "…"}',
        pair("positive", "negative", prompt_of),
    ),
    Format(
        "labelled responses",
        ("prompt", "response", "label"),
        '{"prompt": "…", "response": "…", "label": "positive"}',
        labelled("response", prompt_of),
    ),
)
FORMATS: tuple[Format, ...] = (
    *OWN,
    Format(
        "DPO pairs (TRL, UltraFeedback)",
        ("prompt", "chosen", "rejected"),
        '{"prompt": "…", "chosen": "…", "rejected": "…"}',
        pair("chosen", "rejected", prompt_of),
    ),
    Format(
        "Alpaca DPO",
        ("instruction", "chosen", "rejected"),
        '{"instruction": "…", "input": "", "chosen": "…", "rejected": "…"}',
        pair("chosen", "rejected", instruction_of),
        ("input", "system"),
    ),
    Format(
        "DPO questions (Orca)",
        ("question", "chosen", "rejected"),
        '{"system": "…", "question": "…", "chosen": "…", "rejected": "…"}',
        pair("chosen", "rejected", question_of),
        ("system",),
    ),
    Format(
        "ShareGPT preferences",
        ("conversations", "chosen", "rejected"),
        '{"conversations": […], "chosen": {"from": "gpt", "value": "…"}, "rejected": {…}}',
        pair("chosen", "rejected", chat_of("conversations")),
    ),
    Format(
        "chat preferences",
        ("messages", "chosen", "rejected"),
        '{"messages": […], "chosen": {"role": "assistant", "content": "…"}, "rejected": {…}}',
        pair("chosen", "rejected", chat_of("messages")),
    ),
    Format(
        "whole chats (hh-rlhf)",
        ("chosen", "rejected"),
        '{"chosen": "\\n\\nHuman: …\\n\\nAssistant: …", "rejected": "…"}',
        pair("chosen", "rejected"),
    ),
    Format(
        "OpenAI preferences",
        ("input", "preferred_output", "non_preferred_output"),
        '{"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}',
        openai,
        fits=lambda row: isinstance(row["input"], dict),
    ),
    Format(
        "Stack Exchange pairs",
        ("question", "response_j", "response_k"),
        '{"question": "…", "response_j": "…", "response_k": "…"}',
        pair("response_j", "response_k", question_of),
    ),
    Format(
        "ranked Alpaca",
        ("instruction", "output"),
        '{"instruction": "…", "input": "", "output": ["better", "worse"]}',
        ranked,
        ("input", "system"),
        fits=lambda row: isinstance(row["output"], list) and len(row["output"]) == 2,
    ),
    Format(
        "KTO (TRL)",
        ("prompt", "completion", "label"),
        '{"prompt": "…", "completion": "…", "label": true}',
        labelled("completion", prompt_of),
    ),
    Format(
        "KTO chats",
        ("messages", "label"),
        '{"messages": […], "label": false}',
        labelled_chat("messages", "label"),
    ),
    Format(
        "ShareGPT KTO",
        ("conversations", "kto_tag"),
        '{"conversations": […], "kto_tag": true}',
        labelled_chat("conversations", "kto_tag"),
    ),
    Format(
        "CAA",
        ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
        '{"question": "…", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}',
        caa,
    ),
    Format(
        "pairs without prompts (repeng)",
        ("positive", "negative"),
        '{"positive": "…", "negative": "…"} or ["…", "…"]',
        pair("positive", "negative"),
        fits=lambda row: "prompt" not in row,
    ),
    Format("chats with one answer (OpenAI)", ("messages",), lacks=_SFT),
    Format("chats with one answer (ShareGPT)", ("conversations",), lacks=_SFT),
    Format("instructions with one output (Alpaca)", ("instruction", "output"), lacks=_SFT),
    Format("prompts with one completion", ("prompt", "completion"), lacks=_SFT),
    Format(
        "prompts with labels",
        ("prompt", "label"),
        lacks='"response" is missing: give the text that the label is about as "response"',
        fits=lambda row: not _RESPONSES & row.keys(),
    ),
    Format("texts alone", ("text",), lacks=_PROMPTS),
    Format("instructions alone", ("instruction",), lacks=_PROMPTS),
    Format("prompts alone", ("prompt",), lacks=_PROMPTS, fits=lambda row: not _RESPONSES & row.keys()),
)


def recognise(row: object) -> tuple[Format, Row]:
    """The format of a row, and the row with its keys as they are compared. Raises Fault for a row of no format."""
    if isinstance(row, list) and len(row) == 2 and all(isinstance(text, str) for text in row):
        row = {"positive": row[0], "negative": row[1]}
    elif isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise Fault(f"expected an object, found {shown(row)}")
    keyed = {key_of(key): value for key, value in row.items()}
    keyed |= {
        key: value for key, value in row.items() if key == key_of(key)
    }  # an exact name goes before its look-alikes
    form = next((known for filled in (True, False) for known in FORMATS if known.takes(keyed, filled)), None)
    if form is None:
        raise Fault(_unknown(keyed, list(row)))
    return form, keyed


def answered(row: object) -> tuple[Format, list[Answered]]:
    """A row's format and labelled responses. Raises Fault with everything that is wrong with the row."""
    form, keyed = recognise(row)
    if form.read is None:
        raise Fault(f"the rows are {form.name}: {form.lacks}")
    return form, list(form.read(keyed))


def columns() -> frozenset[str]:
    """The names of all columns that a format reads, in lower case."""
    return frozenset(column for known in FORMATS for column in (*known.columns, *known.others))


def usable() -> str:
    """The names of the formats that can be used, for help texts."""
    return ", ".join(known.name for known in FORMATS if known.read)


def table() -> str:
    """The formats as tables in Markdown, for the documentation: those that are read, and those that lack something."""
    lines = ["| format | a row | also read |", "|---|---|---|"]
    lines += [f"| {one.name} | `{one.example}` | {', '.join(one.others)} |" for one in FORMATS if one.read]
    lines += ["", "| not enough | columns | what is missing |", "|---|---|---|"]
    lines += [f"| {one.name} | {', '.join(one.columns)} | {one.lacks} |" for one in FORMATS if not one.read]
    return "\n".join(lines)


def _unknown(row: Row, names: list[str]) -> str:
    """What to say of a row that is of no format, by the own format that it comes nearest to."""
    nearest = max(OWN, key=lambda known: sum(column in row for column in known.columns[1:]))
    if not any(column in row for column in nearest.columns[1:]):
        return f"{EXPECTED}; found {shown(names)}"
    absent = [column for column in nearest.columns if column not in row]
    return f"{', '.join(map(shown, absent))} is missing; {EXPECTED}"
