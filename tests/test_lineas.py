"""LinEAS: trained maps find the closed form where that is right, and beat it where maps act on each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROWS, run

from steer2edit.architecture import read_spec
from steer2edit.capture.affine_maps import (
    AffineMap,
    Classes,
    ContrastRuns,
    contrast_runs,
    losses_under,
    positions_of,
    read_classes,
)
from steer2edit.capture.lineas import FitSettings, fit_lineas, proximal
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.answers import LABELS
from steer2edit.data.behavior import Behavior
from steer2edit.data.contrast import Example
from steer2edit.data.tokens import Encoded
from steer2edit.errors import DataError, PlanError
from steer2edit.methods import make_plan, transport
from steer2edit.notices import collected
from steer2edit.plan import EditPlan
from steer2edit.runtime.model import Runtime, load_model
from steer2edit.scoring.scores import Scoring

PROMPTS, TOKENS, WIDTH = 40, 16, 6
BEHAVIOR = Behavior(
    "rows", [Example(row["prompt"], row[label], label, "test", i) for i, row in enumerate(ROWS) for label in LABELS]
)


class OneWriter(torch.nn.Module):
    """A model of one writer, whose output at each token is that token's vector."""

    def __init__(self, vectors: torch.Tensor) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding.from_pretrained(vectors)
        self.writer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.writer.weight.data.copy_(torch.eye(WIDTH))
        self.dtype = torch.float32
        self.requires_grad_(False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> torch.Tensor:
        found: torch.Tensor = self.writer(self.embedding(input_ids))
        return found


def one_writer(negative: torch.Tensor, positive: torch.Tensor) -> tuple[ContrastRuns, Classes]:
    """Runs of a model that writes these vectors, [prompts, tokens, width] of each class."""
    model = OneWriter(torch.cat((torch.zeros(1, WIDTH), positive.flatten(0, 1), negative.flatten(0, 1))))
    loaded = SimpleNamespace(
        model=model, device=torch.device("cpu"), padding=0, check_tokens=list, body=lambda: model,
        module=lambda site: model.writer,
    )  # fmt: skip
    examples = []
    for number, label in enumerate(LABELS):
        for row in range(PROMPTS):
            first = 1 + (number * PROMPTS + row) * TOKENS
            # the last token is only predicted
            ids = (0, *range(first, first + TOKENS), 0)
            examples.append(Encoded(ids, 2, label, row))
    runs = ContrastRuns(loaded, examples)  # type: ignore[arg-type]
    site: Any = SimpleNamespace(key="attn_out.0", out_features=WIDTH)
    return runs, read_classes(runs, [site])


@pytest.fixture(scope="module")
def gaussians() -> tuple[ContrastRuns, Classes, torch.Tensor, torch.Tensor]:
    """Both classes are Gaussian, coordinate by coordinate, and the one is ``omega * y + beta`` of the other."""
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.linspace(-2, 2, WIDTH)
    negative = scales * (torch.randn(PROMPTS, TOKENS, WIDTH, generator=generator) + 0.7)
    omega = torch.tensor([0.5, 1.0, 1.5, 2.0, 0.8, 1.0])
    beta = scales * torch.tensor([0.0, 1.0, -1.0, 0.5, 0.2, 0.0])
    return *one_writer(negative, omega * negative + beta), omega.double(), beta.double()


def test_of_gaussian_classes_at_one_place_it_finds_the_closed_form(
    gaussians: tuple[ContrastRuns, Classes, torch.Tensor, torch.Tensor],
) -> None:
    runs, classes, omega, beta = gaussians
    fit = fit_lineas(runs, classes, FitSettings(steps=150))
    found, spread = fit.maps["attn_out.0"], classes.spreads["attn_out.0"]
    assert torch.allclose(found.omega, omega, rtol=0.03)
    assert float(((found.beta - beta).abs() / spread).max()) < 0.05
    for before, after in (fit.fit, fit.held_out):
        assert after < 0.01 * before
    # the loss that is told is that of the maps
    assert losses_under(runs, classes, {"attn_out.0": AffineMap(omega, beta)})["held_out"] == pytest.approx(0, abs=1e-3)


def test_without_steps_nothing_changes_and_gains_stay_in_their_bounds(
    gaussians: tuple[ContrastRuns, Classes, torch.Tensor, torch.Tensor],
) -> None:
    runs, classes, _, _ = gaussians
    fit = fit_lineas(runs, classes, FitSettings(steps=0))
    assert fit.untouched == ["attn_out.0"] and fit.fit[0] == fit.fit[1] and fit.held_out[0] == fit.held_out[1]
    bounded = fit_lineas(runs, classes, FitSettings(steps=60, most_gain=1.2)).maps["attn_out.0"].omega
    assert float(bounded.max()) <= 1.2 + 1e-6 and float(bounded.min()) >= 1 / 1.2 - 1e-6
    alone = fit_lineas(runs, classes, FitSettings(steps=60, constant=False))
    assert not alone.maps["attn_out.0"].beta.any() and alone.fit[1] < alone.fit[0]


def test_penalties_leave_coordinates_and_then_the_whole_place_as_they_were(
    gaussians: tuple[ContrastRuns, Classes, torch.Tensor, torch.Tensor],
) -> None:
    runs, classes, omega, _ = gaussians
    some = fit_lineas(runs, classes, FitSettings(steps=150, sparse=0.3)).maps["attn_out.0"]
    assert not some.identity and some.omega[5] == 1 and some.beta[5] == 0, "the coordinate in which classes are alike"
    assert float((some.omega - 1).norm()) < float((omega - 1).norm()), "what is penalised is smaller"
    assert fit_lineas(runs, classes, FitSettings(steps=20, sparse=100.0)).untouched == ["attn_out.0"]


def test_the_proximal_map_is_the_minimum_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    theta, step = torch.randn(2, 5, generator=generator), 0.1 + torch.rand(5, generator=generator)

    def cost(x: torch.Tensor, weight: float) -> float:
        penalty = 0.5 * x.abs().sum() + 0.5 * x.numel() ** 0.5 * x.norm()
        return float(((x - theta).square() / (2 * step)).sum() + weight * penalty)

    for threshold in (0.0, 0.1, 0.4, 5.0):
        found = proximal(theta, step, threshold)
        for _ in range(50):
            for size in (0.001, 0.05):
                other = found + size * torch.randn(2, 5, generator=generator)
                assert cost(found, threshold) <= cost(other, threshold) + 1e-6
    assert not proximal(theta, step, 5.0).any()


def test_a_fit_that_is_worth_nothing_on_held_out_prompts_says_so() -> None:
    generator = torch.Generator().manual_seed(2)
    negative = torch.randn(PROMPTS, TOKENS, WIDTH, generator=generator)
    runs, _ = one_writer(negative, negative + 1)
    held_out = {one.row for one in runs.part("held_out", "negative")}
    sign = torch.tensor([-1.0 if row in held_out else 1.0 for row in range(PROMPTS)])
    runs, classes = one_writer(negative, negative + sign[:, None, None])
    fit = fit_lineas(runs, classes, FitSettings(steps=40))
    assert fit.fit[1] < fit.fit[0] and fit.held_out[1] > fit.held_out[0]
    with collected() as notices:
        transport.held_out_error(fit.prompts[1], fit.held_out)
        transport.held_out_error(fit.prompts[1], fit.fit)
    assert len(notices) == 1 and "do not bring the classes nearer" in notices[0]


def test_positions_are_spread_over_the_response() -> None:
    example = Encoded(tuple(range(40)), 8, "positive", 0)
    assert positions_of(example, 100) == list(range(7, 39))
    few = positions_of(example, 4)
    assert few == [11, 19, 27, 35]
    assert positions_of(replace(example, last=True), 4) == [38]


@pytest.fixture(scope="module")
def case(tiny_llama: Path, statistics_of: Callable[..., Any]) -> Scoring:
    checkpoint = open_checkpoint(tiny_llama)
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype="float32"))
    return Scoring(checkpoint, loaded.spec, statistics_of(tiny_llama), contrast_runs(loaded, BEHAVIOR))


