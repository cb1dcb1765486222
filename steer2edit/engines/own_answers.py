"""A model's own answers: what it writes by itself, which is the text that its users see.

The cost of an edit where questions are answered is measured on them (``strength/kl.py``), and a background can be made of them. A
model's answers are generated once and kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer2edit.data.prompts import Prompt
from steer2edit.data.templates import TemplateArguments, before_next_turn, render_prompt, render_prompts, templated
from steer2edit.data.tokens import beginning, end_of_turn, texts_of, token_ids
from steer2edit.engines.generation import generate
from steer2edit.engines.penalty import own_penalty
from steer2edit.errors import DataError, count_of, first_line
from steer2edit.files.cache_folder import cache_folder, write_cached
from steer2edit.files.schema import check
from steer2edit.files.untrusted import JSON_BYTES, parse_json, read_bytes
from steer2edit.notices import notice
from steer2edit.progress import Advance, Progress, silent
from steer2edit.runtime.model import LoadedModel

ANSWER_TOKENS = 80
"""Tokens of an answer, at most."""
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*")
_FORMAT = "steer2edit.own-answers.1"
_FILE: Any = {"format": str, "key": {}, "answers": [[int]]}


@dataclass(frozen=True)
class OwnAnswer:
    """Token ids of a prompt, as the model reads it, and of the model's answer, which begins at ``start``.

    ``ended`` says that the model ended the answer by itself; its end token is then the last of ``ids``.
    """

    ids: tuple[int, ...]
    start: int
    ended: bool


def own_answers(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    *,
    fingerprint: str | None,
    max_new_tokens: int = ANSWER_TOKENS,
    chat_template_kwargs: TemplateArguments | None = None,
    progress: Progress = silent,
) -> list[OwnAnswer]:
    """The model's greedy answers to ``prompts``, under its own template, in their order.

    Where the model thinks before it answers, every second answer begins with its thought, and the others stand after an empty
    one: so both are represented within ``max_new_tokens``. A model without a template reads plain text, and an answer of it ends
    where it writes the next turn or repeats a sentence: such models hardly end one by themselves. Empty answers and prompts that
    the template rejects or whose words the tokenizer does not know are left out, with a notice of how many. ``fingerprint`` is
    the model's, for the cache; None keeps nothing. No hook may be on the model. Raises DataError where no prompt is left.
    """
    tokenizer = loaded.tokenizer
    plain = not templated(tokenizer)
    texts, rows = known_texts(
        tokenizer, _rendered(tokenizer, list(dict.fromkeys(prompts)), chat_template_kwargs), plain
    )
    loaded.check_tokens(rows)
    end = end_of_turn(tokenizer, chat_template_kwargs)
    ends = loaded.end_tokens
    key = {
        "fingerprint": fingerprint,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "prompts": hashlib.sha256(json.dumps(rows).encode("ascii")).hexdigest(),
        "max_new_tokens": max_new_tokens,
        "ends": sorted(ends),
        **({"repetition_penalty": penalty} if (penalty := own_penalty(loaded)) != 1 else {}),
    }
    path = None if fingerprint is None else _path(key)
    answers = None if path is None else _read(path, key, len(rows), loaded.vocabulary)
    if answers is None:
        answers = generate(
            loaded, texts, max_new_tokens=max_new_tokens, add_special_tokens=plain, progress=_named(progress)
        )
        if path is not None:
            _keep(path, key, answers)
    # generate() cuts answers where the longest prompt leaves less room
    limit = min(max_new_tokens, loaded.context - max(map(len, rows)))
    last = end if end in ends else tokenizer.eos_token_id
    found = []
    for row, answer in zip(rows, answers, strict=True):
        ended = len(answer) < limit
        if plain and len(first := first_answer(tokenizer, answer)) < len(answer):
            answer, ended = first, False
        if answer:
            found.append(OwnAnswer((*row, *answer, *([last] if ended and last is not None else [])), len(row), ended))
    if len(found) < len(rows):
        notice(
            f"the model answers nothing to {len(rows) - len(found)} of {count_of(len(rows), 'prompt')}, left out here"
        )
    return found


def first_answer(tokenizer: Any, row: Sequence[int]) -> list[int]:
    """The tokens of the first answer in a plain text.

    It ends before the next turn of the chat, or before a sentence that is written a second time.
    """
    whole = texts_of(tokenizer, [row])[0]
    text = before_next_turn(whole)
    written: set[str] = set()
    start = 0
    for stop in [*(one.end() for one in _END_OF_SENTENCE.finditer(text)), len(text)]:
        sentence = text[start:stop].strip()
        if sentence in written:
            text = text[:start].rstrip()
            break
        written |= {sentence} - {""}
        start = stop
    return list(row) if text == whole else beginning(tokenizer, row, text)


def known_texts(tokenizer: Any, texts: Sequence[str], plain: bool) -> tuple[list[str], list[list[int]]]:
    """The texts of which the tokenizer knows at least half of the tokens, and their tokens.

    Raises DataError if these are not half of the texts: such a tokenizer is not one of human language.
    """
    rows = token_ids(tokenizer, texts, plain)
    unknown = tokenizer.unk_token_id
    known = [i for i, row in enumerate(rows) if unknown is None or 2 * row.count(unknown) < len(row)]
    if 2 * len(known) < len(rows):
        raise DataError(f"the tokenizer does not know the words of {len(rows) - len(known)} of {len(rows)} prompts")
    if len(known) < len(rows):
        notice(
            f"the tokenizer does not know the words of {len(rows) - len(known)} of {count_of(len(rows), 'prompt')}, left out here"
        )
    return [texts[i] for i in known], [rows[i] for i in known]


def _rendered(tokenizer: Any, prompts: Sequence[Prompt], arguments: TemplateArguments | None) -> list[str]:
    """The prompts that the template takes, as it renders them; every second one leaves a thought to the model."""
    try:
        return _each_rendered(tokenizer, prompts, arguments)
    except DataError:
        texts: list[str] = []
        faults: list[str] = []
        for prompt in prompts:
            try:
                texts.append(render_prompt(prompt, tokenizer, None, arguments, own_thought=len(texts) % 2 == 1))
            except DataError as error:
                faults.append(str(error))
        if not texts:
            raise
        notice(f"{len(faults)} of {count_of(len(prompts), 'prompt')} left out, which cannot be rendered: {faults[0]}")
        return texts


def _each_rendered(tokenizer: Any, prompts: Sequence[Prompt], arguments: TemplateArguments | None) -> list[str]:
    texts: dict[Prompt, str] = {}
    for thinks in (False, True):
        part = dict.fromkeys(prompts[int(thinks) :: 2], "")
        texts |= render_prompts(part, tokenizer, None, arguments, own_thought=thinks) if part else {}
    return [texts[prompt] for prompt in prompts]


def _named(progress: Progress) -> Progress:
    def staged(stage: str, total: float) -> AbstractContextManager[Advance]:
        return progress("the base's own answers (kept for later runs)", total)

    return staged


def _path(key: Mapping[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode("ascii")).hexdigest()
    return cache_folder() / "own-answers" / f"{name}.json"


def _read(path: Path, key: Mapping[str, Any], count: int, vocabulary: int) -> list[list[int]] | None:
    """The answers that are kept for ``key``; None where there are none, with a notice where the file is damaged."""
    try:
        kept = parse_json(read_bytes(path, JSON_BYTES))
        check(kept, _FILE, "it")
        if kept["format"] != _FORMAT or kept["key"] != key or len(kept["answers"]) != count:
            raise ValueError("it holds the answers of another model or to other prompts")
        if any(not 0 <= token < vocabulary for answer in kept["answers"] for token in answer):
            raise ValueError("it holds tokens that the model does not have")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        notice(f"{path} is not used, and the base's own answers are generated again: {first_line(error)}")
        return None
    answers: list[list[int]] = kept["answers"]
    return answers


def _keep(path: Path, key: Mapping[str, Any], answers: Sequence[Sequence[int]]) -> None:
    content = {"format": _FORMAT, "key": key, "answers": answers}
    try:
        write_cached(path, json.dumps(content).encode("ascii"))
    except OSError as error:
        notice(
            f"the base's own answers cannot be kept in {path.parent} ({error.strerror or error}): each run generates them "
            "again. STEER2EDIT_CACHE names another folder"
        )
