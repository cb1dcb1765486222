"""Reading a prompt once for all its responses gives what reading it for each of them gives, whatever the family."""

from __future__ import annotations

import functools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from family_configs import family_config
from mixture_models import MIXTURE_TYPES, MODELS
from test_families import CAUSAL
from wrapper_models import WRAPPERS

from steer2edit.data.tokens import Encoded
from steer2edit.evaluation import likelihood
from steer2edit.evaluation.likelihood import response_log_probabilities
from steer2edit.notices import collected
from steer2edit.runtime.cache import cache_parameter, more_than_rounding, returned_cache
from steer2edit.runtime.model import LoadedModel, load_weights

SLIDING = ["cohere2", "gemma2", "gemma3_text", "gpt_oss", "mistral", "olmo3", "starcoder2"]
# beside attention's keys and values, or in their place, these keep states that several responses cannot take up
OTHER_STATES = {
    *("bailing_hybrid", "deepseek_v32", "glm_moe_dsa", "granitemoehybrid", "jamba", "lfm2_moe"),
    *("nemotron_h", "qwen3_5_text", "olmo_hybrid", "lfm2", "lfm3", "bamba", "falcon_h1", "recurrent_gemma", "mamba"),
    *("mamba2", "falcon_mamba", "qwen3_5_moe_text", "qwen3_next", "xlstm"),
    # these keep what their token selection needs
    *("axk2", "dots3_note_text", "lara_mini", "minimax_m3_vl_text"),
}
CHANGES: dict[str, dict[str, Any]] = {"minicpm3": {"num_key_value_heads": 4}}


def model_of(model_type: str, **changes: Any) -> LoadedModel:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = family_config(model_type, **CHANGES.get(model_type, {}), **changes)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, 1 / parameter.shape[-1] ** 0.5)
    return LoadedModel(model, make_tokenizer(), None)  # type: ignore[arg-type]


def loaded_from(folder: Path) -> LoadedModel:
    return LoadedModel(load_weights(folder), make_tokenizer(), None)  # type: ignore[arg-type]


def questions(count: int = 6, head: int = 9) -> list[Encoded]:
    """Prompts of 12 to 17 tokens, ``head`` of them the same for all, with two to four responses of one to five tokens."""
    draw = torch.Generator().manual_seed(1)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 70, (n,), generator=draw).tolist())

    found = []
    shared = (1, *tokens(head - 1)) if head else ()
    for row in range(count):
        prompt = (*shared, *tokens(12 - head + row))
        found += [
            Encoded((*prompt, *tokens(1 + (row + i) % 5)), len(prompt), "positive", row) for i in range(2 + row % 3)
        ]
    return found


def assert_same(loaded: LoadedModel, examples: list[Encoded]) -> None:
    """All three ways: by the model's own logits, example by example; in batches; with what is shared read once."""
    with torch.inference_mode():
        logits = [loaded.model(input_ids=torch.tensor([e.ids]), use_cache=False).logits[0].double() for e in examples]
    own = [
        row[e.start - 1 : -1].log_softmax(1).gather(1, torch.tensor(e.ids[e.start :])[:, None])[:, 0]
        for row, e in zip(logits, examples, strict=True)
    ]
    plain = response_log_probabilities(loaded, examples, share=False)
    shared = response_log_probabilities(loaded, examples)
    assert [len(one) for one in shared] == [len(e.ids) - e.start for e in examples]
    assert torch.allclose(torch.cat(plain), torch.cat(own), atol=2e-4)
    assert torch.allclose(torch.cat(shared), torch.cat(own), atol=2e-4)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_shared_prompt_changes_no_value(model_type: str) -> None:
    loaded = model_of(model_type)
    assert_same(loaded, questions())
    assert likelihood._continuing[loaded.model] is (model_type not in OTHER_STATES)


# PaliGemma reads its whole text in both directions
@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "paligemma"])
def test_nor_in_the_language_model_of_a_multimodal_one(name: str, tmp_path: Path) -> None:
    assert_same(loaded_from(WRAPPERS[name](tmp_path / name)), questions())


# Kimi Linear takes seconds a row without its kernels
@pytest.mark.parametrize("name", [name for name in MIXTURE_TYPES if name != "kimi_linear"])
def test_nor_in_a_mixture_and_other_states_than_attentions_are_not_shared(name: str, tmp_path: Path) -> None:
    loaded = loaded_from(MODELS[name](tmp_path / name))
    assert_same(loaded, questions())
    assert likelihood._continuing[loaded.model] is (name not in OTHER_STATES)


