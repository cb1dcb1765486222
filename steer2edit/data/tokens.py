"""Turning examples into tokens: the chat template, the span of the response, and the token that ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from steer2edit.data.answers import Label
from steer2edit.data.contrast import Example
from steer2edit.data.foreign import run_foreign
from steer2edit.data.prompts import Prompt
from steer2edit.data.records import grouped
from steer2edit.data.templates import (
    TemplateArguments,
    after_an_answer,
    brings_thought,
    check_arguments,
    continued_thought,
    rendered_prompts,
    templated,
)
from steer2edit.errors import DataError, listing, shown

MAX_TOKENS = 2048
"""Of an example's tokens, those past this number are cut."""
_TOKENS_A_TEXT = 64
_TOKENS_A_CHARACTER = 16
"""A character takes four bytes at most, and a byte one token, but for what a normaliser does to a few."""
Span = Literal["matched", "response", "last"]


@dataclass(frozen=True)
class Encoded:
    """Tokens of prompt, response and end of turn; positions ``[start-1, len(ids)-1)`` predict those from ``start``.

    With ``last`` the steering vector is read at the last of these positions alone.
    """

    ids: tuple[int, ...]
    start: int
    label: Label | Literal["background", "chat", "keep"]
    row: int
    last: bool = False


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    system: str | None = None,
    span: Span = "matched",
    max_tokens: int = MAX_TOKENS,
    context: int | None = None,
    chat_template_kwargs: TemplateArguments | None = None,
) -> list[Encoded]:
    """Tokens and response span of each example, in order, cut at ``max_tokens`` and at the model's ``context``.

    A response ends in the end-of-turn token, where there is one. ``span="matched"`` then cuts the responses of a
    pair to as many tokens as the shorter has, so that the classes do not differ in how far into a response they
    look; ``"response"`` keeps them whole. ``"last"`` keeps them whole too, and the steering vector is read at the position that
    predicts the end of the turn: that of the last token of the response itself. A token that merges the prompt's end with the
    response's beginning counts as the response's. ``chat_template_kwargs`` are arguments for the chat template
    (enable_thinking, …).

    Raises DataError, listing every prompt that cannot be rendered or is too long, and every response without a token.
    """
    if span not in get_args(Span):
        raise DataError(f"there is no span {shown(span)}; there are {', '.join(get_args(Span))}")
    if not examples:
        return []
    spans = run_foreign(
        tokenizer,
        _spans,
        list(examples),
        system,
        max_tokens,
        context,
        check_arguments(chat_template_kwargs),
        characters=sum(len(e.response) + _length(e.prompt) + len(system or "") for e in examples),
        what="the chat template or the tokenizer",
    )
    last = span == "last"
    encoded = [
        Encoded(tuple(ids), start, e.label, e.row, last) for e, (ids, start) in zip(examples, spans, strict=True)
    ]
    return _matched(examples, encoded) if span == "matched" else encoded


def windows(tokenizer: Any, texts: Sequence[str], max_tokens: int, size: int = 256) -> list[list[int]]:
    """Token ids of running texts, each read by itself in windows of ``size`` tokens, ``max_tokens`` in all."""
    rows: list[list[int]] = []
    left = max_tokens
    for ids in token_ids(tokenizer, texts):
        ids_used = ids[: max(left, 0)]
        left -= len(ids_used)
        # every window begins as a text does: some models are lost without their BOS
        start = ids_used[:1] if ids_used[:1] == [tokenizer.bos_token_id] else []
        body = ids_used[len(start) :]
        rows += [start + body[i : i + size] for i in range(0, len(body), size) if len(body) - i > 1 or start]
    return rows


