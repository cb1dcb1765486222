"""Finished edits that others made come in as the same updates: edit packs, PEFT and GGUF adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from reader_laws import single_readers

from steer2edit.artefact.emit import emit
from steer2edit.artefact.verify import verify
from steer2edit.capture.run import capture_statistics
from steer2edit.capture.vectors import substituted
from steer2edit.data.behavior import Behavior
from steer2edit.errors import DataError
from steer2edit.importers import read, read_vectors
from steer2edit.methods import component, make_plan, steering
from steer2edit.plan import EditPlan, LowRank, merge
from steer2edit.scoring.scores import Scoring

HIDDEN, LAYERS = 32, 3


def directions_file(statistics: Any) -> dict[str, Any]:
    """Captured statistics laid out as Steer2Edit's own code saves them."""
    held: dict[str, Any] = {side: {"pos_mean": {}, "neg_mean": {}, "direction": {}} for side in ("pre", "post")}
    for i in range(LAYERS):
        for key, name in ((f"attn_out.{i}", "self_attn.o_proj"), (f"mlp_out.{i}", "mlp.down_proj")):
            for side, where in (("pre", "input"), ("post", "output")):
                positive, negative = (statistics.mean(key, where, label) for label in ("positive", "negative"))
                place = f"model.layers[{i}].{name}"
                held[side]["pos_mean"][place], held[side]["neg_mean"][place] = positive, negative
                held[side]["direction"][place] = positive - negative
    return held


def test_the_authors_directions_and_edit_pack_give_the_same_plan_as_a_capture(
    tmp_path: Path, scoring: Scoring, loaded: Any
) -> None:
    options = component.Options(rho_attn=0.2, rho_mlp=0.2, alpha=0.5, scale="absolute", stable=False)
    expected = make_plan(scoring, method="component", options=options)
    torch.save(directions_file(scoring.statistics), tmp_path / "dirs.pt")
    vectors = read_vectors(tmp_path / "dirs.pt")
    background = capture_statistics(loaded, scoring.checkpoint, Behavior("background", ()))
    statistics = substituted(vectors, background, scoring.checkpoint, scoring.spec)
    found = make_plan(Scoring(scoring.checkpoint, scoring.spec, statistics), method="component", options=options)
    assert [e.tensor for e in found.edits] == [e.tensor for e in expected.edits] and found.edits
    for a, b in zip(found.edits, expected.edits, strict=True):
        assert isinstance(a, LowRank) and isinstance(b, LowRank)
        assert torch.allclose(a.dense(), b.dense(), atol=1e-5)

    pack: dict[str, Any] = {"attn": {}, "mlp": {}, "meta": {"vhat_attn": {}, "vhat_mlp": {}, "alpha": 0.5}}
    for edit in expected.edits:
        assert isinstance(edit, LowRank)
        site = next(site for site in scoring.spec.sites if site.tensor == edit.tensor)
        kind = "attn" if site.heads else "mlp"
        pack["meta"][f"vhat_{kind}"][site.layer] = edit.B[:, 0]
        for j, part in enumerate(edit.A.view(site.components, -1)):
            if bool(part.any()):
                entry: dict[str, Any] = {"lambda": float(part.norm() if site.heads else part)}
                pack[kind][site.layer, j] = {**entry, "k_hat": part / part.norm()} if site.heads else entry
    torch.save(pack, tmp_path / "pack.pt")
    result = run("import", tmp_path / "pack.pt", "--model", scoring.checkpoint.path, "-o", tmp_path / "p.safetensors")
    assert result.exit_code == 0, result.output
    back = EditPlan.load(tmp_path / "p.safetensors")
    for a, b in zip(back.edits, expected.edits, strict=True):
        assert isinstance(a, LowRank) and isinstance(b, LowRank)
        assert a.tensor == b.tensor and torch.allclose(a.dense(), b.dense(), atol=1e-6)
    pack["attn"][0, 99] = {"lambda": 1.0, "k_hat": torch.ones(16)}
    pack["mlp"][9, 0] = {"lambda": 1.0}
    torch.save(pack, tmp_path / "bad.pt")
    with pytest.raises(DataError, match=r"attn \(0, 99\)(.|\n)*mlp \(9, 0\)"):
        read(tmp_path / "bad.pt").plan(scoring.checkpoint, scoring.spec)  # type: ignore[union-attr]


