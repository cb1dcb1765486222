"""Everyday prompts: enough of them, of the kinds that each use needs, and none that another packaged file has."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections import Counter
from types import SimpleNamespace
from typing import get_args

import pytest

from steer2edit.data.behavior_file import behavior_files, open_behavior
from steer2edit.data.everyday import EVERYDAY_FILE, Use, as_asked, everyday_prompts
from steer2edit.data.prompts import Message, Prompt, prompt_digest, prompt_text
from steer2edit.data.questions import knowledge_questions
from steer2edit.errors import DataError

USES = get_args(Use)


def digests(use: str) -> set[str]:
    return {prompt_digest(prompt) for prompt in everyday_prompts(use)}  # type: ignore[arg-type]


def content(prompt: Prompt) -> frozenset[str]:
    """The words that say what a prompt is about: those of more than four letters."""
    return frozenset(re.findall(r"\w{5,}", prompt_text(prompt).lower()))


def kinds() -> dict[str, Counter[str]]:
    text = (importlib.resources.files("steer2edit") / "behaviors" / EVERYDAY_FILE).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return {use: Counter(row["kind"] for row in rows if row["use"] == use) for use in USES}


def test_each_use_has_its_own_prompts() -> None:
    for use, number in zip(USES, (120, 120, 200), strict=True):
        assert len(digests(use)) == len(everyday_prompts(use)) == number
    assert len(set[str]().union(*map(digests, USES))) == 440


def test_no_two_prompts_of_the_pairs_use_or_of_another_one_ask_nearly_the_same() -> None:
    others = [content(prompt) for use in ("neutral", "background") for prompt in everyday_prompts(use)]  # type: ignore[arg-type]
    for prompt in everyday_prompts("pairs"):
        words = content(prompt)
        assert all(len(words & other) <= 0.6 * len(words | other) for other in others), prompt
        others.append(words)


@pytest.mark.parametrize("uses", [("neutral", "background"), ("pairs",)])
def test_prompts_are_single_user_messages_of_many_lengths(uses: tuple[Use, ...]) -> None:
    prompts = [prompt for use in uses for prompt in everyday_prompts(use)]
    assert all(isinstance(prompt, tuple) and len(prompt) == 1 for prompt in prompts)
    messages = [prompt[0] for prompt in prompts if isinstance(prompt[0], Message)]
    assert {message.role for message in messages} == {"user"}
    lengths = sorted(len(message.content.split()) for message in messages)
    assert lengths[0] <= 3
    assert lengths[-1] >= 120


def test_neutral_and_background_have_the_same_kinds() -> None:
    assert kinds()["neutral"] == kinds()["background"]
    assert len(kinds()["neutral"]) >= 20


def test_prompts_to_make_pairs_from_are_varied() -> None:
    found = kinds()["pairs"]
    assert len(found) >= 20 and max(found.values()) <= 14
    assert {"opinion", "feelings", "review", "situation", "other language"} <= set(found)


@pytest.mark.parametrize("name", [*behavior_files(), "knowledge"])
def test_no_everyday_prompt_is_in_another_packaged_file(name: str) -> None:
    everyday = set[str]().union(*map(digests, USES))
    if name == "knowledge":
        prompts = [question.prompt for question in knowledge_questions()]
    else:
        file = open_behavior(name)
        prompts = [one.prompt for one in (*file.read_pairs(), *file.read_questions())]
    assert not everyday & {prompt_digest(prompt) for prompt in prompts}


def test_another_use_is_refused() -> None:
    with pytest.raises(DataError, match=r'"both" .* neutral, background, pairs'):
        everyday_prompts("both")  # type: ignore[arg-type]


def test_without_a_template_every_second_prompt_is_a_text_to_go_on_with() -> None:
    prompts = everyday_prompts("neutral")
    plain = as_asked(prompts, SimpleNamespace(chat_template=None))
    assert [isinstance(one, str) for one in plain] == [i % 2 == 0 for i in range(len(prompts))]
    assert [prompt_digest(one) for one in plain] == [prompt_digest(one) for one in prompts]
    assert as_asked(prompts, SimpleNamespace(chat_template="{{ messages }}")) == prompts
