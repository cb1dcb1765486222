"""Everyday prompts: enough of them, of the same kinds in both uses, and none that another packaged file has."""

from __future__ import annotations

import importlib.resources
import json
from collections import Counter

import pytest

from steer2edit.data.contrast import EVERYDAY_FILE, behaviors, load_behavior
from steer2edit.data.everyday import everyday_prompts
from steer2edit.data.prompts import Message, prompt_digest
from steer2edit.data.questions import builtin_questions
from steer2edit.errors import DataError


def digests(use: str) -> set[str]:
    return {prompt_digest(prompt) for prompt in everyday_prompts(use)}  # type: ignore[arg-type]


def test_each_use_has_its_own_prompts() -> None:
    neutral, background = digests("neutral"), digests("background")
    assert len(neutral) == len(everyday_prompts("neutral")) == 120
    assert len(background) == len(everyday_prompts("background")) == 120
    assert not neutral & background


def test_prompts_are_single_user_messages_of_many_lengths() -> None:
    prompts = everyday_prompts("neutral") + everyday_prompts("background")
    assert all(isinstance(prompt, tuple) and len(prompt) == 1 for prompt in prompts)
    messages = [prompt[0] for prompt in prompts if isinstance(prompt[0], Message)]
    assert {message.role for message in messages} == {"user"}
    lengths = sorted(len(message.content.split()) for message in messages)
    assert lengths[0] <= 3
    assert lengths[-1] >= 120


def test_both_uses_have_the_same_kinds() -> None:
    text = (importlib.resources.files("steer2edit") / "behaviors" / EVERYDAY_FILE).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    kinds = {use: Counter(row["kind"] for row in rows if row["use"] == use) for use in ("neutral", "background")}
    assert kinds["neutral"] == kinds["background"]
    assert len(kinds["neutral"]) >= 20


@pytest.mark.parametrize("name", [*behaviors(), "knowledge"])
def test_no_everyday_prompt_is_in_another_packaged_file(name: str) -> None:
    everyday = digests("neutral") | digests("background")
    pairs = [example.prompt for example in load_behavior(name)] if name in behaviors() else []
    questions = [question.prompt for question in builtin_questions(name) or []]
    assert not everyday & {prompt_digest(prompt) for prompt in pairs + questions}


def test_another_use_is_refused() -> None:
    with pytest.raises(DataError, match=r'"both" .* neutral and background'):
        everyday_prompts("both")  # type: ignore[arg-type]
