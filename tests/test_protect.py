"""Protected directions are orthogonal to every vector afterwards, and what has nothing else in it is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, run, save_chat_model

from steer2edit.capture.moments import Moments
from steer2edit.capture.protect import protected
from steer2edit.capture.statistics import Statistics
from steer2edit.capture.vectors import Vectors
from steer2edit.data.answers import LABELS
from steer2edit.errors import PlanError
from steer2edit.methods import describe_data, make_plan
from steer2edit.plan import EditPlan, LowRank
from steer2edit.scoring.scores import Scoring


def turned(statistics: Statistics, seed: int, mixed: float = 0.5) -> Statistics:
    """Statistics of another behaviour: its direction is a mixture of this one's and of a random one."""
    generator = torch.Generator().manual_seed(seed)
    moments = dict(statistics.moments)
    for key in statistics.directions:
        v = statistics.difference(key)
        other = torch.randn(len(v), generator=generator).double() * v.norm() / len(v) ** 0.5
        for label, sign in zip(LABELS, (0.5, -0.5), strict=True):
            one = moments[key, "output", label]
            moments[key, "output", label] = Moments(sign * (mixed * v + (1 - mixed) * other), one.m2)
    return replace(statistics, moments=moments, source={**statistics.source, "name": f"other {seed}"})


@pytest.mark.parametrize("count", [1, 2])
def test_protected_directions_are_orthogonal_to_what_is_left(scoring: Scoring, count: int) -> None:
    statistics = scoring.statistics
    others = [turned(statistics, seed) for seed in range(count)]
    found = protected(statistics, others)
    for key in statistics.directions:
        r = found.difference(key)
        for other in others:
            u = other.difference(key)
            assert abs(float(r @ u)) < 1e-5 * float(r.norm() * u.norm())
            drawn = found.resamples("bootstrap", key, "output").difference().double()
            assert float((drawn @ (u / u.norm())).abs().max()) < 1e-4 * float(drawn.norm(dim=1).max())
        # and nothing else was taken away
        A = torch.stack([other.difference(key) for other in others], dim=1)
        lost = statistics.difference(key) - r
        rest = lost - A @ torch.linalg.lstsq(A, lost[:, None], driver="gelsd").solution[:, 0]
        assert float(rest.norm()) < 1e-6 * float(statistics.difference(key).norm())
        assert torch.allclose(
            found.resamples("bootstrap", key, "output").x_bar(),
            statistics.resamples("bootstrap", key, "output").x_bar(),
            atol=1e-6,
        )


def test_the_edit_does_not_write_along_them(scoring: Scoring) -> None:
    other = turned(scoring.statistics, 3)
    cleared = replace(scoring, statistics=protected(scoring.statistics, [other]), _known={})
    plan = make_plan(cleared)
    owners = {site.matrix: site for site in scoring.spec.sites}
    assert plan.edits and plan.data["protect"] == ["other 3"]
    for edit in plan.edits:
        assert isinstance(edit, LowRank)
        u = other.difference(owners[edit.tensor].vector_key).float()
        assert float((u @ edit.B).abs()) < 1e-4 * float(u.norm() * edit.B.norm())


def test_a_direction_of_the_behaviour_itself_leaves_nothing(scoring: Scoring) -> None:
    same = replace(scoring.statistics, source={**scoring.statistics.source, "name": "itself"})
    with pytest.raises(PlanError, match="nothing of the behaviour is left beside itself"):
        protected(scoring.statistics, [same])


def test_directions_of_another_model_are_refused(scoring: Scoring) -> None:
    other: Any = replace(scoring.statistics, source={**scoring.statistics.source, "fingerprint": "f", "model": "m"})
    with pytest.raises(PlanError, match="directions to protect are of m"):
        protected(scoring.statistics, [other])


def test_nothing_to_protect_changes_nothing(scoring: Scoring) -> None:
    found = protected(scoring.statistics, [])
    assert all(torch.equal(found.difference(k), scoring.statistics.difference(k)) for k in found.directions)
    assert "protect" not in describe_data(scoring.statistics)


def test_the_flag_takes_statistics_and_vectors(tiny_llama: Path, scoring: Scoring, tmp_path: Path) -> None:
    mine, other, plan = (
        tmp_path / name for name in ("a.stats.safetensors", "b.stats.safetensors", "p.plan.safetensors")
    )
    scoring.statistics.save(mine)
    turned(scoring.statistics, 5).save(other)
    result = run("plan", tiny_llama, "--stats", mine, "--protect", other, "-o", plan)
    assert result.exit_code == 0, result.output
    found = EditPlan.load(plan)
    assert found.data["protect"] == ["other 5"]
    # vectors stand for the same directions
    directions = {site.key: scoring.statistics.difference(site.key).float() for site in scoring.spec.sites}
    noise = {key: v + v.norm() * torch.ones(len(v)) / len(v) ** 0.5 for key, v in directions.items()}
    Vectors(noise, source={"name": "noise"}).save(tmp_path / "n.vectors.safetensors")
    result = run(
        "plan", tiny_llama, "--stats", mine, "--protect", tmp_path / "n.vectors.safetensors", "-o", plan, "--force"
    )
    assert result.exit_code == 0, result.output
    owners = {site.matrix: site.key for site in scoring.spec.sites}
    for edit in EditPlan.load(plan).edits:
        assert isinstance(edit, LowRank)
        u = noise[owners[edit.tensor]]
        assert float((u @ edit.B).abs()) < 1e-4 * float(u.norm() * edit.B.norm())


@pytest.mark.parametrize(
    ("direction", "message"), [("nothing", "no such file, and the built-in"), ("formal", "plan runs no model")]
)
def test_a_direction_that_is_not_there_is_named(
    tiny_llama: Path, scoring: Scoring, tmp_path: Path, direction: str, message: str
) -> None:
    scoring.statistics.save(tmp_path / "a.stats.safetensors")
    result = run(
        "plan", tiny_llama, "--stats", tmp_path / "a.stats.safetensors", "--protect", direction, "-o", tmp_path / "p"
    )
    assert result.exit_code == 2 and message in result.stderr


def test_compile_captures_a_behaviour_to_protect(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "talker")
    data, neutral = tmp_path / "d.jsonl", tmp_path / "neutral.txt"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    neutral.write_text("Rain fell on the hills and on the sea. " * 40)
    result = run(
        "compile", folder, "--data", data, "--protect", "formal", "--background", neutral, "--neutral", neutral,
        "--strength", "0.1", "--all-components", "--to", "lora", "-o", tmp_path / "out", "--no-report",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    receipt = json.loads((tmp_path / "out" / "steer2edit.json").read_text())
    assert receipt["data"]["protect"] == ["formal"]
