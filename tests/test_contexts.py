"""Rows, windows and answers are no longer than the model's context, and hold no token that the model does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_chat_model, save_tiny

from steer2edit.architecture import read_spec
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.contrast import Example
from steer2edit.data.questions import Question
from steer2edit.data.tokens import encode
from steer2edit.engines.generation import generate
from steer2edit.errors import CheckpointError, DataError
from steer2edit.evaluation.metrics import Preference
from steer2edit.notices import collected
from steer2edit.runtime.model import LoadedModel, load_model
from steer2edit.strength.kl import NeutralText

CONTEXT = 64
TEXT = "the river runs to the sea and the old house is by the stone . " * 30
PAIR = [Example("is it", text, label, "here", 0) for text, label in (("yes " * 40, "positive"), ("no", "negative"))]  # type: ignore[arg-type]


def positions(kind: str) -> Any:
    """A config whose position embeddings end at CONTEXT: past it such a model has no answer, not even a bad one."""
    from transformers import AutoConfig

    sizes = {
        "gpt2": {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2},
        "opt": {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    }[kind]
    return AutoConfig.for_model(kind, vocab_size=260, max_position_embeddings=CONTEXT, **sizes)


@pytest.fixture(scope="module", params=["gpt2", "opt"])
def short(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp(request.param)
    save_chat_model(folder)
    tokenizer = {
        path: path.read_bytes() for path in folder.iterdir() if "token" in path.name or path.suffix == ".jinja"
    }
    save_tiny(folder, positions(request.param))
    for path, content in tokenizer.items():
        path.write_bytes(content)
    checkpoint = open_checkpoint(folder)
    return load_model(checkpoint, read_spec(checkpoint))


def test_rows_and_windows_end_at_the_context(short: LoadedModel, tmp_path: Path) -> None:
    assert short.context == CONTEXT
    assert short.folder is not None
    checkpoint = open_checkpoint(short.folder)
    statistics = capture_statistics(short, checkpoint, Behavior("b", PAIR, span="response"), background=TEXT)
    assert max(statistics.tokens.values()) > 0
    assert max(len(one.ids) for one in Behavior("b", PAIR, span="response").encode(short.tokenizer, CONTEXT)) == CONTEXT
    assert NeutralText(short, TEXT, window=500).measure().kl == pytest.approx(0, abs=1e-6)
    questions = [Question("is it", "here", "yes " * 40, "no " * 50)]
    assert Preference(questions).measure(short).samples["margin"].values


def test_answers_end_at_the_context(short: LoadedModel) -> None:
    with collected() as notes:
        (row,) = generate(short, ["a" * 40], max_new_tokens=100, add_special_tokens=False)
    assert len(row) <= CONTEXT - 40
    assert notes == [f"answers have at most {CONTEXT - 40} tokens and not 100: the model's context is {CONTEXT}"]
    with pytest.raises(DataError, match=f"a prompt takes 80 tokens and the model's context is {CONTEXT}"):
        generate(short, ["a" * 80], add_special_tokens=False)


def test_a_long_prompt_is_named_once_with_what_helps(short: LoadedModel) -> None:
    rows = [
        Example("long " * 40, text, label, "x.jsonl line 2", 1)
        for text, label in (("a", "positive"), ("b", "negative"))
    ]  # type: ignore[arg-type]
    with pytest.raises(
        DataError, match=r"line 2: the prompt alone takes \d+ tokens and the limit is 64: the model reads no"
    ) as first:
        encode([*PAIR, *rows], short.tokenizer, context=CONTEXT)
    with pytest.raises(DataError, match="the limit is 50: shorten it, or raise --max-tokens") as second:
        encode([*PAIR, *rows], short.tokenizer, max_tokens=50, context=5000)
    assert all(str(error.value).count("line 2") == 1 for error in (first, second))
    assert len(encode(rows, short.tokenizer, max_tokens=5000, context=5000)) == 2


def test_tokens_past_the_vocabulary_are_named(short: LoadedModel) -> None:
    strange = "<|late|>"
    tokenizer = short.tokenizer.__class__.from_pretrained(short.folder)
    tokenizer.add_tokens(["<|fits|>", strange], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    late = LoadedModel(short.model, tokenizer, short.spec, short.folder)
    assert late.padding == 0 and len(tokenizer) > late.vocabulary == 260
    assert generate(late, ["is it", "what is it"], max_new_tokens=3) == generate(
        short, ["is it", "what is it"], max_new_tokens=3
    )
    told = (
        r"tokens without an embedding in the model: 26\d \(\"<\|late\|>\"\); the model has 260 and the tokenizer 26\d"
    )
    assert short.folder is not None
    pair = [Example("is it", f"{strange} {e.response}", e.label, "here", 0) for e in PAIR]
    with pytest.raises(CheckpointError, match=told):
        capture_statistics(late, open_checkpoint(short.folder), Behavior("b", pair), background=TEXT)
    with pytest.raises(CheckpointError, match=told):
        NeutralText(late, f"{strange} {TEXT}", window=20)
    with pytest.raises(CheckpointError, match=told):
        generate(late, [strange])
    with pytest.raises(CheckpointError, match=told):
        Preference([Question("is it", "here", strange, "no")]).measure(late)
    assert torch.equal(short.model.get_input_embeddings().weight, late.model.get_input_embeddings().weight)
