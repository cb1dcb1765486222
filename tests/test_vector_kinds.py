"""Vectors of the pairs' differences: mean, principal direction and median, with their resamples, and the last token's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, run

from steer2edit.capture import pairs as pairs_module
from steer2edit.capture.pairs import Pairs
from steer2edit.capture.resampling import draws
from steer2edit.capture.run import capture
from steer2edit.capture.statistics import Statistics
from steer2edit.capture.vector_kinds import VectorKind, median, principal, with_vector
from steer2edit.data import contrast
from steer2edit.data.answers import LABELS
from steer2edit.data.tokens import Encoded, Span, encode
from steer2edit.errors import PlanError
from steer2edit.plan import EditPlan
from steer2edit.runtime.model import LoadedModel

PLACES = ("residual.1", "attn_out.0", "mlp_out.2")


def encoded(loaded: LoadedModel, span: Span = "matched") -> list[Encoded]:
    examples = [
        contrast.Example(row["prompt"], row[label], label, "test", index)
        for index, row in enumerate(ROWS)
        for label in LABELS
    ]
    return encode(examples, loaded.tokenizer, span=span)


@pytest.fixture(scope="module")
def statistics(loaded: LoadedModel) -> Statistics:
    return capture(loaded, encoded(loaded))


def differences(statistics: Statistics, key: str) -> torch.Tensor:
    return statistics.pairs[key].double()


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_each_pairs_difference_is_that_of_its_examples_alone(
    loaded: LoadedModel, statistics: Statistics, batch_tokens: int
) -> None:
    found = capture(loaded, encoded(loaded)[::-1], batch_tokens=batch_tokens)
    assert found.pair_rows == tuple(range(len(ROWS)))
    for row in range(3):
        alone = capture(loaded, [one for one in encoded(loaded) if one.row == row])
        for key in PLACES:
            assert torch.allclose(found.pairs[key][row].double(), alone.difference(key), atol=1e-5)
    for key in PLACES:
        assert torch.allclose(differences(found, key).mean(dim=0), statistics.difference(key), atol=1e-5)


def test_the_principal_direction_is_the_first_singular_vector_with_the_means_sign(statistics: Statistics) -> None:
    found = with_vector(statistics, "pca")
    for key in PLACES:
        D = differences(statistics, key)
        u = torch.linalg.svd(D, full_matrices=False).Vh[0]
        expected = u * (u @ D.mean(dim=0))
        assert torch.allclose(found.difference(key), expected, atol=1e-6)
        assert float(found.difference(key) @ statistics.difference(key)) > 0
        # class means stay symmetric about their middle, and inputs are untouched
        middle = sum(found.mean(key, "output", label) for label in LABELS)
        assert torch.allclose(middle, sum(statistics.mean(key, "output", label) for label in LABELS))
    assert torch.equal(found.x_bar("mlp_out.1"), statistics.x_bar("mlp_out.1"))


def test_no_point_is_nearer_to_the_pairs_than_the_median(statistics: Statistics) -> None:
    found = with_vector(statistics, "median")
    generator = torch.Generator().manual_seed(0)
    for key in PLACES:
        D, v = differences(statistics, key), found.difference(key)

        def total(point: torch.Tensor, D: torch.Tensor = D) -> float:
            return float((D - point).norm(dim=1).sum())

        least = total(v)
        for size in (1e-3, 1e-1, 1.0):
            step = torch.randn(20, len(v), generator=generator, dtype=torch.float64) * size * v.norm() / len(v) ** 0.5
            assert all(total(v + one) > least for one in step)


def test_one_odd_pair_hardly_moves_the_median() -> None:
    D = torch.randn(21, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    spoilt = D.clone()
    spoilt[0] = 1e4
    ones = torch.ones(1, 21, dtype=torch.float64)
    a, b = (median(one @ one.T, ones, ones) @ one for one in (D, spoilt))
    assert float((a - b).norm()) < 0.5
    assert float((D.mean(0) - spoilt.mean(0)).norm()) > 1000


@pytest.mark.parametrize("mix", [principal, median])
def test_mixtures_turn_with_the_basis(mix: Callable[..., torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    D = torch.randn(9, 5, generator=generator, dtype=torch.float64) + 0.5
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    ones = torch.ones(1, 9, dtype=torch.float64)
    before, after = (mix(one @ one.T, ones, ones) @ one for one in (D, D @ turn))
    assert torch.allclose(before @ turn, after, atol=1e-8)


@pytest.mark.parametrize("kind", ["pca", "median"])
def test_resamples_are_the_same_vector_of_resampled_pairs(statistics: Statistics, kind: VectorKind) -> None:
    key, found = "mlp_out.1", with_vector(statistics, kind)
    D, rows = differences(statistics, key), statistics.pair_rows
    drawn = found.resamples("bootstrap", key, "output").difference().double()
    for number in (0, 5, 31):
        # a row that is drawn twice stands twice
        repeated = D.repeat_interleave(torch.tensor([int(draws(row)[0][number]) for row in rows]), dim=0)
        ones = torch.ones(1, len(repeated), dtype=torch.float64)
        mix = principal if kind == "pca" else median
        assert torch.allclose(drawn[number], (mix(repeated @ repeated.T, ones, ones) @ repeated)[0], atol=1e-4)
    shuffled = found.resamples("shuffled", key, "output").difference().double()
    flipped = D * torch.tensor([1.0 - 2 * int(draws(row)[1][2]) for row in rows])[:, None]
    again = with_vector(replace(statistics, pairs={key: flipped.float()}), kind)
    assert torch.allclose(shuffled[2], again.difference(key), atol=1e-4)
    assert torch.allclose(found.shuffled(2).difference(key), shuffled[2], atol=1e-5)


def test_the_last_token_of_the_response_is_where_the_vector_is_read(
    loaded: LoadedModel, statistics: Statistics
) -> None:
    whole, last = capture(loaded, encoded(loaded, "response")), capture(loaded, encoded(loaded, "last"))
    states: dict[str, list[torch.Tensor]] = {label: [] for label in LABELS}
    for one in encoded(loaded, "last"):
        assert one.ids[-1] == loaded.tokenizer.eos_token_id
        hidden = loaded.model(torch.tensor([one.ids]), output_hidden_states=True).hidden_states
        states[one.label].append(hidden[2][0, -2].detach().double())
    expected = torch.stack(states["positive"]).mean(0) - torch.stack(states["negative"]).mean(0)
    assert torch.allclose(last.difference("residual.1"), expected, atol=1e-5)
    assert not torch.allclose(whole.difference("residual.1"), expected, atol=1e-2)
    # what a matrix reads is captured on the whole response all the same
    assert torch.allclose(last.x_bar("attn_out.1"), whole.x_bar("attn_out.1"), atol=1e-6)


def test_more_pairs_than_are_kept_are_a_choice_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [(label, row) for row in range(50) for label in LABELS] + [("positive", 99)]
    assert Pairs.of(examples).rows == tuple(range(50))
    monkeypatch.setattr(pairs_module, "MOST_PAIRS", 10)
    few = Pairs.of(examples)
    assert len(few.rows) == 10 and few.rows == Pairs.of(examples[::-1]).rows
    shares = few.shares([("positive", few.rows[3]), ("negative", few.rows[3]), ("background", 0)])
    assert shares is not None and shares[3].tolist() == [1, -1, 0] and float(shares.abs().sum()) == 2


def test_a_file_holds_the_pairs_and_older_ones_have_none(statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "x.stats.safetensors"
    replace(statistics, source={**statistics.source, "fingerprint": "a"}).save(path)
    again = Statistics.load(path)
    assert again.pair_rows == statistics.pair_rows
    assert all(torch.equal(again.pairs[key], one) for key, one in statistics.pairs.items())
    bare = {key: value for key, value in statistics.source.items() if key != "pairs"}
    old = tmp_path / "old.stats.safetensors"
    replace(statistics, pairs={}, source=bare).save(old)
    old.write_bytes(old.read_bytes().replace(b"steer2edit.statistics.4", b"steer2edit.statistics.3"))
    loaded = Statistics.load(old)
    assert loaded.pair_rows == () and with_vector(loaded, "mean") is loaded
    with pytest.raises(PlanError, match="hold 0"):
        with_vector(loaded, "pca")


def test_merged_statistics_hold_the_pairs_of_both(loaded: LoadedModel, statistics: Statistics) -> None:
    rows = encoded(loaded)
    merged = capture(loaded, rows[:6]).merge(capture(loaded, rows[6:]))
    assert merged.pair_rows == statistics.pair_rows
    a, b = (with_vector(one, "pca").difference("residual.1") for one in (merged, statistics))
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kind", ["pca", "median"])
def test_the_flag_makes_a_plan_of_that_vector(
    kind: VectorKind, tiny_llama: Path, statistics_of: Callable[..., Any], tmp_path: Path
) -> None:
    stats = tmp_path / "x.stats.safetensors"
    statistics = statistics_of(tiny_llama)
    statistics.save(stats)
    out = tmp_path / "x.plan.safetensors"
    result = run("plan", tiny_llama, "--stats", stats, "--vector", kind, "--all-components", "-o", out)
    assert result.exit_code == 0, result.output
    plan = EditPlan.load(out)
    assert plan.data["vector"] == kind
    v = with_vector(statistics, kind).difference("attn_out.1")
    edit = plan.edit_of("model.layers.1.self_attn.o_proj.weight")
    assert float(torch.cosine_similarity(edit.B[:, 0].double(), v, dim=0)) == pytest.approx(1, abs=1e-6)  # type: ignore[union-attr]
    other = tmp_path / "v.vectors.safetensors"
    result = run("plan", tiny_llama, "--stats", stats, "--vector", kind, "--vectors", other, "-o", out)
    assert result.exit_code == 2 and "give one of the two" in result.output