@pytest.mark.parametrize("to", ["lora", "gguf"])
def test_import_undoes_export(scoring: Scoring, tmp_path: Path, to: str) -> None:
    plan = make_plan(scoring, options=steering.Options(sites="both"))
    plan = merge([plan, replace(plan, edits=plan.edits[1:3])], [0.5, 0.25])
    # llama.cpp's converter reorders the rows of queries and keys, and so does the adapter
    plan = replace(plan, edits=(*plan.edits, *single_readers(scoring.checkpoint, scoring.spec)))
    emit(plan, scoring.checkpoint, scoring.spec, to, tmp_path / "out")
    source = tmp_path / "out" if to == "lora" else tmp_path / "out/adapter.gguf"
    back = read(source).plan(scoring.checkpoint, scoring.spec)  # type: ignore[union-attr]
    assert {e.tensor for e in back.edits} == {e.tensor for e in plan.edits}
    for edit in plan.edits:
        mine = back.edit_of(edit.tensor)
        assert isinstance(mine, LowRank) and isinstance(edit, LowRank)
        assert torch.allclose(mine.dense(), edit.dense(), rtol=0, atol=1e-6 * edit.norm)


def lora(folder: Path, targets_of: tuple[str, ...] = ("o_proj",), **changes: Any) -> Path:
    """An adapter as PEFT itself saves it, with random factors."""
    from peft import LoraConfig, get_peft_model

    from steer2edit.runtime.model import load_weights

    settings: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": list(targets_of), "init_lora_weights": False}
    torch.manual_seed(changes.pop("seed", 1))
    model = get_peft_model(load_weights(folder), LoraConfig(**{**settings, **changes}, task_type="CAUSAL_LM"))
    return model  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"1.self_attn.o_proj": 4}, "alpha_pattern": {"layers.0.self_attn.o_proj": 1}},
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"k_proj": 3}},
    ],
)
def test_peft_adapters_are_the_update_that_peft_merges(
    tmp_path: Path, scoring: Scoring, changes: dict[str, Any]
) -> None:
    model: Any = lora(scoring.checkpoint.path, **changes)
    model.save_pretrained(tmp_path / "adapter")
    result = run("import", tmp_path / "adapter", "--model", scoring.checkpoint.path, "-o", tmp_path / "p.safetensors")
    assert result.exit_code == 0, result.output
    plan = EditPlan.load(tmp_path / "p.safetensors")
    assert len(plan.edits) == (7 if "target_modules" in changes else 1) * LAYERS
    merged = model.merge_and_unload().state_dict()
    for edit in plan.edits:
        assert isinstance(edit, LowRank)
        delta = merged[edit.tensor] - scoring.checkpoint.read(edit.tensor)
        assert torch.allclose(edit.dense(), delta, atol=1e-5)
    emit(plan.scaled(0.5), scoring.checkpoint, scoring.spec, "checkpoint", tmp_path / "half")
    assert verify(tmp_path / "half", scoring.checkpoint.path).ok


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_difference_of_adapters_is_the_difference_of_their_updates_at_its_rank(
    tmp_path: Path, scoring: Scoring
) -> None:
    base = scoring.checkpoint.path
    for name, changes in (("plus", {}), ("minus", {"r": 3, "lora_alpha": 3, "seed": 2})):
        lora(base, target_modules="all-linear", **changes).save_pretrained(tmp_path / name)  # type: ignore[attr-defined]
    out = tmp_path / "d.plan.safetensors"
    found = run("import", tmp_path / "plus", tmp_path / "minus", "--difference", "--model", base, "-o", out)
    assert found.exit_code == 0, found.output
    plan = EditPlan.load(out)
    parts = [read(tmp_path / name).plan(scoring.checkpoint, scoring.spec) for name in ("plus", "minus")]  # type: ignore[union-attr]
    assert len(plan.edits) == 7 * LAYERS
    for edit in plan.edits:
        plus, minus = (part.edit_of(edit.tensor) for part in parts)
        assert isinstance(edit, LowRank) and isinstance(plus, LowRank) and isinstance(minus, LowRank)
        assert len(edit.A) == 5
        assert torch.allclose(edit.dense(), plus.dense() - minus.dense(), atol=1e-5 * edit.norm)
    emit(plan.scaled(0.3), scoring.checkpoint, scoring.spec, "lora", tmp_path / "lora")
    assert verify(tmp_path / "lora", base).ok
    # half of one adapter taken from it: plans are subtracted too, and what both have is stored once
    half = tmp_path / "half.plan.safetensors"
    parts[0].scaled(0.5).save(half)
    assert run("import", tmp_path / "plus", half, "--difference", "--model", base, "-o", out, "--force").exit_code == 0
    for edit in EditPlan.load(out).edits:
        plus = parts[0].edit_of(edit.tensor)
        assert isinstance(edit, LowRank) and isinstance(plus, LowRank) and len(edit.A) == 2
        assert torch.allclose(edit.dense(), 0.5 * plus.dense(), atol=1e-5 * edit.norm)
    for arguments, said in (
        ((tmp_path / "plus", "--difference", "--model", base), "takes two sources"),
        ((tmp_path / "plus", tmp_path / "minus", "--model", base), "add --difference"),
        ((tmp_path / "plus", tmp_path / "minus", "--difference"), "name their base"),
        ((tmp_path / "plus", tmp_path / "plus", "--difference", "--model", base), "their difference is nothing"),
    ):
        refused = run("import", *arguments, "-o", tmp_path / "x.plan.safetensors")
        assert refused.exit_code == 2 and said in refused.output


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_that_are_more_than_plain_lora_are_refused(tmp_path: Path, scoring: Scoring) -> None:
    for name, changes, said in (
        ("dora", {"use_dora": True}, "DoRA"),
        ("bias", {"bias": "all"}, "biases are replaced"),
        ("head", {"modules_to_save": ["lm_head"]}, "whole modules are replaced"),
    ):
        lora(scoring.checkpoint.path, **changes).save_pretrained(tmp_path / name)  # type: ignore[attr-defined,arg-type]
        with pytest.raises(DataError, match=said):
            read(tmp_path / name).plan(scoring.checkpoint, scoring.spec)  # type: ignore[union-attr]
    lora(scoring.checkpoint.path, ("q_proj", "o_proj")).save_pretrained(tmp_path / "reader")  # type: ignore[attr-defined]
    config = tmp_path / "reader/adapter_config.json"
    sound = json.loads(config.read_text())
    config.write_text(json.dumps({**sound, "r": 5}))
    with pytest.raises(DataError, match="has the rank 2, its config says r = 5"):
        read(tmp_path / "reader")
    for strange in ({"lora_alpha": "much"}, {"rank_pattern": [1]}, {"alpha_pattern": {"(": 2}}):
        config.write_text(json.dumps({**sound, **strange}))
        with pytest.raises(DataError, match=r"are not understood|is not what it should be"):
            read(tmp_path / "reader")


def test_a_file_of_edits_is_no_vectors_file(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "adapter").mkdir()
    result = run("import", tmp_path / "adapter", "-o", tmp_path / "x.safetensors")
    assert result.exit_code == 2 and "adapter_config.json" in result.output
    torch.save({"attn": {}, "mlp": {}, "meta": {}}, tmp_path / "pack.pt")
    result = run("compile", tiny_llama, "--vectors", tmp_path / "pack.pt", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "--model MODEL" in result.output
