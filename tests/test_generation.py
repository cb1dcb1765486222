"""Answers are token for token what transformers' own generate writes, whatever the family and whenever rows end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixture_models import MODELS
from test_likelihood import SLIDING, loaded_from, model_of
from wrapper_models import WRAPPERS

from steer2edit.data.tokens import token_ids
from steer2edit.engines import generation
from steer2edit.engines.generation import answered_rows, generate
from steer2edit.engines.penalty import stored_penalty
from steer2edit.errors import CheckpointError
from steer2edit.notices import collected
from steer2edit.runtime.batches import pad_left
from steer2edit.runtime.model import LoadedModel

PROMPTS = [
    "what is the cat ?",
    "the dog was",
    "why",
    "how old is the very big house of the two birds ?",
    "one two three four five",
    "User : is it red or blue ? Assistant :",
    "stone and tree and river and sun",
    "no",
    "the moon sees the fish because",
    "who eats ?",
]
TOLD = [f"System : the answer is one of the ten words that the old cat sees . {prompt}" for prompt in PROMPTS]
STEPS = 12
# rows stay to the end of their batch: their caches hold states alone, or their modules do
STAYING = {"falcon_mamba", "mamba", "mamba2", "recurrent_gemma"}
# of each kind of cache and of positions (xlstm's own generate fails on several rows)
OTHERS = ["bamba", "bloom", "falcon_h1", "gpt2", "gptj", "lfm2", "llama", "olmo_hybrid", "opt", "qwen3_5_text", "youtu"]


def reference(loaded: LoadedModel, prompts: list[str]) -> list[list[int]]:
    """All prompts in one batch of transformers' own, padded on the left; all rows stay to the end."""
    rows = token_ids(loaded.tokenizer, prompts)
    ids, mask = pad_left(rows, loaded.padding, loaded.device)
    out = loaded.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, pad_token_id=loaded.padding
    )[:, ids.shape[1] :].tolist()
    return [row[: next((i for i, t in enumerate(row) if t in loaded.end_tokens), len(row))] for row in out]


def assert_same(loaded: LoadedModel, drops: bool) -> None:
    # so many end tokens that answers end at different lengths
    loaded.model.generation_config.eos_token_id = [2, *range(40, 128, 9)]
    for prompts in (PROMPTS, TOLD):
        assert generate(loaded, prompts, max_new_tokens=STEPS) == reference(loaded, prompts)
    assert generation._dropping[loaded.model] is drops


@pytest.mark.parametrize("model_type", [*SLIDING, *OTHERS, *sorted(STAYING)])
def test_a_family_of_each_kind(model_type: str) -> None:
    assert_same(model_of(model_type), model_type not in STAYING)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_the_language_model_of_a_multimodal_one(name: str, tmp_path: Path) -> None:
    # Qwen2-VL's model keeps the positions of all rows
    assert_same(loaded_from(WRAPPERS[name](tmp_path / name)), name != "qwen2_vl")


@pytest.mark.parametrize("name", ["deepseek_v32", "granitemoehybrid", "jamba", "mixtral", "qwen3_next"])
def test_a_mixture(name: str, tmp_path: Path) -> None:
    assert_same(loaded_from(MODELS[name](tmp_path / name)), name not in STAYING)


@pytest.mark.parametrize("model_type", ["gemma3_text", "mistral"])
def test_windows_shorter_than_the_prompt(model_type: str) -> None:
    assert_same(model_of(model_type, sliding_window=4, num_hidden_layers=4), True)


def batch_sizes(loaded: LoadedModel, **settings: Any) -> tuple[list[list[int]], list[int]]:
    """Answers, and how many rows each of the unembedding's passes had; they lie one behind the other in memory."""
    sizes = []

    def see(_module: Any, inputs: tuple[torch.Tensor], _output: Any) -> None:
        assert inputs[0].is_contiguous()
        sizes.append(len(inputs[0]))

    handle = loaded.model.get_output_embeddings().register_forward_hook(see)
    try:
        return generate(loaded, PROMPTS, **settings), sizes
    finally:
        handle.remove()


def test_rows_that_ended_are_worked_on_no_longer() -> None:
    loaded = model_of("llama")
    loaded.model.generation_config.eos_token_id = [2, *range(40, 128, 9)]
    generate(loaded, PROMPTS, max_new_tokens=2)  # the trial is over
    answers, sizes = batch_sizes(loaded, max_new_tokens=STEPS)
    lengths = [len(answer) for answer in answers]
    assert len({*lengths}) > 2
    # of ten rows each makes the batch smaller as soon as it ends
    alive = [sum(length >= step for length in lengths) for step in range(max(lengths) + 1)]
    assert sizes == [*alive][: len(sizes)]
    assert sizes[0] == len(PROMPTS) > sizes[-1]
    assert len(loaded.model.get_output_embeddings()._forward_pre_hooks) == 0


