"""Prompts that are labelled by the model's own answers, and experts ranked over prompts by such labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from data_folders import write_data_folder
from fake_engine import FakeEngine
from mixture_models import MODELS

from steer2edit.data.behavior import Behavior
from steer2edit.data.contrast import Example
from steer2edit.data.data_folder import TRAIN
from steer2edit.data.metric_choice import MetricChoice
from steer2edit.data.prompts import Message
from steer2edit.engines.engine import Answer, Request, Sampling
from steer2edit.errors import DataError
from steer2edit.experts import own_labels as module
from steer2edit.experts.own_labels import LEAST, own_labels
from steer2edit.files.layout import PLAN

TOPICS = ("cat", "dog", "house", "tree", "river", "stone", "bread", "light")
PROMPTS = [f"the {topic} is {place}" for topic in TOPICS for place in ("here", "there")]
ROWS = [{"prompt": prompt, "positive": "yes", "negative": "no it is not at all"} for prompt in PROMPTS]
LENGTH = MetricChoice("length", "less")


class ByPrompt(FakeEngine):
    """Answers briefly what speaks of "here", loops on one prompt, and keeps what it was asked."""

    asked: list[Request]

    def write(self, requests: Sequence[Request], sampling: Sampling, *more: Any) -> Iterator[tuple[int, Answer]]:
        self.asked = list(requests)
        return super().write(requests, sampling, *more)

    def answer(self, request: Request, _sampling: Sampling) -> Answer:
        told = request.messages[-1].content
        if told == PROMPTS[-1]:
            return Answer("and on it goes " * 30, 120, False)
        text = "in brief" if told.endswith(" here") else "it is a long story of many words"
        return Answer(text, len(text.split()), True)


def behavior(metric: MetricChoice | None = LENGTH, rows: Sequence[dict[str, str]] = ROWS) -> Behavior:
    examples = [
        Example((Message("user", row["prompt"]),), row[label], label, f"row {i}", i)
        for i, row in enumerate(rows)
        for label in ("positive", "negative")
    ]
    return Behavior("brief", examples, metric=metric)


def test_a_prompt_has_the_label_of_the_answer_to_it() -> None:
    engine = ByPrompt()
    found = own_labels(behavior(), engine, Sampling())
    # the middle between 1 and 6 words
    assert found.bound == 3.5 and found.left_out == 1
    labels = {example.prompt[0].content: example.label for example in found.examples}  # type: ignore[union-attr]
    assert labels == {p: "positive" if p.endswith("here") and "there" not in p else "negative" for p in PROMPTS[:-1]}
    # each prompt is asked once, plainly
    assert [request.messages for request in engine.asked] == [(Message("user", prompt),) for prompt in PROMPTS]
    assert "8 show the behaviour (length under 3.5) and 7 do not; 1 are empty" in str(found)


def test_what_cannot_be_labelled_is_refused() -> None:
    with pytest.raises(DataError, match="has the metric margin, which no written answer has"):
        own_labels(behavior(MetricChoice("margin", "more")), ByPrompt(), Sampling())
    with pytest.raises(DataError, match="names no metric"):
        own_labels(behavior(None), ByPrompt(), Sampling())
    with pytest.raises(DataError, match="expected more in the positive ones"):
        own_labels(behavior(MetricChoice("length", "more")), ByPrompt(), Sampling())
    with pytest.raises(DataError, match=rf"4 show the behaviour .* expected {LEAST} prompts or more"):
        own_labels(behavior(rows=ROWS[:8]), ByPrompt(), Sampling())


def test_experts_are_ranked_over_prompts_as_by_data_with_these_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS["qwen3_moe"](tmp_path / "model")
    folder = write_data_folder(tmp_path / "data", train=ROWS, metric=LENGTH.described())
    engine = ByPrompt()
    monkeypatch.setattr("steer2edit.engines.opening.open_engine", lambda **_: engine)
    stats = tmp_path / "own.stats.safetensors"
    made = run("experts", "profile", model, "--data", folder, "--labels", "response", "-o", stats, "--json")
    assert made.exit_code == 0, made.output
    assert "7 do not" in made.stderr
    own = json.loads(made.stdout)
    assert own["scope"] == "prompt"
    # the same labels as data
    found = own_labels(Behavior.from_data(folder), engine, Sampling())
    rows = [
        {"prompt": [m._asdict() for m in e.prompt], "response": e.response, "label": e.label}  # type: ignore[union-attr]
        for e in found.examples
    ]
    (tmp_path / TRAIN).write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = run(
        "experts", "profile", model, "--data", tmp_path / TRAIN, "--scope", "prompt", "-o",
        tmp_path / "said.stats.safetensors", "--json",
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["ranking"] == own["ranking"]
    assert any(abs(one["difference"]) > 0.01 for one in own["ranking"])
    # the statistics know that prompts are compared, and masks are made by them
    shown = run("experts", "show", stats, "--json")
    assert shown.exit_code == 0 and json.loads(shown.stdout)["scope"] == "prompt"
    masked = run(
        "experts", "mask", model, "--stats", stats, "--top", 1, "--min-stability", 0, "--how", "zero", "--no-measure",
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert masked.exit_code == 0, masked.output
    assert module.SOURCE in (tmp_path / "out" / PLAN).read_bytes().decode("latin-1")
