"""Vectors of gradients: attributions add up to the difference, and the file goes where vectors go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROWS, run

from steer2edit.capture.attribution import attribution, by_gradients, masked_embedding
from steer2edit.capture.vectors import Vectors
from steer2edit.data import contrast
from steer2edit.data.answers import LABELS
from steer2edit.data.tokens import Encoded, encode
from steer2edit.errors import DataError
from steer2edit.runtime.model import LoadedModel


@pytest.fixture(scope="module")
def pairs(loaded: LoadedModel) -> list[Encoded]:
    examples = [
        contrast.Example(row["prompt"], row[label], label, "test", index)
        for index, row in enumerate(ROWS)
        for label in LABELS
    ]
    return encode(examples, loaded.tokenizer)


def preference(loaded: LoadedModel, positive: Encoded, negative: Encoded, embeddings: torch.Tensor) -> float:
    """log p(positive) − log p(negative) where the first tokens have these embeddings, by the model's own inputs_embeds."""
    values = []
    for one in (positive, negative):
        ids = torch.tensor([one.ids])
        embedded = loaded.model.get_input_embeddings()(ids).clone()
        embedded[0, : len(embeddings)] = embeddings
        logits = loaded.model(inputs_embeds=embedded).logits[0].log_softmax(dim=-1)
        values.append(sum(float(logits[i - 1, one.ids[i]]) for i in range(one.start, len(one.ids))))
    return values[0] - values[1]


def test_attributions_add_up_to_the_difference(loaded: LoadedModel, pairs: list[Encoded]) -> None:
    for positive, negative in (pairs[0:2], pairs[6:8]):
        length = positive.start
        own = loaded.model.get_input_embeddings()(torch.tensor(positive.ids[:length]))
        masked = masked_embedding(loaded).expand(length, -1)
        expected = preference(loaded, positive, negative, own) - preference(loaded, positive, negative, masked)
        gaps = []
        for steps in (2, 8, 64):
            found = attribution(loaded, positive, negative, steps=steps)
            assert found.preference - found.masked == pytest.approx(expected, abs=1e-4)
            gaps.append(abs(found.gap))
        assert gaps[2] < 1e-2 * abs(expected) and gaps[2] < gaps[0]


def test_attributions_are_the_paths_finite_differences(loaded: LoadedModel, pairs: list[Encoded]) -> None:
    positive, negative = pairs[:2]
    length, steps, h = positive.start, 4, 1e-3
    own = loaded.model.get_input_embeddings()(torch.tensor(positive.ids[:length]))
    masked = masked_embedding(loaded).expand(length, -1)
    found = attribution(loaded, positive, negative, steps=steps)
    for token in range(length):
        total = 0.0
        for step in range(steps):
            at = masked + (step + 0.5) / steps * (own - masked)
            ends = []
            for sign in (1, -1):
                moved = at.clone()
                moved[token] += sign * h * (own - masked)[token]
                ends.append(preference(loaded, positive, negative, moved))
            total += (ends[0] - ends[1]) / (2 * h) / steps
        assert float(found.tokens[token]) == pytest.approx(total, abs=2e-2)


def test_batches_do_not_matter(loaded: LoadedModel, pairs: list[Encoded]) -> None:
    whole, single = (attribution(loaded, *pairs[:2], steps=6, batch_tokens=size) for size in (4096, 1))
    assert torch.allclose(whole.tokens, single.tokens, atol=1e-4)


def test_the_vector_is_the_principal_loss_at_the_prompts_end(loaded: LoadedModel, pairs: list[Encoded]) -> None:
    found = by_gradients(loaded, pairs, steps=4, tokens=1)
    assert list(found.directions) == [f"residual.{layer}" for layer in range(3)]
    losses = {0: [], -1: []}  # type: ignore[var-annotated]
    masked = masked_embedding(loaded)
    for positive, negative in zip(pairs[::2], pairs[1::2], strict=True):
        scores = attribution(loaded, positive, negative, steps=4).tokens[:-1]
        order = scores.argsort(descending=True)
        ids = torch.tensor([positive.ids[: positive.start]])
        own = loaded.model.get_input_embeddings()(ids)
        state = loaded.model(inputs_embeds=own, output_hidden_states=True).hidden_states[2][0, -1]
        for end, rows in losses.items():
            other = own.clone()
            other[0, order[end]] = masked
            rows.append(state - loaded.model(inputs_embeds=other, output_hidden_states=True).hidden_states[2][0, -1])
    v = []
    for rows in losses.values():
        D = torch.stack(rows).double()
        u = torch.linalg.svd(D, full_matrices=False).Vh[0]
        v.append(u * (u @ D.mean(dim=0)))
    assert torch.allclose(found.directions["residual.1"].double(), v[0] - v[1], atol=1e-4)


def test_data_without_pairs_is_refused(loaded: LoadedModel, pairs: list[Encoded]) -> None:
    with pytest.raises(DataError, match="two at least"):
        by_gradients(loaded, pairs[::2])


def test_the_command_and_the_flag_give_one_edit(tiny_llama: Path, tmp_path: Path) -> None:
    import json

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    out = tmp_path / "x.vectors.safetensors"
    unused = run("vectors", tiny_llama, "--data", data, "--kind", "gradient", "--atoms", 5, "-o", out)
    assert unused.exit_code == 2 and "--atoms would change nothing" in unused.output and not out.exists()
    result = run("vectors", tiny_llama, "--data", data, "--kind", "gradient", "--tokens", 2, "-o", out)
    assert result.exit_code == 0 and "Gradients of 8 pairs" in result.output
    assert Vectors.load(out).source["tokens"] == 2
    common = ["compile", tiny_llama, "--data", data, "--strength", 1, "--no-report", "--layers", "1-2"]
    for flags, name in ((["--vectors", out], "a"), (["--vector", "gradient"], "b")):
        if name == "a":
            run("vectors", tiny_llama, "--data", data, "--kind", "gradient", "-o", out, "--force")
        compiled = run(*common, *flags, "--out", tmp_path / name)
        assert compiled.exit_code == 0, compiled.output
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b
    stats = tmp_path / "x.stats.safetensors"
    assert run("capture", tiny_llama, "--data", data, "-o", stats).exit_code == 0
    plan = run("plan", tiny_llama, "--stats", stats, "--vector", "gradient", "-o", tmp_path / "x.plan.safetensors")
    assert plan.exit_code == 2 and "steer2edit vectors" in plan.output
