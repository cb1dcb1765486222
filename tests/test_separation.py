"""Agreement and separability: what they are of pairs with one direction, with none, and of a model's own activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ROWS
from hypothesis import given, settings
from hypothesis import strategies as st

from steer2edit.capture.per_example import stream_means
from steer2edit.capture.run import capture
from steer2edit.data.answers import LABELS
from steer2edit.data.contrast import Example
from steer2edit.data.tokens import encode
from steer2edit.pairs.separation import LEAST_PROMPTS, Separation, agreement, d_prime, projections, separation
from steer2edit.pairs.verdict import verdict


def made(size: float, count: int = 40, seed: int = 0) -> torch.Tensor:
    """Pairs of noise, ``[pairs, 2, layers, features]``, whose positive answers lie ``size`` further along one direction."""
    draws = torch.Generator().manual_seed(seed)
    pairs = torch.randn(count, 2, 3, 64, generator=draws)
    direction = torch.nn.functional.normalize(torch.randn(3, 64, generator=draws), dim=-1)
    pairs[:, 0] += size * direction
    return pairs


def test_a_direction_is_found_and_noise_is_not() -> None:
    numbers = [separation(made(size), range(40)) for size in (0.0, 2.0, 5.0)]
    assert all(number is not None for number in numbers)
    none, some, strong = (number for number in numbers if number is not None)
    assert none.d_prime < none.chance and abs(none.agreement) < 0.02
    assert none.d_prime < some.d_prime < strong.d_prime and strong.d_prime > 3
    assert strong.agreement > 0.1 and strong.chance < 1.5


def test_swapped_labels_take_it_away() -> None:
    pairs = made(5.0)
    pairs[::2] = pairs[::2].flip(1)
    number = separation(pairs, range(40))
    assert number is not None
    assert number.d_prime < number.chance + 0.3


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 9))
def test_neither_scale_nor_a_common_shift_changes_anything(seed: int, scale: float) -> None:
    pairs = made(2.0, seed=seed)
    shift = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    one, two = separation(pairs, range(40)), separation(pairs * scale, range(40))
    assert one is not None and two is not None
    assert one.d_prime == pytest.approx(two.d_prime, rel=1e-3)
    moved = separation(pairs + shift, range(40))
    assert moved is not None and one.agreement == pytest.approx(moved.agreement, abs=1e-4)


def test_a_pair_has_no_part_in_the_vector_that_it_is_tried_on() -> None:
    pairs = made(0.0, count=10)
    folds = torch.arange(10) % 5
    labels = torch.ones(1, 10)
    before = projections(pairs, folds, labels)
    pairs[3, 0] += 100.0
    after = projections(pairs, folds, labels)
    # its own projection moves by a fixed vector; that of the other member of its pair does not
    assert torch.allclose(before[3, 1], after[3, 1])
    assert not torch.allclose(before[0], after[0])


def test_projections_are_those_on_the_mean_difference_of_the_other_folds() -> None:
    pairs, folds = made(1.0, count=11).double(), torch.arange(11) % 5
    signs = torch.where(torch.rand(3, 11, generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)
    found = projections(pairs, folds, signs)
    for draw, row in enumerate(signs):
        swapped = torch.where((row < 0)[:, None, None, None], pairs.flip(1), pairs)
        for pair in range(11):
            others = swapped[folds != folds[pair]]
            vector = torch.nn.functional.normalize((others[:, 0] - others[:, 1]).mean(0), dim=-1)
            assert torch.allclose(found[pair, :, draw], (swapped[pair] * vector).sum(-1), atol=1e-9)


def test_so_many_data_without_a_behaviour_are_told_apart_as_are_meant_to() -> None:
    found = [separation(made(0.0, count=16, seed=seed), range(16), seed) for seed in range(200)]
    shares = [one.p for one in found if one is not None]
    # p is the share of swappings that do as well: of pure noise so many are under each bound
    for bound in (0.05, 0.2, 0.5):
        count = sum(p <= bound for p in shares)
        assert abs(count - 200 * bound) < 4 * (200 * bound * (1 - bound)) ** 0.5 + 1


def test_reliability_is_the_cosine_with_the_vector_of_endlessly_many_pairs() -> None:
    cosines, expected = [], []
    for seed in range(40):
        pairs = made(2.0, count=30, seed=seed)
        draws = torch.Generator().manual_seed(seed)
        torch.randn(30, 2, 3, 64, generator=draws)
        direction = torch.nn.functional.normalize(torch.randn(3, 64, generator=draws), dim=-1)
        vector = torch.nn.functional.normalize((pairs[:, 0] - pairs[:, 1]).mean(0), dim=-1)
        cosines.append(float((vector * direction).sum(-1).mean()))
        found = separation(pairs, range(30), seed)
        assert found is not None
        expected.append(found.reliability(30))
        needed = found.pairs_for(0.9)
        assert needed is not None and found.reliability(needed) >= 0.9 > found.reliability(needed - 1)
    assert sum(expected) / 40 == pytest.approx(sum(cosines) / 40, abs=0.03)
    noise = Separation(-0.01, 0.0, 0.4, 0.0, 0.5, 30, 30)
    assert noise.reliability(1000) == 0 and noise.pairs_for(0.8) is None


def test_pairs_of_one_prompt_are_one_draw() -> None:
    pairs = made(2.0, count=20)
    assert separation(pairs, [i % (LEAST_PROMPTS - 1) for i in range(20)]) is None
    number = separation(pairs, [i % LEAST_PROMPTS for i in range(20)])
    assert number is not None and (number.pairs, number.prompts) == (20, LEAST_PROMPTS)


@pytest.mark.parametrize(
    ("numbers", "paired", "captured", "word"),
    [
        # agreement, d', consistency, p
        ((0.25, 3.5, 3.0, 0.0025), True, 48, "steerable"),
        # a difference that is small beside that of topics is one all the same
        ((0.05, 0.4, 0.9, 0.0025), True, 48, "steerable"),
        ((0.02, 0.4, 0.7, 0.0025), True, 38, "weak"),
        ((0.02, 0.4, 0.7, 0.0025), True, 400, "steerable"),
        ((0.25, 1.04, 0.6, 0.03), True, 18, "not"),
        # classes of prompts differ in their topics too
        ((0.05, 0.4, 0.9, 0.0025), False, 48, "not"),
        ((0.05, 1.0, 0.9, 0.0025), False, 48, "weak"),
        ((0.05, 1.6, 0.9, 0.0025), False, 48, "weak"),
        ((0.05, 1.9, 0.9, 0.0025), False, 48, "steerable"),
        ((0.01, 1.6, 0.9, 0.0025), False, 48, "weak"),
        # a vector that is mostly noise
        ((0.01, 0.7, 0.7, 0.0025), True, 18, "not"),
    ],
)
def test_the_verdict(numbers: tuple[float, float, float, float], paired: bool, captured: int, word: str) -> None:
    agreed, apart, consistent, p = numbers
    found = Separation(agreed, apart, 0.3, consistent, p, 48, 48, paired)
    result = verdict(found, (), (captured, captured), captured)
    assert result.word == word and result.sound == (word != "not")


def test_agreement_is_the_mean_cosine() -> None:
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cosines = [
        float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for i, a in enumerate(rows) for b in rows[i + 1 :]
    ]
    assert float(agreement(rows)) == pytest.approx(sum(cosines) / len(cosines))
    assert float(agreement(rows[:1].repeat(3, 1))) == pytest.approx(1)
    assert float(agreement(torch.zeros(3, 4))) == 0


def test_d_prime_of_known_numbers() -> None:
    p, n = torch.tensor([3.0, 4.0, 5.0]), torch.tensor([0.0, 1.0, 2.0])
    assert float(d_prime(p, n)) == pytest.approx(3.0)
    assert float(d_prime(p, p)) == 0


def test_what_is_read_of_single_examples_is_what_a_capture_takes_the_mean_of(loaded: Any) -> None:
    examples = [Example(row["prompt"], row[label], label, "x", i) for i, row in enumerate(ROWS) for label in LABELS]
    encoded = encode(examples, loaded.tokenizer)
    means = stream_means(loaded, encoded, batch_tokens=100)
    statistics = capture(loaded, encoded)
    for side, label in enumerate(LABELS):
        for layer in range(loaded.spec.layers):
            expected = statistics.mean(f"residual.{layer}", "output", label)
            assert torch.allclose(means[side::2, layer].double().mean(0), expected, atol=1e-5)
    whole = stream_means(loaded, encoded, batch_tokens=10_000)
    assert torch.allclose(means, whole, atol=1e-5)
