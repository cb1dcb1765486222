"""Rows and columns that are scaled: what hooks do, files hold, compositions multiply and adapters carry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import llama_config, run, save_tiny
from family_configs import family_config
from fp8_models import quantise
from mixture_models import MODELS

from steer2edit.architecture import ModelSpec, Site, read_spec
from steer2edit.artefact.emit import emit
from steer2edit.artefact.numbers import TOLERANCE
from steer2edit.artefact.verify import verify
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.diff.difference import compare, recover_plan
from steer2edit.errors import PlanError, TargetError
from steer2edit.evaluation.baselines import random_direction
from steer2edit.lowering import resolve
from steer2edit.lowering.rewrite import edited_blocks
from steer2edit.plan import Base, Bias, Edit, EditPlan, LowRank, Scale, ScaleAdd, merge

FAMILIES = ("llama", "gpt2", "gemma2", "mixtral")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Checkpoint, ModelSpec]]:
    @functools.cache
    def make(family: str) -> tuple[Checkpoint, ModelSpec]:
        folder = tmp_path_factory.mktemp("scaled") / family
        if family == "mixtral":
            MODELS[family](folder)
        else:
            save_tiny(folder, llama_config() if family == "llama" else family_config(family))
        checkpoint = open_checkpoint(folder)
        return checkpoint, read_spec(checkpoint)

    return make


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def columns(site: Site, chosen: list[int], factor: float) -> Scale:
    factors = torch.ones(site.in_features, dtype=torch.float64)
    factors[chosen] = factor
    return Scale(site.matrix, factors, "columns")


def rows(site: Site) -> list[Edit]:
    factors = 1 + 0.3 * random(site.out_features, seed=2).double()
    return [Scale(name, factors, "rows") for name in (site.matrix, site.bias_vector) if name]


def low_rank(site: Site) -> LowRank:
    return LowRank(site.matrix, 0.2 * random(site.out_features, 1), 0.2 * random(1, site.in_features, seed=1))


def planned(checkpoint: Checkpoint, *edits: Edit) -> EditPlan:
    return EditPlan(Base.of(checkpoint), edits)


def matrix_after(checkpoint: Checkpoint, spec: ModelSpec, plan: EditPlan, site: Site) -> torch.Tensor:
    """W' [out, in] as the checkpoint target writes it."""
    edit, _ = resolve(plan, checkpoint, spec).edits[site.matrix]
    stored = torch.cat([block.new.clone() for block in edited_blocks(checkpoint, edit, site)])
    return stored if site.orientation == "out_in" else stored.T


def matrix(checkpoint: Checkpoint, site: Site) -> torch.Tensor:
    stored = checkpoint.read(site.locate(checkpoint))
    return stored if site.orientation == "out_in" else stored.T


@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_weights_are_the_model_under_hooks(
    opened: Callable[[str], tuple[Checkpoint, ModelSpec]], family: str, tmp_path: Path
) -> None:
    checkpoint, spec = opened(family)
    silenced = [columns(site, list(range(0, site.in_features, 3)), 0.0) for site in spec.sites]
    gained = [edit for site in spec.sites for edit in rows(site)]
    added = [low_rank(site) for site in spec.sites]
    plan = merge([planned(checkpoint, *edits) for edits in (added, silenced, gained)])
    site = spec.sites[1]
    W, C = matrix(checkpoint, site), columns(site, list(range(0, site.in_features, 3)), 0.0).factors
    R = rows(site)[0].factors  # type: ignore[union-attr]
    assert torch.allclose(
        matrix_after(checkpoint, spec, plan, site),
        (R[:, None] * W * C).float() + added[1].dense(),
        atol=1e-6,
    )
    plan.save(tmp_path / "x.plan.safetensors")
    assert EditPlan.load(tmp_path / "x.plan.safetensors").hash == plan.hash
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "out")
    result = verify(tmp_path / "out", base=checkpoint.path)
    assert result.ok, result.problems
    assert result.numbers["difference"] <= TOLERANCE < result.numbers["effect"]


