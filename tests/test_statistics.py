"""Moments do not depend on batching or order; merging is exact; files round-trip."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS

from steer2edit.architecture import read_spec
from steer2edit.capture.populations import OTHERS, POPULATIONS
from steer2edit.capture.run import capture
from steer2edit.capture.statistics import Statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data import contrast
from steer2edit.data.answers import LABELS
from steer2edit.data.tokens import Encoded, encode
from steer2edit.errors import PlanError
from steer2edit.files.atomic import load_tensors
from steer2edit.methods import make_plan
from steer2edit.runtime.batches import batches
from steer2edit.runtime.model import LoadedModel
from steer2edit.scoring.scores import Scoring


@pytest.fixture(scope="module")
def encoded(loaded: LoadedModel) -> list[Encoded]:
    examples = [
        contrast.Example(row["prompt"], row[label], label, "test", index)
        for index, row in enumerate(ROWS)
        for label in LABELS
    ]
    background = [Encoded(tuple(range(4, 12 + i)), 1, "background", i) for i in range(3)]
    chats = [Encoded(tuple(range(20, 30 + i)), 4, "chat", i) for i in range(2)]
    keep = [Encoded(tuple(range(9, 16 + i)), 2, "keep", i) for i in range(2)]
    return [*encode(examples, loaded.tokenizer), *background, *chats, *keep]


def close(a: Statistics, b: Statistics) -> bool:
    pairs = [(a.moments[key].mean, b.moments[key].mean) for key in a.moments.keys() | b.moments.keys()]
    pairs += [(a.moments[key].m2, b.moments[key].m2) for key in a.moments]
    pairs += [(a.blocks[key], b.blocks[key]) for key in a.blocks.keys() | b.blocks.keys()]
    pairs += [(a.resampled[key].means, b.resampled[key].means) for key in a.resampled.keys() | b.resampled.keys()]
    pairs += [(a.weights[kind], b.weights[kind]) for kind in a.weights.keys() | b.weights.keys()]
    return a.examples == b.examples and all(torch.allclose(mine, theirs, atol=1e-5) for mine, theirs in pairs)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_batching_and_order_do_not_matter(loaded: LoadedModel, encoded: list[Encoded], batch_tokens: int) -> None:
    shuffled = random.Random(batch_tokens).sample(encoded, len(encoded))
    assert close(capture(loaded, encoded), capture(loaded, shuffled, batch_tokens=batch_tokens))


def test_moments_are_those_of_a_plain_loop(loaded: LoadedModel, encoded: list[Encoded]) -> None:
    found = capture(loaded, encoded)
    inputs: dict[str, list[torch.Tensor]] = {population: [] for population in POPULATIONS}
    module = loaded.module(loaded.spec.site("attn_out.1"))
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _m, args, _out: seen.append(args[0][0]))
    for example in encoded:
        loaded.model(torch.tensor([example.ids]))
        inputs[example.label].append(seen.pop()[example.start - 1 : len(example.ids) - 1].double())
    handle.remove()
    for population in POPULATIONS:
        mean = torch.stack([x.mean(0) for x in inputs[population]]).mean(0)
        m2 = torch.stack([x.square().mean(0) for x in inputs[population]]).mean(0)
        assert torch.allclose(found.mean("attn_out.1", "input", population), mean, atol=1e-6)
        assert torch.allclose(found.moments["attn_out.1", "input", population].m2, m2, atol=1e-6)
    heads = loaded.spec.site("attn_out.1").components
    for source, populations in (("contrast", LABELS), *((other, (other,)) for other in OTHERS)):
        rows = [x.view(len(x), heads, -1) for population in populations for x in inputs[population]]
        blocks = torch.stack([torch.einsum("thi,thj->hij", x, x) / len(x) for x in rows]).mean(0)
        assert torch.allclose(found.block_moments("attn_out.1", source).double(), blocks, atol=1e-5)  # type: ignore[arg-type]


def test_a_bootstrap_counts_each_row_as_often_as_it_was_drawn(loaded: LoadedModel, encoded: list[Encoded]) -> None:
    found = capture(loaded, encoded)
    times = {e.row: [] for e in encoded if e.label == "positive"}
    alone = {e.row: capture(loaded, [e]) for e in encoded if e.label == "positive"}
    for row in times:
        times[row] = torch.poisson(torch.ones(32), generator=torch.Generator().manual_seed(row)).tolist()
    for draw in range(4):
        total = sum(drawn[draw] for drawn in times.values())
        assert found.weights["bootstrap"][draw].tolist() == [total, total]
        mean = sum(times[row][draw] * alone[row].mean("mlp_out.0", "output", "positive") for row in times) / total
        assert torch.allclose(
            found.resampled["bootstrap", "mlp_out.0", "output"].means[draw, 0].double(), mean, atol=1e-5
        )


def test_shuffled_labels_keep_pairs_and_lose_the_direction(loaded: LoadedModel, encoded: list[Encoded]) -> None:
    found = capture(loaded, encoded)
    for index in range(8):
        shuffled = found.shuffled(index)
        assert torch.allclose(shuffled.x_bar("mlp_out.1"), found.x_bar("mlp_out.1"), atol=1e-5)
        assert not torch.allclose(shuffled.difference("mlp_out.1"), found.difference("mlp_out.1"), atol=1e-3)
    mean = torch.stack([found.shuffled(i).difference("mlp_out.1") for i in range(8)]).mean(0)
    assert float(mean.norm()) < float(found.difference("mlp_out.1").norm())


def test_the_stream_is_the_embedding_plus_what_the_writers_wrote(loaded: LoadedModel, encoded: list[Encoded]) -> None:
    found = capture(loaded, encoded)
    for layer in range(1, loaded.spec.layers):
        written = sum(found.difference(f"{role}.{layer}") for role in ("attn_out", "mlp_out"))
        step = found.difference(f"residual.{layer}") - found.difference(f"residual.{layer - 1}")
        assert torch.allclose(written, step, atol=1e-5)


def test_merging_halves_gives_the_whole(loaded: LoadedModel, encoded: list[Encoded]) -> None:
    whole = capture(loaded, encoded)
    assert close(capture(loaded, encoded[::2]).merge(capture(loaded, encoded[1::2])), whole)


def test_statistics_of_other_models_do_not_merge(loaded: LoadedModel, encoded: list[Encoded]) -> None:
    one, other = (capture(loaded, encoded[:2], source={"fingerprint": name}) for name in "ab")
    with pytest.raises(PlanError, match="different models"):
        one.merge(other)


def test_a_file_holds_them_exactly(tiny_llama: Path, statistics_of: Callable[..., Any], tmp_path: Path) -> None:
    statistics = statistics_of(tiny_llama)
    statistics.save(tmp_path / "x.stats.safetensors")
    again = Statistics.load(tmp_path / "x.stats.safetensors")
    assert again.source == statistics.source and again.tokens == statistics.tokens
    assert again.moments.keys() == statistics.moments.keys() and again.blocks.keys() == statistics.blocks.keys()
    assert all(torch.equal(again.moments[key].mean, statistics.moments[key].mean) for key in statistics.moments)
    assert ("attn_out.0", "background") in again.blocks and again.examples["background"] > 0


def test_files_name_the_background_as_they_always_did(
    tiny_llama: Path, statistics_of: Callable[..., Any], tmp_path: Path
) -> None:
    statistics_of(tiny_llama).save(tmp_path / "x.stats.safetensors")
    tensors, metadata = load_tensors(tmp_path / "x.stats.safetensors")
    described = json.loads(metadata["statistics"])
    assert list(described["examples"]) == list(described["tokens"]) == ["positive", "negative", "neutral"]
    assert {"attn_out.0.input.neutral.mean", "attn_out.0.input.neutral.blocks"} <= tensors.keys()
    assert not any("background" in name for name in tensors)
    plan = make_plan(
        Scoring(open_checkpoint(tiny_llama), read_spec(open_checkpoint(tiny_llama)), statistics_of(tiny_llama))
    )
    assert list(plan.data["examples"]) == ["positive", "negative", "neutral"]


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
