"""Affine transport: the negative class's moments become the positive's, and a gain alone has the error that is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from family_configs import family_config

from steer2edit.architecture import read_spec
from steer2edit.capture.vectors import Vectors, substituted
from steer2edit.checkpoint import open_checkpoint
from steer2edit.errors import PlanError
from steer2edit.methods import make_plan, transport
from steer2edit.plan import EditPlan, NewBias, Scale
from steer2edit.scoring.scores import Scoring


@pytest.fixture(scope="module")
def case(tiny_llama: Path, statistics_of: Callable[..., Any]) -> Scoring:
    checkpoint = open_checkpoint(tiny_llama)
    return Scoring(checkpoint, read_spec(checkpoint), statistics_of(tiny_llama))


def planned(scoring: Scoring, **options: Any) -> EditPlan:
    return make_plan(scoring, method="transport", options=transport.Options(**options))


def test_mean_and_spread_become_the_positive_classs(case: Scoring) -> None:
    plan = planned(case, most_gain=1e6)
    for site in case.spec.sites:
        scale, bias = plan.edit_of(site.matrix), plan.edit_of(str(site.new_bias))
        assert isinstance(scale, Scale) and isinstance(bias, NewBias)
        target, source = (case.statistics.moments[site.key, "output", label] for label in ("positive", "negative"))
        assert torch.allclose(scale.factors * source.mean + bias.delta, target.mean, atol=1e-6)
        spread = scale.factors * (source.m2 - source.mean**2).sqrt()
        assert torch.allclose(spread, (target.m2 - target.mean**2).sqrt(), atol=1e-6)


def test_half_the_strength_is_half_the_way(case: Scoring) -> None:
    plan = planned(case)
    site = case.spec.sites[0]
    half = plan.scaled(0.5)
    scale, bias = half.edit_of(site.matrix), half.edit_of(str(site.new_bias))
    whole, constant = plan.edit_of(site.matrix), plan.edit_of(str(site.new_bias))
    assert isinstance(scale, Scale) and isinstance(whole, Scale)
    assert isinstance(bias, NewBias) and isinstance(constant, NewBias)
    y = torch.randn(site.out_features, dtype=torch.float64)
    expected = (y + whole.factors * y + constant.delta) / 2
    assert torch.allclose(scale.factors * y + bias.delta, expected, atol=1e-6)


def test_the_error_of_a_gain_alone_is_that_of_samples(case: Scoring) -> None:
    plan, exact = planned(case, constant="none", most_gain=1e6), planned(case, most_gain=1e6)
    site = case.spec.sites[1]
    gain, omega = plan.edit_of(site.matrix), exact.edit_of(site.matrix)
    constant = exact.edit_of(str(site.new_bias))
    assert isinstance(gain, Scale) and isinstance(omega, Scale) and isinstance(constant, NewBias)
    source = case.statistics.moments[site.key, "output", "negative"]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, site.out_features, generator=generator, dtype=torch.float64)
    y = source.mean + noise * (source.m2 - source.mean**2).sqrt()
    wanted = omega.factors * y + constant.delta
    error = float((gain.factors * y - wanted).square().sum() / (wanted - y).square().sum())
    assert error == pytest.approx(plan.method["errors"][site.key], rel=0.05)


def test_what_has_no_bias_or_no_classes_is_refused(
    case: Scoring, tmp_path: Path, statistics_of: Callable[..., Any]
) -> None:
    folder = save_tiny(tmp_path / "mistral", family_config("mistral"))
    checkpoint = open_checkpoint(folder)
    mistral = Scoring(checkpoint, read_spec(checkpoint), statistics_of(folder))
    with pytest.raises(PlanError, match=r"(?s)attn_out\.0: it has no bias.*--constant none .* error: attn_out\.0"):
        planned(mistral)
    assert planned(mistral, constant="none").edits
    vectors = Vectors({"residual.1": torch.ones(case.spec.hidden_size)})
    foreign = substituted(vectors, case.statistics, case.checkpoint, case.spec)
    with pytest.raises(PlanError, match="no imported vectors"):
        planned(Scoring(case.checkpoint, case.spec, foreign))