def test_strength_0_is_the_base_and_1_the_plan(opened: Callable[[str], tuple[Checkpoint, ModelSpec]]) -> None:
    checkpoint, spec = opened("llama")
    site = spec.sites[0]
    plan = merge([planned(checkpoint, columns(site, [1, 5], -0.5)), planned(checkpoint, low_rank(site))])
    W = matrix(checkpoint, site)
    assert torch.equal(matrix_after(checkpoint, spec, plan.scaled(0.0), site), W)
    change = matrix_after(checkpoint, spec, plan, site) - W
    half = matrix_after(checkpoint, spec, plan.at_strength(0.5), site) - W
    assert torch.allclose(half, change / 2, atol=1e-6)
    again = plan.at_strength(0.5).at_strength(2.0)
    assert torch.allclose(matrix_after(checkpoint, spec, again, site), W + change, atol=1e-6)
    gain = Scale.whole(site.matrix, 0.5)
    assert gain.scaled(3.0) is gain  # an expert's gain has no strength


def test_factors_multiply_and_updates_stay_whole(opened: Callable[[str], tuple[Checkpoint, ModelSpec]]) -> None:
    checkpoint, spec = opened("llama")
    site = spec.sites[0]
    parts = [
        planned(checkpoint, columns(site, [1, 5], 0.5)),
        planned(checkpoint, low_rank(site)),
        planned(checkpoint, columns(site, [5, 7], 0.5)),
    ]
    whole = [merge(order) for order in (parts, parts[::-1], [merge(parts[:2]), parts[2]])]
    first, *others = (matrix_after(checkpoint, spec, plan, site) for plan in whole)
    assert all(torch.equal(first, other) for other in others)
    edit = whole[0].edits[0]
    assert isinstance(edit, ScaleAdd) and edit.added is not None
    assert edit.scales[0].factors[[1, 5, 7]].tolist() == [0.5, 0.25, 0.5]
    with pytest.raises(PlanError, match="different operations"):
        merge(
            [planned(checkpoint, low_rank(site)), planned(checkpoint, Bias(site.matrix, torch.ones(site.out_features)))]
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("to", ["lora", "gguf"])
def test_few_columns_and_rows_are_exact_in_adapters(
    opened: Callable[[str], tuple[Checkpoint, ModelSpec]], family: str, to: str, tmp_path: Path
) -> None:
    checkpoint, spec = opened(family)
    edits: list[Edit] = [columns(site, [2, 9], 0.0) for site in spec.sites[:3]]
    plan = merge([planned(checkpoint, *edits), planned(checkpoint, low_rank(spec.sites[0]))])
    if family == "llama":
        factors = torch.ones(spec.hidden_size, dtype=torch.float64)
        factors[4] = 2.5
        scaled = [Scale(site.matrix, factors, "rows") for site in spec.sites[:3]]
        plan = merge([plan, planned(checkpoint, *scaled)])
    lowering = emit(plan, checkpoint, spec, to, tmp_path / "out")
    assert lowering.exactness == "exact" and lowering.details["rank"] == (4 if family == "llama" else 3)
    result = verify(tmp_path / "out", base=checkpoint.path)
    assert result.ok, result.problems
    assert result.numbers["difference"] <= TOLERANCE < result.numbers["effect"]


def test_a_random_control_silences_as_many_other_heads(
    opened: Callable[[str], tuple[Checkpoint, ModelSpec]],
) -> None:
    checkpoint, spec = opened("gpt2")
    head = columns(spec.sites[0], list(range(8, 16)), 0.0)
    plan = planned(checkpoint, head, *rows(spec.sites[1]))
    places = set()
    for seed in range(12):
        drawn, matrix, bias = random_direction(plan, seed).edits
        assert isinstance(drawn, Scale) and isinstance(matrix, Scale) and isinstance(bias, Scale)
        gone = (drawn.factors == 0).nonzero()[:, 0]
        assert len(gone) == 8 and int(gone[0]) % 8 == 0 and int(gone[-1]) == int(gone[0]) + 7
        places.add(int(gone[0]))
        # a matrix and its bias keep one gain, which hooks need
        assert torch.equal(matrix.factors, bias.factors)
        assert torch.equal(matrix.factors.sort().values, rows(spec.sites[1])[0].factors.sort().values)  # type: ignore[union-attr]
    assert len(places) > 1


def test_what_adapters_do_not_carry_is_refused(
    opened: Callable[[str], tuple[Checkpoint, ModelSpec]], tmp_path: Path
) -> None:
    checkpoint, spec = opened("llama")
    site = spec.sites[1]
    whole = planned(checkpoint, columns(site, list(range(site.in_features)), 0.5))
    few = planned(checkpoint, columns(site, [3], 0.0))
    for to in ("lora", "gguf", "mlx"):
        with pytest.raises(TargetError, match="48 scaled columns, which is an update of full rank"):
            emit(whole, checkpoint, spec, to, tmp_path / to)
    with pytest.raises(TargetError, match="scaled rows or columns add no vector"):
        emit(few, checkpoint, spec, "gguf-vector", tmp_path / "vector")


def test_silenced_columns_of_fp8_are_zero_and_the_rest_keeps_its_bytes(
    opened: Callable[[str], tuple[Checkpoint, ModelSpec]], tmp_path: Path
) -> None:
    quantised = quantise(opened("llama")[0].path, tmp_path / "fp8")
    checkpoint = open_checkpoint(quantised)
    spec = read_spec(checkpoint)
    site = spec.sites[0]
    plan = planned(checkpoint, columns(site, [2, 9], 0.0))
    edit, _ = resolve(plan, checkpoint, spec).edits[site.matrix]
    for block in edited_blocks(checkpoint, edit, site):
        assert not block.new[:, [2, 9]].any()
        others = [i for i in range(site.in_features) if i not in (2, 9)]
        assert torch.equal(block.before.view(torch.uint8)[:, others], block.after.view(torch.uint8)[:, others])
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "out")
    result = verify(tmp_path / "out", base=quantised)
    assert result.ok, result.problems


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_diff_recognises_scaled_lines(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    save_tiny(folder, llama_config() if family == "llama" else family_config(family), dtype)
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    plan = planned(checkpoint, columns(spec.sites[0], [2, 9], 0.0), *rows(spec.sites[1])[:1], low_rank(spec.sites[2]))
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "out")
    edited = open_checkpoint(tmp_path / "out")
    recovered, left_out = recover_plan(compare(checkpoint, edited), checkpoint, spec)
    assert not left_out
    kinds = {edit.tensor: edit for edit in recovered.edits}
    for edit in plan.edits[:2]:
        again = kinds[edit.tensor]
        assert isinstance(edit, Scale) and isinstance(again, Scale) and again.axis == edit.axis
        assert torch.allclose(again.factors, edit.factors, atol=1e-2 if dtype is torch.bfloat16 else 1e-6)
    assert isinstance(kinds[plan.edits[2].tensor], LowRank)
    told = run("diff", folder, tmp_path / "out").stdout
    assert "2 columns scaled" in told or "2 rows scaled" in told


def test_show_says_what_is_scaled(opened: Callable[[str], tuple[Checkpoint, ModelSpec]], tmp_path: Path) -> None:
    checkpoint, spec = opened("llama")
    planned(checkpoint, columns(spec.sites[0], [2, 9], 0.0)).save(tmp_path / "x.plan.safetensors")
    assert "2 of 64 columns × 0" in run("show", tmp_path / "x.plan.safetensors").stdout


def test_factors_that_do_not_fit_are_named(opened: Callable[[str], tuple[Checkpoint, ModelSpec]]) -> None:
    checkpoint, spec = opened("llama")
    wrong = planned(checkpoint, Scale(spec.sites[0].matrix, torch.ones(3, dtype=torch.float64), "columns"))
    with pytest.raises(PlanError, match=r"column_scale \[3\]"):
        resolve(wrong, checkpoint, spec)
