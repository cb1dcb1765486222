"""Requests as tokens, and rows of tokens as answers, for engines that have the model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from steer2edit.data.prompts import Prompt
from steer2edit.data.template_trials import END_OF_THOUGHT
from steer2edit.data.templates import (
    TemplateArguments,
    before_next_turn,
    opens_thought,
    render_prompts,
    templated,
    thought_and_answer,
)
from steer2edit.data.tokens import beginning, joined, texts_of, token_ids
from steer2edit.engines.engine import NO, YES, Answer, Request
from steer2edit.errors import DataError, EngineError, count_of
from steer2edit.notices import notice

_TAIL = 8
"""Tokens before an answer that its text is decoded with, where it continues a prefix: they decide about a first space."""


class Rendering:
    """How a tokenizer's template writes requests, and how answers are read out of tokens.

    With ``think`` the thought is left to a model that thinks, unless the template's arguments forbid one; without it an answer
    stands after an empty thought, unless the arguments ask for one. A request with a prefix never thinks: the prefix begins
    the answer.
    """

    def __init__(self, tokenizer: Any, arguments: TemplateArguments | None, think: bool) -> None:
        self.tokenizer, self.arguments, self.think = tokenizer, arguments, think
        self._marks = _thought_marks(tokenizer)

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts."""
        return token_ids(self.tokenizer, texts, not templated(self.tokenizer))

    def texts(self, requests: Sequence[Request], answering: bool) -> list[str]:
        """The rendered text before each answer, with the prefix that begins it; without ``answering`` nothing thinks."""
        groups: dict[tuple[str | None, bool], dict[Prompt, str]] = {}
        for number, request in enumerate(requests, start=1):
            key = (request.system, bool(request.prefix))
            groups.setdefault(key, {}).setdefault(request.prompt, request.where or f"request {number}")
        rendered: dict[tuple[str | None, bool, Prompt], str] = {}
        for (system, begun), places in groups.items():
            thinks = answering and not begun
            texts = render_prompts(
                places, self.tokenizer, system, self.arguments, writing=thinks, own_thought=thinks and self.think
            )
            rendered |= {(system, begun, prompt): text for prompt, text in texts.items()}
        found = []
        for request in requests:
            text = rendered[request.system, bool(request.prefix), request.prompt]
            spaced = not templated(self.tokenizer)
            found.append(joined(text, request.prefix, spaced) if request.prefix else text)
        return found

    def answer(self, request: Request, text: str, before: Sequence[int], row: list[int], ended: bool) -> Answer:
        """The answer in a row of tokens, without its end token; ``text`` and its tokens ``before`` are the prompt's.

        A model without a chat template ends its answer to a chat by writing the next turn, which is left out.
        """
        if not templated(self.tokenizer) and not isinstance(request.prompt, str):
            whole = texts_of(self.tokenizer, [row])[0]
            if (own := before_next_turn(whole)) != whole:
                row, ended = beginning(self.tokenizer, row, own), True
        tail = list(before[-_TAIL:]) if request.prefix else []
        return replace(self._answer(row, tail, ended, opens_thought(text)), ids=tuple(row))

    def _answer(self, row: list[int], tail: list[int], ended: bool, opened: bool) -> Answer:
        """The answer in a row of tokens; ``tail`` are tokens of the prefix."""
        marks = self._marks
        ends = [place for place, token in enumerate(row) if marks.get(token)]
        begun = opened or (bool(row) and marks.get(row[0]) is False)
        if ends or (begun and marks):
            split = ends[-1] + 1 if ends else len(row)
            thought, text = texts_of(self.tokenizer, [row[:split], row[split:]])
            thought = thought_and_answer(thought, True)[0] or ""
            return Answer(text.strip(), len(row) - split, ended, thought, split)
        if tail:
            before, whole = texts_of(self.tokenizer, [tail, [*tail, *row]])
            text = whole[len(before) :] if whole.startswith(before) else texts_of(self.tokenizer, [row])[0]
            return Answer(text.rstrip(), len(row), ended)
        text = texts_of(self.tokenizer, [row])[0]
        thought_text, answer = thought_and_answer(text, opened)
        if thought_text is None:
            return Answer(answer.strip(), len(row), ended)
        split = self._end_of_thought(row) if answer else len(row)
        return Answer(answer.strip(), len(row) - split, ended, thought_text, split)

    def _end_of_thought(self, row: list[int]) -> int:
        """How many tokens reach to the end of the thought, where its last tag is text of several tokens."""
        count = len(END_OF_THOUGHT.findall(texts_of(self.tokenizer, [row])[0]))
        low, high = 0, len(row)
        while low < high:
            middle = (low + high) // 2
            enough = len(END_OF_THOUGHT.findall(texts_of(self.tokenizer, [row[:middle]])[0])) >= count
            low, high = (low, middle) if enough else (middle + 1, high)
        return high


def by_room(rows: Sequence[Sequence[int]], most: int, context: int) -> dict[int, list[int]]:
    """Indices of rows by how many tokens their answers may have: ``most``, or what the context leaves."""
    if longest := [len(row) for row in rows if len(row) >= context]:
        raise DataError(f"a prompt takes {max(longest)} tokens and the model's context is {context}: shorten it")
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(min(most, context - len(row)), []).append(index)
    if short := sum(len(group) for room, group in groups.items() if room < most):
        notice(
            f"there is room for fewer than {count_of(most, 'token')} in {short} of {count_of(len(rows), 'answer')}: the model's "
            f"context is {context}"
        )
    return groups


def answer_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that begin a yes and those that begin a no, of all spellings."""
    found = []
    for spellings in (YES, NO):
        word = spellings[0].casefold()
        firsts = [ids[0] for ids in token_ids(tokenizer, spellings, False) if ids]
        texts = texts_of(tokenizer, [[token] for token in firsts])
        # a token that is a space alone, or unknown, begins anything
        begins = [(text := one.strip().casefold()) != "" and word.startswith(text) for one in texts]
        found.append({token for token, begin in zip(firsts, begins, strict=True) if begin})
    yes, no = found
    if not yes or not no:
        lacking = "yes" if not yes else "no"
        raise EngineError(f"the tokenizer has no token for {lacking!r}: this model cannot be asked for a yes or no")
    return sorted(yes), sorted(no)


def _thought_marks(tokenizer: Any) -> dict[int, bool]:
    """The added tokens that are tags of a thought; True says that a tag ends one."""
    marks = {}
    for token, added in tokenizer.added_tokens_decoder.items():
        if END_OF_THOUGHT.fullmatch(added.content):
            marks[token] = True
        elif opens_thought(added.content):
            marks[token] = False
    return marks