def token_ids(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """The token ids of each text. Raises DataError where the tokenizer takes too much, or makes far more tokens than text."""

    if not texts:
        return []
    characters = sum(map(len, texts))
    rows: list[list[int]] = run_foreign(
        tokenizer, _checked, list(texts), add_special_tokens, characters=characters, what="the tokenizer"
    )
    return rows


def texts_of(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """The text of each row of token ids, without special tokens. Raises DataError where the tokenizer takes too much."""
    if not rows:
        return []
    tokens = [list(row) for row in rows]
    texts: list[str] = run_foreign(
        tokenizer, _decoded, tokens, characters=sum(map(len, tokens)), what="the tokenizer's decoder"
    )
    return texts


def beginning(tokenizer: Any, row: Sequence[int], text: str) -> list[int]:
    """The tokens of a row that write ``text``, which is how the row's text begins, and nothing more."""
    low, high = 0, len(row)
    while low < high:
        middle = (low + high + 1) // 2
        within = len(texts_of(tokenizer, [row[:middle]])[0]) <= len(text)
        low, high = (middle, high) if within else (low, middle - 1)
    return list(row[:low])


def end_of_turn(tokenizer: Any, chat_template_kwargs: TemplateArguments | None = None) -> int | None:
    """The token that ends a response; see :func:`encode`. It is the EOS where a chat template puts none behind an answer."""
    arguments = check_arguments(chat_template_kwargs)
    end: int | None = run_foreign(tokenizer, _end_of_turn, arguments, characters=1, what="the chat template")
    return end


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens ``a`` and ``b`` begin with alike."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _spans(
    tokenizer: Any,
    examples: Sequence[Example],
    system: str | None,
    max_tokens: int,
    context: int | None,
    arguments: TemplateArguments | None,
) -> list[tuple[list[int], int]]:
    """Of each example its tokens and where the response begins; see :func:`encode`."""
    special = not templated(tokenizer)  # a template writes its own; the first would be doubled
    thinks = [not special and brings_thought(example.response) for example in examples]
    texts: dict[tuple[Prompt, bool], str] = {}
    for own in (False, True):
        places: dict[Prompt, str] = {}
        for example, its_own in zip(examples, thinks, strict=True):
            if its_own is own:
                places.setdefault(example.prompt, example.where)
        rendered = rendered_prompts(places, tokenizer, system, arguments, own_thought=own) if places else {}
        texts |= {(prompt, own): text for prompt, text in rendered.items()}
    prompts = dict(zip(texts, _tokenize(list(texts.values()), tokenizer, special), strict=True))
    wholes = [
        joined(text, continued_thought(text, example.response) if own else example.response, spaced=special)
        for example, own in zip(examples, thinks, strict=True)
        for text in [texts[example.prompt, own]]
    ]
    end = _end_of_turn(tokenizer, arguments)
    spans: list[tuple[list[int], int]] = []
    problems: list[tuple[str, str]] = []
    limit = max_tokens if context is None else min(max_tokens, context)
    remedy = "the model reads no more; shorten it" if limit == context else "shorten it, or raise --max-tokens"
    for example, own, ids in zip(examples, thinks, _tokenize(wholes, tokenizer, special), strict=True):
        start = max(1, common_prefix(prompts[example.prompt, own], ids))
        if start >= len(ids):
            problems.append((example.where, f"the response {shown(example.response)} yields no token"))
        elif start >= limit:
            fault = (example.where, f"the prompt alone takes {start} tokens and the limit is {limit}: {remedy}")
            problems += [fault] if fault not in problems[-1:] else []  # a pair has one prompt
        else:
            if end is not None and ids[-1] != end:  # a response may bring its own
                ids.append(end)
            spans.append((ids[:limit], start))
    if problems:
        raise DataError(f"examples that cannot be encoded:\n{listing(grouped(problems))}")
    return spans


def _length(prompt: Prompt) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(message.content) for message in prompt)


def _matched(examples: Sequence[Example], encoded: list[Encoded]) -> list[Encoded]:
    """All responses of a row, cut to the number of tokens of its shortest. A row with one class only stays whole."""
    # The prompt is part of the key: the rows of two sources put together may have the same numbers.
    rows = [(example.prompt, example.row) for example in examples]
    labels: dict[tuple[Prompt, int], set[str]] = {}
    shortest: dict[tuple[Prompt, int], int] = {}
    for row, one in zip(rows, encoded, strict=True):
        length = len(one.ids) - one.start
        labels.setdefault(row, set()).add(one.label)
        shortest[row] = min(shortest.get(row, length), length)
    return [
        replace(one, ids=one.ids[: one.start + shortest[row]]) if len(labels[row]) > 1 else one
        for row, one in zip(rows, encoded, strict=True)
    ]


def _end_of_turn(tokenizer: Any, arguments: TemplateArguments | None) -> int | None:
    """The token that ends a response.

    It is the first added token that a chat template puts behind an answer, else the EOS.

    Ordinary tokens in between are passed over: white space before the end token, or a mark spelled out in text.
    """
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    tail = tokenizer(after_an_answer(tokenizer, arguments), add_special_tokens=False)["input_ids"]
    end: int | None = next((index for index in tail if index in added), tokenizer.eos_token_id)
    return end


def joined(prompt: str, response: str, spaced: bool) -> str:
    """A prompt with the response behind it; ``spaced`` puts a space between the two, if neither has white space there."""
    apart = not spaced or not prompt or prompt[-1].isspace() or response[0].isspace()
    return prompt + response if apart else f"{prompt} {response}"


def _tokenize(texts: list[str], tokenizer: Any, special: bool) -> list[list[int]]:
    if not texts:
        return []
    # The probe in front shows whether the tokenizer closes every text with an end-of-sequence token.
    probe, *rows = _checked(tokenizer, ["a", *texts], special)
    closed = special and tokenizer.eos_token_id is not None and probe[-1] == tokenizer.eos_token_id
    return [list(ids[:-1] if closed else ids) for ids in rows]


def _decoded(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def _checked(tokenizer: Any, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    """What the tokenizer makes of texts, if it is no more than a tokenizer makes of text."""
    batch = tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)
    rows = [list(ids) for ids in batch["input_ids"]]
    tokens, characters = sum(map(len, rows)), sum(map(len, texts))
    if tokens > _TOKENS_A_TEXT * len(texts) + _TOKENS_A_CHARACTER * characters:
        raise DataError(
            f"the tokenizer makes {tokens} tokens of {characters} characters; its files are damaged, or not what they seem"
        )
    return rows