@pytest.mark.parametrize(("model_type", "once"), [("llama", True), ("gemma3_text", False)])
def test_what_all_prompts_begin_with_is_read_once(model_type: str, once: bool) -> None:
    loaded = model_of(model_type)
    generate(loaded, PROMPTS, max_new_tokens=2)  # the trial is over
    shapes: list[tuple[int, ...]] = []
    module = loaded.model.get_input_embeddings()
    handle = module.register_forward_hook(lambda _module, inputs, _output: shapes.append(tuple(inputs[0].shape)))
    try:
        answers = generate(loaded, TOLD, max_new_tokens=STEPS)
    finally:
        handle.remove()
    rows = token_ids(loaded.tokenizer, TOLD)
    head = generation._shared(rows)
    longest = max(map(len, rows))
    assert head > 10
    # Gemma's windows would count what fills rows up
    assert shapes[:2] == [(1, head), (len(TOLD), longest - head if once else longest)]
    assert answers == reference(loaded, TOLD)


def test_batches_and_their_order_change_no_answer() -> None:
    loaded = model_of("llama")
    loaded.model.generation_config.eos_token_id = [2, *range(40, 128, 9)]
    whole = generate(loaded, PROMPTS, max_new_tokens=STEPS)
    assert generate(loaded, PROMPTS, max_new_tokens=STEPS, batch_size=3) == whole
    assert generate(loaded, PROMPTS[::-1], max_new_tokens=STEPS) == whole[::-1]
    assert [generate(loaded, [prompt], max_new_tokens=STEPS)[0] for prompt in PROMPTS] == whole
    assert generate(loaded, [], max_new_tokens=STEPS) == []


def test_a_cache_that_cannot_go_on_is_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache

    def fail(*_arguments: Any) -> None:
        raise RuntimeError("not today")

    loaded = model_of("llama")
    expected = reference(loaded, PROMPTS)
    monkeypatch.setattr(DynamicCache, "reorder_cache", fail)
    with collected() as notices:
        assert generate(loaded, PROMPTS, max_new_tokens=STEPS) == expected
    (text,) = notices
    assert "LlamaForCausalLM works on answers that have ended" in text and "not today" in text


def test_a_cache_that_takes_the_wrong_rows_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache

    right = DynamicCache.reorder_cache
    loaded = model_of("llama")
    expected = reference(loaded, PROMPTS)
    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda cache, rows: right(cache, rows.flip(0)))
    with collected() as notices:
        assert generate(loaded, PROMPTS, max_new_tokens=STEPS) == expected
    assert "log-probabilities would differ" in notices[0]


def test_settings_that_count_from_the_start_keep_all_rows() -> None:
    loaded = model_of("llama")
    loaded.model.generation_config.eos_token_id = [2, *range(40, 128, 9)]
    loaded.model.generation_config.min_new_tokens = 5
    expected = reference(loaded, PROMPTS)
    with collected() as notices:
        assert generate(loaded, PROMPTS, max_new_tokens=STEPS) == expected
    assert "its generation_config sets min_new_tokens" in notices[0]


@pytest.mark.parametrize("end_token_fills_up", [False, True])
def test_a_repetition_penalty_is_transformers_own_whatever_fills_rows_up(end_token_fills_up: bool) -> None:
    loaded = model_of("llama")
    config = loaded.model.generation_config
    config.eos_token_id = [2, *range(40, 128, 9)]
    if end_token_fills_up:
        loaded.tokenizer.pad_token_id = 40
        assert loaded.padding in loaded.end_tokens
    plain = generate(loaded, PROMPTS, max_new_tokens=STEPS)
    config.repetition_penalty = 1.3
    # alone in its batch no row is filled up
    expected = [answer for prompt in PROMPTS for answer in reference(loaded, [prompt])]
    assert generate(loaded, PROMPTS, max_new_tokens=STEPS) == expected != plain
    assert len({len(row) for row in expected}) > 1
    rows = token_ids(loaded.tokenizer, PROMPTS)
    assert [row for _, row in sorted(answered_rows(loaded, rows, STEPS, 256, penalty=1.0))] == plain
    config.repetition_penalty = None
    assert [row for _, row in sorted(answered_rows(loaded, rows, STEPS, 256, penalty=1.3))] == expected


@pytest.mark.parametrize("value", ["high", True, 0, -1.0, float("nan")])
def test_a_penalty_that_is_none_is_named(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"repetition_penalty of generation_config\.json"):
        stored_penalty(value)
