"""A model's own answers are greedy, generated once and kept, and a damaged cache costs nothing but time."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_chat_model

from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.prompts import Message
from steer2edit.engines import own_answers as module
from steer2edit.engines.own_answers import OwnAnswer, own_answers
from steer2edit.errors import DataError
from steer2edit.notices import collected
from steer2edit.runtime.model import LoadedModel, load_model

PROMPTS = ["What is a river?", "Name three birds.", "Why is the sky blue?", "Count to five."]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    checkpoint = open_checkpoint(save_chat_model(tmp_path_factory.mktemp("models") / "talker"))
    return load_model(checkpoint, read_spec(checkpoint))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEER2EDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "own-answers"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each generation was of."""
    counts: list[int] = []
    generate = module.generate

    def counted(loaded: LoadedModel, prompts: Any, **more: Any) -> list[list[int]]:
        counts.append(len(prompts))
        return generate(loaded, prompts, **more)

    monkeypatch.setattr(module, "generate", counted)
    return counts


def answers_of(loaded: LoadedModel, **more: Any) -> list[OwnAnswer]:
    return own_answers(loaded, PROMPTS, **{"fingerprint": loaded.fingerprint, "max_new_tokens": 8, **more})


def with_template(talker: LoadedModel, template: str | None) -> LoadedModel:
    tokenizer = copy.deepcopy(talker.tokenizer)
    tokenizer.chat_template = template
    return replace(talker, tokenizer=tokenizer)


def test_answers_are_what_the_model_likes_best_under_its_template(talker: LoadedModel, cache: Path) -> None:
    found = answers_of(talker)
    assert len(found) == len(PROMPTS)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        rendered = f"<bos>user: {prompt}\nassistant: "
        assert list(answer.ids[: answer.start]) == talker.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = talker.model(torch.tensor([answer.ids])).logits[0]
        predicted = logits[answer.start - 1 : -1].argmax(-1).tolist()
        assert predicted == list(answer.ids[answer.start :])
        assert answer.ended == (answer.ids[-1] in talker.end_tokens)
        assert answer.ended or len(answer.ids) - answer.start == 8


def test_a_second_call_generates_nothing(talker: LoadedModel, cache: Path, runs: list[int]) -> None:
    first = answers_of(talker)
    assert answers_of(talker) == first and runs == [4]
    # other prompts, limits, models, dtypes and templates have files of their own
    answers_of(talker, max_new_tokens=5)
    answers_of(talker, fingerprint="another")
    answers_of(replace(talker, model=talker.model.to(torch.bfloat16)))
    talker.model.to(torch.float32)
    answers_of(with_template(talker, talker.tokenizer.chat_template.replace("user", "USER") + " "))
    assert runs == [4] * 5 and len(list(cache.iterdir())) == 5
    answers_of(talker, fingerprint=None)
    assert runs == [4] * 6 and len(list(cache.iterdir())) == 5


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"format": "steer2edit.own-answers.1", "key": {}, "answers": [[1], [1], [1], [1]]}',
        "tokens",
        "count",
        "types",
    ],
)
def test_a_damaged_file_is_made_again(talker: LoadedModel, cache: Path, runs: list[int], content: bytes | str) -> None:
    first = answers_of(talker)
    (path,) = cache.iterdir()
    whole = json.loads(path.read_bytes())
    other: dict[str, Any] = {"tokens": [[10**6]] * 4, "count": whole["answers"][1:], "types": ["a"] * 4}
    path.write_bytes(
        content if isinstance(content, bytes) else json.dumps({**whole, "answers": other[content]}).encode()
    )
    with collected() as said:
        assert answers_of(talker) == first
    assert len(said) == 1 and "generated again" in said[0] and runs == [4, 4]
    assert json.loads(path.read_bytes()) == whole


def test_a_cache_that_cannot_be_written_costs_time_alone(
    talker: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[int]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STEER2EDIT_CACHE", str(tmp_path / "file"))
    with collected() as said:
        assert answers_of(talker) == answers_of(talker)
    assert runs == [4, 4] and sum("cannot be kept" in text for text in said) == 1


def test_prompts_that_the_template_rejects_are_left_out(talker: LoadedModel, cache: Path) -> None:
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    picky = with_template(talker, no_system + talker.tokenizer.chat_template)
    chat = (Message("system", "Be brief."), Message("user", "Hello there"))
    with collected() as said:
        found = own_answers(picky, [*PROMPTS, chat], fingerprint=None, max_new_tokens=4)
    assert len(found) == 4 and any("1 of 5 prompts left out" in text for text in said)
    with pytest.raises(DataError, match="no system"):
        own_answers(picky, [chat], fingerprint=None, max_new_tokens=4)


def test_every_second_answer_of_a_model_that_thinks_begins_with_its_thought(talker: LoadedModel, cache: Path) -> None:
    thinking = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% if enable_thinking is defined and not enable_thinking %}"
        "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
    )
    model = with_template(talker, thinking)

    def prompts(**more: Any) -> list[str]:
        found = own_answers(model, PROMPTS, fingerprint=None, max_new_tokens=2, **more)
        return [talker.tokenizer.decode(answer.ids[: answer.start]) for answer in found]

    assert ["</think>" in text for text in prompts()] == [True, False, True, False]
    assert all("</think>" in text for text in prompts(chat_template_kwargs={"enable_thinking": False}))


def test_an_answer_in_plain_text_ends_before_the_next_turn_and_before_it_repeats_itself(talker: LoadedModel) -> None:
    reader = talker.tokenizer

    def first(text: str) -> str:
        kept = module.first_answer(reader, reader(text, add_special_tokens=False)["input_ids"])
        assert module.first_answer(reader, kept) == kept
        return str(reader.decode(kept))

    assert first(" Tea. It is warm.") == " Tea. It is warm."
    assert first(" Tea.\nUser: And then?\nAssistant: Rain.") == " Tea."
    assert first(" Tea.\n\n\nAssistant: Rain.") == " Tea."
    assert first(" The User: a guide.") == " The User: a guide."
    assert first(" It rains. It snows. It rains. It pours.") == " It rains. It snows."
    assert first("\n\nAsk me.\n\nAsk me.\n\nAsk") == "\n\nAsk me."
    assert first("User: Hello?") == ""


def test_a_model_without_a_template_writes_the_first_answer_alone(
    talker: LoadedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = with_template(talker, None)
    written = {"Why?": " Rain.\nUser: Why?", "How?": " Rain. Rain. Rain.", "Who?": "\nUser: me", "When?": " Now"}

    def generate(_loaded: LoadedModel, texts: Any, **_more: Any) -> list[list[int]]:
        return [base.tokenizer(written[text], add_special_tokens=False)["input_ids"] for text in texts]

    monkeypatch.setattr(module, "generate", generate)
    with collected() as said:
        found = own_answers(base, list(written), fingerprint=None)
    texts = [base.tokenizer.decode(one.ids[one.start :]) for one in found]
    assert texts == [" Rain.", " Rain.", " Now<eos>"] and [one.ended for one in found] == [False, False, True]
    assert any("nothing to 1 of 4" in one for one in said)
