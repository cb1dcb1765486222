"""Every multimodal model, tiny and random: its language model is found in its place, and edited there alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import Case, blocks, last_logits
from mixture_models import experts_down, writing_parameters
from reader_laws import check_readers, single_readers
from wrapper_models import AROUND, WRAPPED, WRAPPERS

from steer2edit.architecture import MatrixRole
from steer2edit.architecture.wrappers import MULTIMODAL
from steer2edit.artefact.emit import emit
from steer2edit.artefact.numbers import TOLERANCE
from steer2edit.artefact.verify import verify
from steer2edit.checkpoint import open_checkpoint
from steer2edit.errors import TargetError
from steer2edit.plan import Base, EditPlan
from steer2edit.targets.lora import MISREAD_BY_PEFT, NO_ADAPTER


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, statistics_of: Callable[..., Any]) -> Callable[[str], Case]:
    root = tmp_path_factory.mktemp("wrappers")
    return functools.cache(lambda name: Case(WRAPPERS[name](root / name), statistics_of))


@pytest.fixture(params=list(WRAPPERS))
def case(request: pytest.FixtureRequest, build: Callable[[str], Case]) -> Case:
    return build(request.param)


def test_the_multimodal_models_are_those_that_are_named() -> None:
    assert {*WRAPPED, *AROUND} == set(MULTIMODAL)


def test_every_writer_is_a_module_of_the_whole_model_and_there_are_no_others(case: Case) -> None:
    loaded, spec = case.loaded(), case.spec
    for site in spec.sites:
        held = experts_down(loaded, site) if site.expert is not None else loaded.module(site).weight
        assert torch.equal(held, case.matrix(site))
    heads = {site.heads for site in spec.sites if site.role is MatrixRole.ATTN_OUT}
    assert heads == {4}
    assert loaded.module(spec.embedding) is loaded.model.get_input_embeddings()
    assert torch.equal(loaded.module(spec.embedding).weight, case.checkpoint.read(spec.embedding.tensor))
    # without its writers a model knows no context, whatever else is in its blocks
    before = last_logits(loaded)
    assert (before[0] - before[1]).abs().max() > 1e-4
    ours = {id(p): p for site in spec.sites for p in writing_parameters(loaded.module(site))}
    for parameter in ours.values():
        parameter.zero_()
    silent = last_logits(loaded)
    assert torch.equal(silent[0], silent[1])
    others = [p for block in blocks(loaded) for p in block.parameters() if p.ndim >= 2 and id(p) not in ours]
    assert others
    for parameter in others:
        parameter.normal_()
    assert torch.equal(last_logits(loaded), silent)


def test_readers_are_all_that_reads_the_stream(case: Case) -> None:
    check_readers(case.checkpoint, case.loaded())


def test_a_plan_becomes_a_checkpoint_and_an_adapter_that_act_in_the_whole_model(case: Case, tmp_path: Path) -> None:
    plan = case.plan("component")
    assert plan.edits
    plan = replace(plan, edits=(*plan.edits, *single_readers(case.checkpoint, case.spec)))
    plain = replace(plan, edits=tuple(edit for edit in plan.edits if in_adapters(case, edit.tensor)))
    carried = {"checkpoint": plan, "lora": plain} if plain.edits else {"checkpoint": plan}
    if plain.edits != plan.edits:
        with pytest.raises(TargetError, match="carries none of these"):
            emit(plan, case.checkpoint, case.spec, "lora", tmp_path / "lora")
    assert plain.edits or case.spec.model_type in ("deepseek_ocr2_text", "unlimited_ocr_text")
    for target, edits in carried.items():
        emit(edits, case.checkpoint, case.spec, target, tmp_path / target)
        result = verify(tmp_path / target, base=case.folder)
        assert result.ok, result.problems
        assert result.numbers["difference"] <= TOLERANCE < result.numbers["effect"]
    edited = open_checkpoint(tmp_path / "checkpoint")
    ours = {site.tensor for site in (*case.spec.sites, *case.spec.readers)}
    assert edited.tensors.keys() == case.checkpoint.tensors.keys()
    for name in edited.tensors.keys() - ours:
        assert torch.equal(edited.read(name), case.checkpoint.read(name))


def test_an_adapter_for_a_language_model_alone_says_so(build: Callable[[str], Case], tmp_path: Path) -> None:
    case = build("llama4")
    edits = single_readers(case.checkpoint, case.spec)
    lowering = emit(
        EditPlan(Base.of(case.checkpoint), tuple(edits)), case.checkpoint, case.spec, "lora", tmp_path / "lora"
    )
    assert any("AutoModelForCausalLM" in note and "language_model." in note for note in lowering.notes)
    card = (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForCausalLM" in card and "ImageText" not in card and "image-text" not in card


def in_adapters(case: Case, tensor: str) -> bool:
    """Whether an adapter carries a matrix's edit: none carries an expert's."""
    site, model_type = case.spec.owners[tensor], case.spec.model_type
    mixer = site.role is MatrixRole.MIXER_OUT and model_type in NO_ADAPTER
    return site.expert is None and not mixer and site.role not in MISREAD_BY_PEFT.get(model_type, ())
