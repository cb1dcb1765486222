"""Composed plans are exactly the sum of their parts, and what they share is what the matrices say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROWS, run

from steer2edit.artefact.verify import verify
from steer2edit.compose import compose, names, overlap, questions_of, rescale
from steer2edit.errors import PlanError
from steer2edit.files.layout import INTERFERENCE, PLAN
from steer2edit.methods import component, make_plan, steering
from steer2edit.notices import collected
from steer2edit.plan import EditPlan, LowRank, Measured, NewBias, Scale, merge
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel
from steer2edit.scoring.scores import Scoring


@pytest.fixture(scope="module")
def parts(scoring: Scoring) -> list[EditPlan]:
    """Two plans of different methods and sites, with behaviours of different names."""
    first = make_plan(scoring, options=steering.Options(sites="both")).scaled(0.3)
    second = make_plan(scoring, method="component", options=component.Options(top_heads=4, top_neurons=8)).scaled(0.4)
    turned = tuple(replace(e, B=e.B.flip(0)) for e in second.edits if isinstance(e, LowRank))
    return [
        replace(first, data={**first.data, "name": "one"}),
        replace(second, edits=turned, data={**second.data, "name": "two", "prompts": ["00ff"]}),
    ]


@pytest.fixture
def files(parts: list[EditPlan], tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "one.plan.safetensors", tmp_path / "two.plan.safetensors"]
    for plan, path in zip(parts, paths, strict=True):
        plan.save(path)
    return paths


@pytest.fixture
def neutral(tmp_path: Path) -> Path:
    path = tmp_path / "neutral.txt"
    path.write_text(" ".join(row["positive"] for row in ROWS) * 10)
    return path


def test_a_composed_model_is_the_model_under_all_hooks_at_once(loaded: LoadedModel, parts: list[EditPlan]) -> None:
    ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        with edited(loaded, parts[0], 1.0), edited(loaded, parts[1], -0.5):
            apart = loaded.model(input_ids=ids).logits
        with edited(loaded, merge(parts, [1.0, -0.5])):
            together = loaded.model(input_ids=ids).logits
    assert torch.allclose(apart, together, atol=1e-4)


def test_overlaps_are_those_of_the_dense_updates(scoring: Scoring, parts: list[EditPlan]) -> None:
    spec = scoring.spec
    dense = [{e.tensor: e.dense().double() for e in plan.edits if isinstance(e, LowRank)} for plan in parts]
    both = [site for site in spec.sites if all(site.matrix in one for one in dense)]
    total, *sites = overlap(parts, spec)
    assert [o.site for o in sites] == [site.key for site in both] and len(both) > 2
    inner = 0.0
    for site, found in zip(both, sites, strict=True):
        a, b = (one[site.matrix] for one in dense)
        product = float((a * b).sum())
        inner += product
        assert found.update == pytest.approx(product / float(a.norm() * b.norm()), abs=1e-5)
        energy = [(m.square().sum(dim=0).view(site.components, -1).sum(dim=1) / m.square().sum()) for m in (a, b)]
        assert found.components == pytest.approx(float(torch.minimum(*energy).sum()), abs=1e-5)
        a_hat, b_hat = (torch.linalg.svd(m).U[:, 0] for m in (a, b))
        assert abs(found.direction) == pytest.approx(abs(float(a_hat @ b_hat)), abs=1e-4)
    size = [sum(float(m.square().sum()) for m in one.values()) ** 0.5 for one in dense]
    assert total.site is None and total.update == pytest.approx(inner / (size[0] * size[1]), abs=1e-5)


def test_a_plan_shares_everything_with_itself_and_nothing_with_other_sites(
    scoring: Scoring, parts: list[EditPlan]
) -> None:
    for found in overlap([parts[0], parts[0].scaled(-2.0)], scoring.spec):
        assert (found.update, found.direction, found.components) == pytest.approx((-1, -1, 1), abs=1e-5)
    halves = [replace(parts[0], edits=edits) for edits in (parts[0].edits[:2], parts[0].edits[2:])]
    assert [(o.site, o.update) for o in overlap(halves, scoring.spec)] == [(None, 0.0)]


def test_biases_are_compared_and_matrices_that_are_scaled_are_counted(
    scoring: Scoring, parts: list[EditPlan], tmp_path: Path
) -> None:
    edits = [edit for edit in parts[0].edits if isinstance(edit, LowRank)][:2]
    name, delta = edits[0].tensor.replace(".weight", ".bias"), torch.linspace(-1, 1, edits[0].B.shape[0])
    first = replace(parts[0], edits=(*edits, NewBias(name, delta)))
    factors = torch.linspace(0.5, 2, edits[0].B.shape[0], dtype=torch.float64)
    scaled = Scale(edits[0].tensor, factors, "rows")
    second = replace(parts[0], edits=(scaled, edits[1].scaled(-1), NewBias(name, -2 * delta)))
    total, *rest = overlap([first, second], scoring.spec)
    assert [o.update for o in rest] == [None, pytest.approx(-1), pytest.approx(-1)] and rest[-1].site == name
    inner = edits[1].norm ** 2 + 2 * float(delta @ delta)
    mine = (sum(e.norm**2 for e in edits) + float(delta @ delta)) ** 0.5
    theirs = (edits[1].norm ** 2 + 4 * float(delta @ delta)) ** 0.5
    assert total.update == pytest.approx(-inner / (mine * theirs), rel=1e-4)
    other = replace(parts[1], edits=(scaled,))
    both = []
    for place, plan in enumerate((replace(parts[0], edits=tuple(edits)), other)):
        plan.save(tmp_path / f"{place}.plan.safetensors")
        both += ["--plan", tmp_path / f"{place}.plan.safetensors"]
    made = run("compile", scoring.checkpoint.path, *both, "--out", tmp_path / "out", "--no-report")
    assert made.exit_code == 0, made.output
    assert "one and two edit 1 of the same matrices" in made.output and "Not compared" in made.output


def test_two_plans_of_one_behaviour_are_told_apart_and_asked_its_questions_once(parts: list[EditPlan]) -> None:
    both = [replace(plan, data={**plan.data, "name": "concise"}) for plan in parts]
    assert names(both) == ["concise 1", "concise 2"]
    assert list(questions_of(both, None)) == ["concise"]
    with collected() as told:
        assert questions_of(parts, None) == {}
    assert [name in text for name, text in zip(("one", "two"), told, strict=True)] == [True, True]


@pytest.mark.parametrize("weights", [("--weight", "1", "--weight", "-0.5"), ("--weight", "1", "-0.5")])
def test_composition_from_the_command_line(
    scoring: Scoring, parts: list[EditPlan], files: list[Path], tmp_path: Path, weights: tuple[str, ...]
) -> None:
    base = scoring.checkpoint.path
    plans = ("--plan", files[0], "--plan", files[1])
    made = run("compile", base, *plans, *weights, "--to", "lora", "--out", tmp_path / "out", "--no-report", "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["interference"]["plans"] == ["one", "two"]
    plan = EditPlan.load(tmp_path / "out" / PLAN)
    assert plan.hash == merge(parts, [1.0, -0.5]).hash
    assert plan.data["name"] == "one + two" and "00ff" in plan.seen
    assert (tmp_path / "out" / INTERFERENCE).is_file()
    assert verify(tmp_path / "out", base).ok
    assert run("show", tmp_path / "out").exit_code == 0


def test_a_composition_is_measured_on_each_behaviours_questions_alone_and_together(
    scoring: Scoring, files: list[Path], neutral: Path, tmp_path: Path
) -> None:
    asked = []
    for name, nouns in (("a", ("cat", "dog", "tree", "house")), ("b", ("river", "stone", "bird", "fish"))):
        rows = [
            {
                "prompt": f"why is the {noun} {word} ?",
                "positive": f"the {noun} is .",
                "negative": f"it was {word} , well .",
            }
            for noun in nouns
            for word in ("red", "green", "old")
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        asked += ["--eval", path]
    plans = ("--plan", files[0], "--plan", files[1])
    options = (*asked, "--neutral", neutral, "--kl-budget", "0.02", "--out", tmp_path / "out", "--to", "lora")
    options += ("--repetition-penalty", "1.2")
    made = run("compile", scoring.checkpoint.path, *plans, *options)
    assert made.exit_code == 0, made.output
    assert "on the held-out questions of one" in made.output and "together" in made.output
    described = json.loads((tmp_path / "out" / INTERFERENCE).read_text())
    for name in ("one", "two"):
        rows = described["evaluations"][name]["rows"]
        assert [row["name"] for row in rows] == ["base", "one", "two", "together"]
        assert described["evaluations"][name]["context"]["repetition_penalty"] == 1.2
        assert rows[-1]["metrics"]["KL on prose"]["value"] == pytest.approx(0.02, rel=0.2)
    plan = EditPlan.load(tmp_path / "out" / PLAN)
    assert 0.9 * 0.02 <= plan.measured.kl <= 0.02


def test_scale_gives_another_dose(
    scoring: Scoring, parts: list[EditPlan], files: list[Path], neutral: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.plan.safetensors"
    assert run("scale", files[0], "--by", "0.5", "-o", out).exit_code == 0
    half = EditPlan.load(out)
    assert half.norm == pytest.approx(0.5 * parts[0].norm) and half.measured == Measured(strength=0.5)
    assert rescale(half, factor=4.0).measured == Measured(strength=2.0)
    budget = ("--kl-budget", "0.02", "--neutral", neutral)
    settled = run("scale", files[0], "--model", scoring.checkpoint.path, *budget, "-o", out, "--force")
    assert settled.exit_code == 0, settled.output
    plan = EditPlan.load(out)
    assert 0.9 * 0.02 <= plan.measured.kl <= 0.02
    assert plan.norm == pytest.approx(plan.measured.strength * parts[0].norm, rel=1e-4)


def test_contradictions_are_usage_errors(
    scoring: Scoring, files: list[Path], parts: list[EditPlan], tmp_path: Path
) -> None:
    base, plan, out = scoring.checkpoint.path, ("--plan", files[0]), ("--out", tmp_path / "out")
    for arguments, said in (
        ((*plan, "--weight", "1", "2", *out), "1 plans and 2 weights"),
        ((*plan, "--behavior", "concise", *out), "takes no --behavior"),
        ((*plan, "--vectors", files[0], *out), "takes no --vectors"),
        (("--behavior", "concise", "--weight", "1", *out), "--weight belongs to --plan"),
        ((*plan, "--eval", "a", "--eval", "b", *out), "one --eval for each"),
        ((*plan, "--repetition-penalty", "1.1", "--no-report", *out), "leave one of the two out"),
        ((*plan, "--weight", "nan", "--no-report", *out), "finite"),
        (("--plan", tmp_path / "none", *out), "none"),
    ):
        result = run("compile", base, *arguments)
        assert result.exit_code == 2 and said in result.output, (arguments, result.output)
    assert not (tmp_path / "out").exists()
    assert run("scale", files[0], "-o", tmp_path / "x").exit_code == 2
    assert run("scale", files[0], "--kl-budget", "0.1", "-o", tmp_path / "x").exit_code == 2
    with pytest.raises(PlanError, match="either --by"):
        rescale(parts[0], factor=1.0, kl_budget=0.1)
    other = replace(parts[1], base=replace(parts[1].base, fingerprint="0" * 64))
    with pytest.raises(PlanError, match="different models"):
        compose(base, [parts[0], other], [1.0, 1.0], tmp_path / "out", measure=False)
    assert names([parts[0], parts[0], parts[1]]) == ["one 1", "one 2", "two"]
