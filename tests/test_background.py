"""The background of a model has its own answers in it; models that cannot write any have prose alone, and say so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROWS, run, save_chat_model

from steer2edit.architecture import read_spec
from steer2edit.capture import background as module
from steer2edit.capture.background import own_chat
from steer2edit.capture.run import capture_statistics
from steer2edit.capture.statistics import Statistics
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.contrast import Example
from steer2edit.data.prompts import Message
from steer2edit.engines.own_answers import own_answers
from steer2edit.methods import describe_data
from steer2edit.notices import collected
from steer2edit.runtime.distributed import ALONE
from steer2edit.runtime.model import LoadedModel, load_model

BEHAVIOR = Behavior(
    "short",
    [
        Example((Message("user", f"Tell me about {what}."),), answer, label, "test", row)
        for row, what in enumerate(["tea", "rain", "cats"])
        for label, answer in (("positive", "No."), ("negative", "Gladly, and at length."))  # type: ignore[list-item]
    ],
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_chat_model(tmp_path_factory.mktemp("models") / "talker"))


@pytest.fixture(scope="module")
def talker(checkpoint: Checkpoint) -> LoadedModel:
    return load_model(checkpoint, read_spec(checkpoint))


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    def few(loaded: LoadedModel, prompts: list[object], **more: object) -> object:
        return own_answers(loaded, prompts[:5], max_new_tokens=9, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "own_answers", few)


def test_the_chats_are_the_models_own_answers_and_only_their_tokens_count(
    talker: LoadedModel, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    found = capture_statistics(talker, checkpoint, BEHAVIOR, background="Rain fell on the hills. " * 20)
    answers = own_chat(talker, talker.fingerprint, ALONE)
    assert found.examples["chat"] == len(answers) == 5
    assert found.tokens["chat"] == sum(len(one.ids) - one.start for one in answers)
    site = talker.spec.sites[0]
    seen: list[torch.Tensor] = []
    handle = talker.module(site).register_forward_hook(lambda _m, args, _out: seen.append(args[0][0].double()))
    try:
        for one in answers:
            talker.body()(torch.tensor([one.ids]))
    finally:
        handle.remove()
    spans = [x[one.start - 1 : len(one.ids) - 1].mean(dim=0) for x, one in zip(seen, answers, strict=True)]
    assert torch.allclose(found.mean(site.key, "input", "chat"), torch.stack(spans).mean(dim=0), atol=1e-6)

    found.save(tmp_path / "x.stats.safetensors")
    again = Statistics.load(tmp_path / "x.stats.safetensors")
    assert again.examples == found.examples and again.source == found.source
    assert len(str(describe_data(again)["chat"])) == 64


def test_other_answers_are_another_background(talker: LoadedModel, checkpoint: Checkpoint) -> None:
    answers = own_chat(talker, talker.fingerprint, ALONE)
    one, other = (
        capture_statistics(talker, checkpoint, BEHAVIOR, background="Some text. " * 9, chat=part).source["chat"]
        for part in (answers, answers[:-1])
    )
    assert one != other
    assert (
        capture_statistics(talker, checkpoint, BEHAVIOR, background="Some text. " * 9, chat=()).source["chat"] is None
    )


def test_a_dry_run_does_without_answers_where_the_template_rejects_prompts(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "picky")
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0].content | length > 30 %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    )
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    result = run("compile", folder, "--data", data, "--dry-run", "--json", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["own_answers"] == 0


def test_a_model_that_cannot_write_answers_says_so(talker: LoadedModel, loaded: LoadedModel) -> None:
    with collected() as notices:
        assert own_chat(loaded, None, ALONE) == []
    assert any("does not know the words" in text for text in notices)
    layers = replace(talker, model=type(talker.model)(talker.model.config).to("meta"))
    with collected() as notices:
        assert own_chat(layers, None, ALONE) == []
    assert any("layer by layer" in text for text in notices)