def planned(scoring: Scoring, **options: Any) -> EditPlan:
    return make_plan(scoring, method="transport", options=transport.Options(**options))


def test_trained_together_maps_bring_the_classes_nearer_than_each_for_itself(case: Scoring) -> None:
    with collected():
        closed, trained = planned(case), planned(case, fit="lineas", fit_steps=60)
        again = planned(case, fit="lineas", fit_steps=60)
    assert trained.hash == again.hash, "the same seed gives the same maps"
    assert case.runs is not None
    classes = read_classes(case.runs, case.spec.sites)
    own = losses_under(case.runs, classes, {
        site.key: transport._map(*(classes.moments[site.key, label, "fit"] for label in LABELS), transport.Options(),
                                 classes.moments[site.key, "negative", "fit"], gain_only=False)[0]
        for site in case.spec.sites
    })  # fmt: skip
    before, after = trained.method["training"]["loss"]
    assert after < before and after < own["fit"]
    held_out = closed.method["held_out"]
    assert held_out["prompts"] == 2 and held_out["loss"] == [classes.losses["held_out"], own["held_out"]]
    numbers = 2 * sum(site.out_features for site in case.spec.sites)
    assert trained.method["training"]["parameters"] == numbers


def test_the_error_of_a_gain_is_that_of_pairs_without_a_part_in_it(case: Scoring) -> None:
    with collected():
        plan = planned(case, constant="none", most_gain=1e6)
    key = case.spec.sites[0].key
    assert case.runs is not None
    classes = read_classes(case.runs, case.spec.sites[:1])
    target, source = (classes.moments[key, label, "fit"] for label in LABELS)
    fresh = classes.moments[key, "negative", "held_out"]
    options = transport.Options(constant="none", most_gain=1e6)
    assert plan.method["held_out_errors"][key] == pytest.approx(
        transport._map(target, source, options, fresh, gain_only=True)[1]
    )
    assert plan.method["held_out_errors"] != plan.method["errors"]
    without = planned(replace(case, runs=None), constant="none")
    assert without.method["why_no_held_out"] == "no model was run" and without.method["errors"]


