"""Moments do not depend on batching or order; merging is exact; files round-trip."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS

from steer2edit import contrast
from steer2edit.architecture import read_spec
from steer2edit.capture import capture
from steer2edit.checkpoint import open_checkpoint
from steer2edit.encoding import Encoded, encode
from steer2edit.errors import PlanError
from steer2edit.model import LoadedModel, batches, load_model
from steer2edit.statistics import LABELS, Statistics


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> LoadedModel:
    checkpoint = open_checkpoint(tiny_llama)
    return load_model(checkpoint, read_spec(checkpoint))


@pytest.fixture(scope="module")
def encoded(loaded: LoadedModel) -> list[Encoded]:
    examples = [
        contrast.Example(row["prompt"], row[label], label, "test", index)
        for index, row in enumerate(ROWS)
        for label in LABELS
    ]
    return encode(examples, loaded.tokenizer)


def close(a: Statistics, b: Statistics) -> bool:
    return a.examples == b.examples and all(
        torch.allclose(a.moments[key].mean, b.moments[key].mean, atol=1e-6)
        and torch.allclose(a.moments[key].m2, b.moments[key].m2, atol=1e-6)
        for key in a.moments.keys() | b.moments.keys()
    )


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_batching_and_order_do_not_matter(loaded: LoadedModel, encoded: list[Encoded], batch_tokens: int) -> None:
    shuffled = random.Random(batch_tokens).sample(encoded, len(encoded))
    assert close(capture(loaded, encoded), capture(loaded, shuffled, batch_tokens=batch_tokens))


def test_moments_are_those_of_a_plain_loop(loaded: LoadedModel, encoded: list[Encoded]) -> None:
    found = capture(loaded, encoded)
    inputs: dict[str, list[torch.Tensor]] = {label: [] for label in LABELS}
    module = loaded.module(loaded.spec.site("mlp_out.1"))
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _m, args, _out: seen.append(args[0][0]))
    for example in encoded:
        loaded.model(torch.tensor([example.ids]))
        inputs[example.label].append(seen.pop()[example.start - 1 : len(example.ids) - 1].double())
    handle.remove()
    for label in LABELS:
        mean = torch.stack([x.mean(0) for x in inputs[label]]).mean(0)
        m2 = torch.stack([x.square().mean(0) for x in inputs[label]]).mean(0)
        assert torch.allclose(found.mean("mlp_out.1", "input", label), mean, atol=1e-6)
        assert torch.allclose(found.moments["mlp_out.1", "input", label].m2, m2, atol=1e-6)


def test_the_stream_is_the_embedding_plus_what_the_writers_wrote(loaded: LoadedModel, encoded: list[Encoded]) -> None:
    found = capture(loaded, encoded)
    for layer in range(1, loaded.spec.layers):
        written = sum(found.difference(f"{role}.{layer}") for role in ("attn_out", "mlp_out"))
        step = found.difference(f"residual.{layer}") - found.difference(f"residual.{layer - 1}")
        assert torch.allclose(written, step, atol=1e-5)


def test_merging_halves_gives_the_whole(loaded: LoadedModel, encoded: list[Encoded]) -> None:
    whole = capture(loaded, encoded)
    assert close(capture(loaded, encoded[:5]).merge(capture(loaded, encoded[5:])), whole)


def test_statistics_of_other_models_do_not_merge(loaded: LoadedModel, encoded: list[Encoded]) -> None:
    one, other = (capture(loaded, encoded[:2], source={"fingerprint": name}) for name in "ab")
    with pytest.raises(PlanError, match="different models"):
        one.merge(other)


def test_a_file_holds_them_exactly(tiny_llama: Path, statistics_of: Callable[..., Any], tmp_path: Path) -> None:
    statistics = statistics_of(tiny_llama)
    statistics.save(tmp_path / "x.stats.safetensors")
    again = Statistics.load(tmp_path / "x.stats.safetensors")
    assert again.source == statistics.source and again.tokens == statistics.tokens
    assert all(torch.equal(again.moments[key].mean, statistics.moments[key].mean) for key in statistics.moments)


def test_other_files_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    for path in (tmp_path / "text", tmp_path / "missing", tiny_llama / "model.safetensors"):
        with pytest.raises(PlanError):
            Statistics.load(path)


def test_the_unembedding_is_not_computed(loaded: LoadedModel, encoded: list[Encoded]) -> None:
    def fail(*_args: object) -> None:
        raise AssertionError("the unembedding ran")

    handle = loaded.model.get_output_embeddings().register_forward_hook(fail)
    try:
        capture(loaded, encoded[:2])
    finally:
        handle.remove()


def test_batches_hold_every_index_once_and_keep_the_budget() -> None:
    lengths = [random.Random(1).randrange(1, 60) for _ in range(200)]
    found = batches(lengths, 128)
    assert sorted(index for batch in found for index in batch) == list(range(200))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 128 for batch in found)
    assert batches([500], 128) == [[0]]