@pytest.mark.parametrize("model_type", SLIDING)
def test_windows_shorter_than_the_prompt_change_nothing(model_type: str) -> None:
    loaded = model_of(model_type, sliding_window=4, num_hidden_layers=4)
    assert_same(loaded, questions())
    assert likelihood._continuing[loaded.model]


def test_with_nothing_to_share_and_with_everything(loaded: LoadedModel) -> None:
    assert_same(loaded, questions(head=0))
    assert_same(loaded, questions(count=1))
    alone = [Encoded(example.ids, example.start, "positive", row) for row, example in enumerate(questions(head=0))]
    assert_same(loaded, alone)
    # a response that begins at once has no prompt to be shared
    assert_same(loaded, [*questions(), Encoded((1, 30, 31), 1, "positive", 99)])
    # responses that begin alike are still scored whole
    first, second, *_ = questions()
    same = Encoded((*first.ids, 40), first.start, "positive", first.row)
    assert_same(loaded, [first, same, second] * 3)


def test_fewer_tokens_are_run_where_a_prompt_is_shared(loaded: LoadedModel) -> None:
    examples = questions(count=24)
    run = []
    hook = loaded.body().register_forward_pre_hook(
        lambda _module, _args, kwargs: run.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        likelihood._continuing[loaded.model] = True
        response_log_probabilities(loaded, examples)
        shared = sum(run)
        run.clear()
        response_log_probabilities(loaded, examples, share=False)
    finally:
        hook.remove()
    assert shared < 0.6 * sum(run)


def test_the_cache_has_the_name_that_the_forward_gives_it() -> None:
    def older(input_ids: Any, past_key_values: Any = None) -> None: ...
    def newer(input_ids: Any, cache: Any = None) -> None: ...
    def without(input_ids: Any, **kwargs: Any) -> None: ...

    @functools.wraps(newer)
    def renaming(*args: Any, **kwargs: Any) -> None: ...

    names = [cache_parameter(forward) for forward in (older, newer, renaming, without)]
    assert names == ["past_key_values", "cache", "cache", None]
    assert returned_cache(OrderedDict(last_hidden_state=1, past_key_values=2)) == 2
    assert returned_cache(OrderedDict(last_hidden_state=1, cache=3)) == 3
    assert returned_cache((1, 2)) is None


@pytest.mark.parametrize(
    ("dtype", "difference", "more"),
    [
        *((torch.float32, difference, more) for difference, more in ((1e-4, False), (0.01, True))),
        # SmolLM2's own: of one prompt read both ways, and with the cache of another one
        *((torch.bfloat16, difference, more) for difference, more in ((0.109, False), (3.28, True))),
    ],
)
def test_rounding_is_told_from_a_wrong_cache(dtype: torch.dtype, difference: float, more: bool) -> None:
    assert more_than_rounding(difference, dtype) is more


def test_an_error_that_is_not_about_the_cache_is_raised(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def deprecated(*_args: Any) -> None:
        raise FutureWarning("renamed")

    likelihood._continuing.pop(loaded.model, None)
    monkeypatch.setattr(likelihood, "_shared", deprecated)
    with pytest.raises(FutureWarning, match="renamed"):
        response_log_probabilities(loaded, questions())
    assert loaded.model not in likelihood._continuing


def test_that_prompts_are_not_shared_is_told_once_with_the_reason() -> None:
    loaded = model_of("mamba")
    with collected() as notices:
        response_log_probabilities(loaded, questions())
        response_log_probabilities(loaded, questions())
    (text,) = notices
    assert text.startswith("MambaForCausalLM reads each response with its whole prompt") and "keys and values" in text


def test_a_cache_that_cannot_be_continued_is_told_with_its_error(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: Any) -> None:
        raise RuntimeError("sizes differ\nmore")

    likelihood._continuing.pop(loaded.model, None)
    monkeypatch.setattr(likelihood, "_shared", broken)
    with collected() as notices:
        response_log_probabilities(loaded, questions())
    assert likelihood._continuing.pop(loaded.model) is False
    assert [text.partition("sharing prompts: ")[2] for text in notices] == [
        "its cache cannot be continued (RuntimeError: sizes differ)"
    ]