def test_what_cannot_be_trained_is_refused(case: Scoring) -> None:
    with pytest.raises(PlanError, match="--fit lineas trains the maps by running the model"):
        planned(replace(case, runs=None), fit="lineas")
    with pytest.raises(PlanError, match="--fit-sparse would change nothing: it goes with --fit lineas"):
        planned(case, fit_sparse=0.1)
    with pytest.raises(PlanError, match="LinEAS left every output as it was"), collected():
        planned(case, fit="lineas", fit_steps=2, fit_sparse=1e4)
    assert case.runs is not None
    few = replace(case.runs, examples=[one for one in case.runs.examples if one.row < 5])
    with pytest.raises(DataError, match="the data has 5 prompts; maps of outputs take 8"):
        planned(replace(case, runs=few), fit="lineas")
    assert planned(replace(case, runs=few)).method["why_no_held_out"] == "the data has too few prompts"


def test_a_training_that_its_time_ends_says_so(case: Scoring) -> None:
    assert case.runs is not None
    classes = read_classes(case.runs, case.spec.sites)
    with collected() as notices:
        fit = fit_lineas(case.runs, classes, FitSettings(steps=5, seconds=-1.0))
    assert fit.steps == 0 and "LinEAS ended after 0 of 5 steps" in notices[0]


def test_compile_trains_and_tells(tiny_llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ("--data", data, "--method", "transport", "--fit", "lineas", "--fit-steps", 4, "--out", tmp_path / "out")
    shown = run("compile", tiny_llama, *flags, "--no-report", "--strength", 1).output
    assert "numbers in 4 steps on 6 prompts" in shown and "2 prompts without a part in the fit" in shown
    card = (tmp_path / "out" / "README.md").read_text()
    assert "no training" not in card and "were trained (LinEAS)" in card
    receipt = json.loads((tmp_path / "out" / "steer2edit.json").read_text())
    assert receipt["method"]["training"]["steps"] == 4 and receipt["method"]["held_out"]["prompts"] == 2
