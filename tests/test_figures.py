"""Figures: plans of every shape are drawn, names stay names, and data can be seen in light and in dark."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from made_reports import make_evaluation, make_plan

from steer2edit.errors import Steer2EditError
from steer2edit.evaluation.metrics import Sample
from steer2edit.plan import EditPlan
from steer2edit.report.drawing import BLUE, GREY, ORANGE
from steer2edit.report.figures import heads, heatmap, neurons, of_plan
from steer2edit.report.tradeoff import tradeoff

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("colour", [BLUE, ORANGE, GREY])
def test_data_is_seen_on_white_and_on_black(colour: str) -> None:
    def luminance(text: str) -> float:
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert 1.05 / (luminance(colour) + 0.05) >= 3
    assert (luminance(colour) + 0.05) / (luminance("#111111") + 0.05) >= 3


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
@pytest.mark.parametrize(
    "plan",
    [
        make_plan(),
        make_plan(80, 64, 32),
        make_plan(30, 9, 0),
        make_plan(3, 0, 40, resampled=False),
        make_plan(3, 4, 16, resampled=False),
        make_plan(2, 1, 1, lam=0.0),
    ],
    ids=["both", "deep", "attention", "mlp", "once", "zero"],
)
def test_heatmaps_of_every_shape_are_drawn(plan: EditPlan, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "folder" / f"map.{suffix}"
    heatmap(plan, path)
    assert path.stat().st_size > 3000
    drawn = of_plan(plan)
    assert not any("$" in drawing.svg() for drawing in drawn)
    assert {drawing.name for drawing in drawn} == {"scores"} | {
        name for role, name in (("attn_out", "heads"), ("mlp_out", "neurons")) if f"{role}.0" in plan.scores
    }


@pytest.mark.parametrize(("strengths", "scale"), [((0.5, 1.0, 2.0), "linear"), ((0.1, 1.0, 8.0), "symlog")])
@pytest.mark.parametrize("rounding", [0.0, 1e-9, -1e-9])
def test_divergences_of_many_sizes_get_a_logarithm(strengths: tuple[float, ...], scale: str, rounding: float) -> None:
    evaluation = make_evaluation(strengths=strengths)
    base = evaluation.rows[0]
    samples = {**base.samples, "KL": Sample((255 * rounding,) * 16, (255.0,) * 16)}
    rows = (dataclasses.replace(base, samples=samples), *evaluation.rows[1:])
    drawing = tradeoff(dataclasses.replace(evaluation, rows=rows), (), {})
    assert drawing is not None and drawing.figure.axes[0].get_xscale() == scale


def test_neurons_keep_their_identity() -> None:
    plan = make_plan(2, 0, 40)
    drawing = neurons(plan)
    assert drawing is not None
    named = set(re.findall(r">(\d+)</text>", drawing.svg()))
    for table in plan.scores.values():
        strongest = table.lam.abs().topk(3).indices.tolist()
        assert set(map(str, strongest)) <= named


def test_a_plan_without_scores_has_no_heatmap(tmp_path: Path) -> None:
    with pytest.raises(Steer2EditError, match="no component scores"):
        heatmap(dataclasses.replace(make_plan(), scores={}), tmp_path / "map.png")
    with pytest.raises(Steer2EditError, match="cannot write"):
        heatmap(make_plan(), tmp_path / "map.docx")


def test_a_sign_is_called_uncertain_only_where_it_was_resampled() -> None:
    for resampled in (True, False):
        drawing = heads(make_plan(2, 4, 0, resampled=resampled))
        assert drawing is not None and ("not certain" in drawing.caption) == resampled
