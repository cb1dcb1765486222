"""Constants as files: artefacts, receipts, reverts, adapters and control vectors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from constant_models import Model, models_in
from fp8_models import quantise
from safetensors.torch import load_file, save_file

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.artefact.revert import revert
from steer2edit.artefact.verify import verify
from steer2edit.checkpoint import open_checkpoint
from steer2edit.diff.difference import compare, recover_plan
from steer2edit.dry_run import widest_plan
from steer2edit.errors import PlanError, TargetError
from steer2edit.lowering import Writing, resolve
from steer2edit.lowering.disk_use import disk_use
from steer2edit.methods import make_plan
from steer2edit.plan import Bias, EditPlan, NewBias, Structure, merge
from steer2edit.targets import load


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory, statistics_of: Callable[..., Any]) -> Callable[[str], Model]:
    return models_in(tmp_path_factory.mktemp("constants"), statistics_of)


@pytest.mark.parametrize("name", ["llama", "llama-sharded"])
def test_emitted_verified_compared_and_reverted(name: str, model_of: Callable[[str], Model], tmp_path: Path) -> None:
    model = model_of(name)
    plan = merge([model.plan(layer=1), model.plan(layers=(0, 2), place="writers"), make_plan(model.scoring)])
    assert {edit.op for edit in plan.edits} == {"new_bias", "low_rank"}
    plan.save(tmp_path / "p.safetensors")
    assert EditPlan.load(tmp_path / "p.safetensors").hash == plan.hash
    out = model.emit(plan, "checkpoint", tmp_path / "out")
    result = verify(out, base=model.folder)
    assert result.ok, result.problems
    assert len(result.rounding) == len(plan.edits)
    receipt = json.loads((out / "steer2edit.json").read_text())
    created = receipt["details"]["created"]
    assert (
        created["settings"] == ["attention_bias", "mlp_bias"] and created["biases"] == 3 * 7 and created["zeros"] == 15
    )
    ops = [change["op"] for change in receipt["changed"]]
    assert ops.count("NewBias") == 6 and ops.count("zeros") == 15
    config = json.loads((out / "config.json").read_text())
    assert config.pop("attention_bias") is config.pop("mlp_bias") is True
    before = json.loads((model.folder / "config.json").read_text())
    assert config == {key: value for key, value in before.items() if key not in ("attention_bias", "mlp_bias")}

    published = load("checkpoint").loading_files(out, sorted(path.name for path in out.iterdir()))
    assert {created["file"], "config.json", "model.safetensors.index.json"} <= published
    assert set(open_checkpoint(out).shards) <= published

    difference = compare(model.checkpoint, open_checkpoint(out))
    recovered, left_out = recover_plan(difference, model.checkpoint, model.spec)
    assert {e.tensor for e in recovered.edits if isinstance(e, NewBias)} == {
        e.tensor for e in plan.edits if isinstance(e, NewBias)
    }
    assert not [name for name in left_out if name.endswith(".bias")]
    told = run("diff", model.folder, out).output
    assert "only in the edited checkpoint (15 of them zeros)" in told

    for place in (None, tmp_path / "back"):
        edited_copy = shutil.copytree(out, tmp_path / f"copy-{place is None}")
        reverted = revert(edited_copy, model.folder, place)
        assert reverted.proven and len(reverted.tensors) == len(receipt["changed"])
        for path in model.folder.iterdir():
            assert (reverted.folder / path.name).read_bytes() == path.read_bytes(), path.name
        names = {path.name for path in reverted.folder.iterdir()}
        assert names <= {path.name for path in model.folder.iterdir()} | {"README.md"}


def _a_value(out: Path) -> None:
    shard = (
        next(out.glob("model-*new-biases*"))
        if list(out.glob("*new-biases*"))
        else out / "model-00002-of-00002.safetensors"
    )
    tensors = load_file(shard)
    name = next(name for name, value in tensors.items() if not bool(value.any()))
    save_file({**tensors, name: tensors[name] + 1}, shard, {"format": "pt"})


def _a_tensor(out: Path) -> None:
    shard = out / "model-00002-of-00002.safetensors"
    save_file({**load_file(shard), "model.extra": torch.zeros(2)}, shard, {"format": "pt"})


def _the_setting(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "mlp_bias": False}))


def _the_index(out: Path) -> None:
    path = out / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].popitem()
    path.write_text(json.dumps(index))


def _one_file(out: Path) -> None:
    shutil.copyfile(out / "model-00001-of-00002.safetensors", out / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_a_value, "differs from the plan"),
        (_a_tensor, "model.extra is not in the plan"),
        (_the_setting, "config.json is not the base's with the plan's changes"),
        (_the_index, "model.safetensors.index.json"),
        (_one_file, "model.safetensors is neither the base's nor"),
    ],
)
def test_what_is_changed_in_an_artefact_is_named(
    change: Callable[[Path], None], told: str, model_of: Callable[[str], Model], tmp_path: Path
) -> None:
    model = model_of("llama")
    out = model.emit(model.plan(), "checkpoint", tmp_path / "out")
    change(out)
    problems = verify(out, base=model.folder, numbers=False).problems
    assert any(told in problem for problem in problems), problems
    if change is not _one_file and change is not _the_setting:
        with pytest.raises(Exception, match=r"."):
            revert(out, model.folder, tmp_path / "back")


def test_unedited_shards_are_linked_and_the_disk_use_counts_the_biases(
    model_of: Callable[[str], Model], tmp_path: Path
) -> None:
    model = model_of("llama-sharded")
    plan = model.plan()
    out = model.emit(plan, "checkpoint", tmp_path / "out", link=True)
    shards = model.checkpoint.shards
    assert all((out / shard).stat().st_ino == (model.folder / shard).stat().st_ino for shard in shards)
    assert verify(out, base=model.folder).ok
    resolved = resolve(plan, model.checkpoint, model.spec)
    use = disk_use(resolved, "checkpoint", tmp_path / "new", Writing(), whole_model=True, measure=False)
    assert use.tensors == 9 and use.edited == 0
    widest = widest_plan(model.checkpoint, model.spec, "constant", None)
    assert {edit.tensor for edit in plan.edits} <= {edit.tensor for edit in widest.edits}


def test_a_control_vector_is_exact_where_the_constant_ends_its_block(
    model_of: Callable[[str], Model], tmp_path: Path
) -> None:
    model = model_of("llama")
    for options, exact in (
        ({"layers": (1, 2)}, True),
        ({"layer": 0}, False),
        ({"layer": 1, "place": "after-attention"}, False),
    ):
        plan = model.plan(**options)
        out = tmp_path / str(options)
        lowering = emit(plan, model.checkpoint, model.spec, "gguf-vector", out)
        assert lowering.exactness == ("exact" if exact else "approximate")
        result = verify(out, base=model.folder)
        assert result.ok, result.problems
        assert (result.numbers["unexplained"] is not None) is exact
        if exact:
            assert result.numbers["difference"] <= 1e-4 < result.numbers["effect"]


@pytest.mark.parametrize("to", ["gguf", "mlx"])
def test_adapters_that_carry_no_bias_say_so(to: str, model_of: Callable[[str], Model], tmp_path: Path) -> None:
    model = model_of("llama")
    with pytest.raises(TargetError, match="a bias"):
        model.emit(model.plan(), to, tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_peft_adapter_carries_constants_as_biases_of_lora_b(
    name: str, model_of: Callable[[str], Model], tmp_path: Path
) -> None:
    """On a base with biases, and on one without."""
    model = model_of(name)
    plan = merge([model.plan(layer=1), make_plan(model.scoring).scaled(0.3)])
    out = model.emit(plan, "lora", tmp_path / "out")
    assert json.loads((out / "adapter_config.json").read_text())["lora_bias"] is True
    result = verify(out, base=model.folder)
    assert result.ok, result.problems
    assert result.numbers["difference"] <= 1e-4 < result.numbers["effect"]
    alone = model.emit(model.plan(layer=1), "lora", tmp_path / "alone")
    assert verify(alone, base=model.folder).ok
    assert "vLLM refuses such an adapter" in (alone / "steer2edit.json").read_text()


def test_a_matrix_in_fp8_gets_its_bias_in_the_dtype_of_the_others(
    model_of: Callable[[str], Model], tmp_path: Path
) -> None:
    model = model_of("llama")
    folder = quantise(model.folder, tmp_path / "fp8")
    checkpoint = open_checkpoint(folder)
    spec, plan = read_spec(checkpoint), model.plan()
    plan = replace(plan, base=replace(plan.base, fingerprint=checkpoint.fingerprint), content={})
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").tensors[plan.edits[0].tensor].dtype == "BF16"
    result = verify(tmp_path / "out", base=folder)
    assert result.ok, result.problems


def test_engines_that_pass_over_the_bias_are_named(model_of: Callable[[str], Model], tmp_path: Path) -> None:
    model = model_of("qwen3")
    plan = model.plan(place="after-attention")
    notes = emit(plan, model.checkpoint, model.spec, "checkpoint", tmp_path / "out").notes
    assert any("vLLM 0.32 passes over attention's new biases, as it was seen" in note for note in notes)
    assert any("llama.cpp refuses new biases in a qwen3 model" in note for note in notes)
    llama = model_of("llama")
    llama.emit(llama.plan(), "checkpoint", tmp_path / "llama")
    told = json.loads((tmp_path / "llama" / "steer2edit.json").read_text())["notes"]
    assert not any("vLLM" in note or "llama.cpp" in note for note in told)


def test_plans_that_fit_nowhere(model_of: Callable[[str], Model], tmp_path: Path) -> None:
    model = model_of("llama")
    plan, d = model.plan(), torch.ones(model.spec.hidden_size)
    strange = {
        "is not an operation on a bias to create": Bias("model.layers.1.mlp.down_proj.bias", d),
        "is neither a writer nor a reader": NewBias("model.layers.1.mlp.up_proj.bias", d),
        "cannot be created": NewBias("model.layers.1.mlp.down_proj.weight", d),
        "its update has": NewBias("model.layers.1.mlp.down_proj.bias", d[1:]),
    }
    for told, edit in strange.items():
        with pytest.raises(PlanError, match=told):
            resolve(replace(plan, edits=(edit,)), model.checkpoint, model.spec)
    with pytest.raises(PlanError, match="creates no biases too"):
        resolve(replace(plan, structure=Structure(top_k=1)), model.checkpoint, model.spec)
    huge = replace(plan, edits=tuple(edit.scaled(1e30) for edit in plan.edits))
    sharded = model_of("llama-sharded")
    half = replace(huge, base=replace(huge.base, fingerprint=sharded.checkpoint.fingerprint), content={})
    with pytest.raises(TargetError, match="does not fit BF16"):
        sharded.emit(half.scaled(1e20), "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()
