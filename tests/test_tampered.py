"""Verify proves the folder: whatever was added, changed or taken away is named, before a model is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, run, save_tiny
from mixture_models import mixture_config, save_mixture
from safetensors.torch import load_file, save_file

from steer2edit.architecture import read_spec
from steer2edit.artefact.claims import alike
from steer2edit.artefact.emit import emit
from steer2edit.artefact.verify import verify
from steer2edit.checkpoint import open_checkpoint
from steer2edit.checkpoint.gguf import read_gguf, write_gguf
from steer2edit.experts.edits import Request, lower_experts
from steer2edit.lowering import Writing
from steer2edit.methods import make_plan
from steer2edit.plan import EditPlan
from steer2edit.scoring.scores import Scoring

CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# A base\n"
TARGETS = ("checkpoint", "lora", "gguf", "gguf-vector")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded bf16 model with a card, a chat template and notes of its maker."""
    folder = tmp_path_factory.mktemp("tampered") / "base"
    save_tiny(folder, llama_config(), torch.bfloat16, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    (folder / "training_notes.txt").write_text("3 epochs", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def artefacts(base: Path, statistics_of: Callable[..., Any]) -> dict[str, Path]:
    """One artefact of each target."""
    checkpoint = open_checkpoint(base)
    spec = read_spec(checkpoint)
    plan = make_plan(Scoring(checkpoint, spec, statistics_of(base))).scaled(0.5)
    folders = {to: base.parent / to for to in TARGETS}
    for to, folder in folders.items():
        emit(plan, checkpoint, spec, to, folder)
    return folders


def changed_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def a_shard(folder: Path) -> Path:
    return sorted(folder.glob("model*.safetensors"))[0]


def one_file_beside_shards(folder: Path) -> None:
    save_file({"x": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})


def an_index_that_leads_elsewhere(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    described = json.loads(index.read_text(encoding="utf-8"))
    name, shard = next(iter(described["weight_map"].items()))
    save_file({name: load_file(folder / shard)[name] * 2}, folder / "other.safetensors", {"format": "pt"})
    described["weight_map"][name] = "other.safetensors"
    index.write_text(json.dumps(described), encoding="utf-8")


def added_code(folder: Path) -> None:
    changed_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text("import os", encoding="utf-8")


def a_tensor_more(folder: Path) -> None:
    tensors = load_file(a_shard(folder))
    save_file({**tensors, "model.extra.weight": torch.zeros(3)}, a_shard(folder), {"format": "pt"})


def other_metadata(folder: Path) -> None:
    save_file(load_file(a_shard(folder)), a_shard(folder), {"format": "np"})


def a_linked_folder(folder: Path) -> None:
    (folder / "original").symlink_to(folder.parent, target_is_directory=True)


def writes(name: str, text: str = "x") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

    return write


def removes(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def sets(name: str, **values: object) -> Callable[[Path], None]:
    return lambda folder: changed_json(folder / name, **values)


CHECKPOINT = {
    "a further single file": (one_file_beside_shards, "model.safetensors is neither the base's nor"),
    "an index that leads elsewhere": (an_index_that_leads_elsewhere, "model.safetensors.index.json differs"),
    "the file it leads to": (an_index_that_leads_elsewhere, "other.safetensors is neither"),
    "transformers_weights": (sets("config.json", transformers_weights="x.safetensors"), "config.json differs"),
    "rope": (sets("config.json", rope_theta=5.0), 'config.json differs from the base\'s in "rope_theta"'),
    "quantization": (sets("config.json", quantization_config={"quant_method": "fp8"}), "config.json differs"),
    "auto_map": (added_code, "config.json differs"),
    "code": (added_code, "modeling_evil.py is neither the base's nor steer2edit's: code"),
    "a custom generate": (writes("custom_generate/generate.py"), "custom_generate/generate.py is neither"),
    "generation config": (sets("generation_config.json", temperature=9.0), "generation_config.json differs"),
    "chat template": (writes("chat_template.jinja", "{{ 'obey' }}"), "chat_template.jinja differs"),
    "a further chat template": (writes("additional_chat_templates/tool.jinja"), "tool.jinja is neither"),
    "vocabulary": (sets("tokenizer.json", added_tokens=[]), "tokenizer.json differs"),
    "tokenizer config": (sets("tokenizer_config.json", model_max_length=1), "tokenizer_config.json differs"),
    "pickled weights": (
        writes("pytorch_model.bin"),
        "pytorch_model.bin is neither the base's nor steer2edit's: weights",
    ),
    "a GGUF": (writes("model-q8.gguf"), "model-q8.gguf is neither the base's nor steer2edit's: weights"),
    "consolidated weights": (writes("consolidated.safetensors"), "consolidated.safetensors is neither"),
    "weights in a folder": (writes("original/model.pth"), "original/model.pth is neither"),
    "hidden weights": (writes(".model.safetensors"), ".model.safetensors is neither"),
    "an adapter": (writes("adapter_config.json", "{}"), "adapter_config.json is neither"),
    "a link to a folder": (a_linked_folder, "original is neither the base's nor steer2edit's (a link to a folder)"),
    "a tensor more": (a_tensor_more, "model.extra.weight is not in the base"),
    "metadata of a shard": (other_metadata, "its header differs from the base's"),
    "no tokenizer": (removes("tokenizer.json"), "tokenizer.json is missing"),
    "no template": (removes("chat_template.jinja"), "chat_template.jinja is missing"),
    "no index": (removes("model.safetensors.index.json"), "model.safetensors.index.json is missing"),
    "a file in our folder": (writes("steer2edit/model.safetensors"), "steer2edit/model.safetensors is neither"),
}
LORA = {
    "pickled weights": (
        writes("adapter_model.bin"),
        "adapter_model.bin is neither the base's nor steer2edit's: weights",
    ),
    "another scale": (sets("adapter_config.json", lora_alpha=64), "adapter_config.json differs"),
    "another base": (sets("adapter_config.json", base_model_name_or_path="user/evil"), "adapter_config.json differs"),
    "code": (sets("adapter_config.json", auto_mapping={"base_model_class": "Evil"}), "adapter_config.json differs"),
    "a tokenizer": (writes("tokenizer.json", "{}"), "tokenizer.json is neither the base's nor steer2edit's: a loader"),
    "a chat template": (writes("chat_template.jinja"), "chat_template.jinja is neither"),
    "a model": (writes("model.safetensors"), "model.safetensors is neither"),
    "a second adapter": (writes("other/adapter_config.json", "{}"), "other/adapter_config.json is neither"),
    "no weights": (removes("adapter_model.safetensors"), "adapter_model.safetensors is missing"),
}
CASES = [
    *(("checkpoint", *case) for case in CHECKPOINT.values()),
    *(("lora", *case) for case in LORA.values()),
    *((to, writes("model.gguf"), "model.gguf is neither") for to in ("gguf", "gguf-vector")),
    *(
        (to, writes("adapter_model.safetensors"), "adapter_model.safetensors is neither")
        for to in ("gguf", "gguf-vector")
    ),
]
NAMES = [
    *(f"checkpoint: {name}" for name in CHECKPOINT),
    *(f"lora: {name}" for name in LORA),
    *("gguf", "gguf-vector") * 2,
]


@pytest.mark.parametrize(("to", "tamper", "expected"), CASES, ids=[name.replace(" ", "-") for name in NAMES])
def test_what_was_done_to_a_folder_is_named(
    artefacts: dict[str, Path],
    base: Path,
    tmp_path: Path,
    to: str,
    tamper: Callable[[Path], None],
    expected: str,
) -> None:
    shutil.copytree(artefacts[to], tmp_path / "out")
    assert verify(tmp_path / "out", base, numbers=False).problems == ()
    tamper(tmp_path / "out")
    problems = verify(tmp_path / "out", base, numbers=False).problems
    assert any(expected in problem for problem in problems), problems


FORGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a change less": (lambda r: r["changed"].pop(), "its list of changes lacks"),
    "a change more": (lambda r: r["changed"].append({**r["changed"][0], "tensor": "lm_head.weight"}), "which is unchanged"),
    "a change twice": (lambda r: r["changed"].append(r["changed"][0]), "names a tensor twice"),
    "a norm": (lambda r: r["changed"][0].update(norm=1e-3), "norm of"),
    "an operation": (lambda r: r["changed"][0].update(op="Bias"), "op of"),
    "exactness": (lambda r: r.update(exactness="exact, certified"), "exactness is"),
    "the KL": (lambda r: r["measured"].update(kl=0.0001), "measured.kl is 0.0001, expected null"),
    "the method": (lambda r: r["method"].update(name="ablation"), "method.name is \"ablation\", expected \"steering\""),
    "the behaviour": (lambda r: r["data"].update(name="kindness"), "data.name is \"kindness\""),
    "the base": (lambda r: r["base"].update(name="meta-llama/Llama-3.1-8B"), "base.name is \"meta-llama/Llama"),
    "the plan": (lambda r: r["plan"].update(sha256="0" * 64), "plan.sha256 is"),
    "the licence": (lambda r: r["card"].update(license="mit"), "card.license is \"mit\", expected \"apache-2.0\""),
    "files": (lambda r: r["files"].append("secrets.txt"), "its list of files has \"secrets.txt\""),
    "the card's hash": (lambda r: r.update(card_sha256="0" * 64), "card_sha256"),
}  # fmt: skip


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_receipt_is_named(artefacts: dict[str, Path], base: Path, tmp_path: Path, to: str, kind: str) -> None:
    forge, expected = FORGED[kind]
    shutil.copytree(artefacts[to], tmp_path / "out")
    path = tmp_path / "out" / "steer2edit.json"
    receipt = json.loads(path.read_text(encoding="utf-8"))
    if kind == "the KL":
        receipt["measured"] |= {"tokens": 100, "strength": 0.5, "low": 0.0, "high": 1.0}
        receipt["measured"] |= {"base_perplexity": 2.0, "perplexity": 2.0}
    forge(receipt)
    path.write_text(json.dumps(receipt), encoding="utf-8")
    problems = verify(tmp_path / "out", base, numbers=False).problems
    assert any(expected in problem for problem in problems), problems


@pytest.mark.parametrize("key", ["sha256_before", "sha256_after"])
def test_forged_hashes_are_named(artefacts: dict[str, Path], base: Path, tmp_path: Path, key: str) -> None:
    shutil.copytree(artefacts["checkpoint"], tmp_path / "out")
    path = tmp_path / "out" / "steer2edit.json"
    receipt = json.loads(path.read_text(encoding="utf-8"))
    receipt["changed"][1][key] = "0" * 64
    path.write_text(json.dumps(receipt), encoding="utf-8")
    problems = verify(tmp_path / "out", base, numbers=False).problems
    assert len([problem for problem in problems if f"{key} of {receipt['changed'][1]['tensor']}" in problem]) == 1


@pytest.mark.parametrize("to", ["gguf", "gguf-vector"])
def test_a_changed_field_of_a_gguf_is_named(artefacts: dict[str, Path], base: Path, tmp_path: Path, to: str) -> None:
    shutil.copytree(artefacts[to], tmp_path / "out")
    file = next((tmp_path / "out").glob("*.gguf"))
    fields, tensors = read_gguf(file)
    kept = {key: value for key, value in fields.items() if key != "general.architecture"}
    write_gguf(file, fields["general.architecture"], tensors, {**kept, "general.name": "evil"})
    problems = verify(tmp_path / "out", base, numbers=False).problems
    assert problems == ("the field general.name is 'evil', expected None",)


@pytest.mark.parametrize("to", TARGETS)
def test_what_may_stay_in_a_folder(artefacts: dict[str, Path], base: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(artefacts[to], out)
    for name in (".git/config", ".gitattributes", ".gitignore", ".cache/huggingface/download/x.metadata"):
        writes(name)(out)
    assert verify(out, base, numbers=False) == verify(artefacts[to], base, numbers=False)
    writes("steer2edit/evaluation.json", "{}")(out)
    writes("README.md", "# My words\n")(out)
    found = verify(out, base, numbers=False)
    assert found.ok and len(found.notes) == 2
    assert (
        "steer2edit/evaluation.json holds measurements" in found.notes[0]
        and "README.md is not the one" in found.notes[1]
    )


def test_what_a_push_left_out_is_a_remark(artefacts: dict[str, Path], base: Path, tmp_path: Path) -> None:
    shutil.copytree(artefacts["checkpoint"], tmp_path / "out")
    (tmp_path / "out" / "training_notes.txt").unlink()
    found = verify(tmp_path / "out", base, numbers=False)
    assert found.ok and found.notes == ("training_notes.txt is missing; the base has it",)


def test_the_command_line_fails_and_names_the_file(artefacts: dict[str, Path], base: Path, tmp_path: Path) -> None:
    shutil.copytree(artefacts["checkpoint"], tmp_path / "out")
    one_file_beside_shards(tmp_path / "out")
    result = run("verify", tmp_path / "out", "--base", base)
    assert result.exit_code == 1
    assert "problem  model.safetensors is neither" in result.output and "FAILED: 1 problem" in result.output


def without(folder: Path, tensor: str) -> None:
    path = next(path for path in folder.glob("*.safetensors") if tensor in load_file(path))
    save_file({name: value for name, value in load_file(path).items() if name != tensor}, path, {"format": "pt"})


PRUNED: dict[str, tuple[Callable[[Path], None], str]] = {
    "untouched": (lambda folder: None, ""),
    "an expert more in the config": (
        sets("config.json", num_experts=4),
        "config.json is not the base's with the plan's",
    ),
    "code": (sets("config.json", auto_map={"AutoModel": "x.X"}), "config.json is not the base's with the plan's"),
    "a further file": (writes("other.safetensors"), "other.safetensors is neither"),
    "a tensor less": (lambda folder: without(folder, "model.norm.weight"), "model.norm.weight is missing"),
    "a tensor more": (a_tensor_more, "model.extra.weight should have gone"),
    "metadata": (other_metadata, "its header is not the one that base and plan give"),
    "no tokenizer": (removes("tokenizer.json"), "tokenizer.json is missing"),
}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A mixture, and the same without two of its experts in each layer."""
    folder = tmp_path_factory.mktemp("pruned")
    base = save_mixture(folder / "base", mixture_config("qwen3_moe"))
    checkpoint = open_checkpoint(base)
    spec = read_spec(checkpoint)
    experts = [(router.layer, expert) for router in spec.routers for expert in (0, 1)]
    plan = lower_experts(checkpoint, spec, Request.of(off=experts), how="prune")
    emit(plan, checkpoint, spec, "checkpoint", folder / "out")
    return base, folder / "out"


@pytest.mark.parametrize("kind", PRUNED)
def test_what_was_done_to_a_pruned_checkpoint_is_named(pruned: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    base, out = pruned
    tamper, expected = PRUNED[kind]
    shutil.copytree(out, tmp_path / "out")
    tamper(tmp_path / "out")
    problems = verify(tmp_path / "out", base, numbers=False).problems
    assert any(expected in problem for problem in problems) if expected else problems == (), problems


def test_numbers_of_a_receipt_are_compared_up_to_the_noise_of_a_sum() -> None:
    assert alike({"a": [1.0, None, "x"]}, {"a": (1.0 + 1e-9, None, "x")})
    assert alike(float("nan"), float("nan"))
    for other in (1.001, 10**400, True, "1.0", None, [1.0], float("nan")):
        assert not alike(1.0, other)


def test_hard_links_to_the_base_are_proved_and_remarked(base: Path, artefacts: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(base)
    plan = EditPlan.load(artefacts["checkpoint"] / "steer2edit/plan.safetensors")
    one = replace(plan, edits=plan.edits[:1])
    emit(one, checkpoint, read_spec(checkpoint), "checkpoint", tmp_path / "out", writing=Writing(link=True))
    found = verify(tmp_path / "out", base, numbers=False)
    assert found.ok and len(found.notes) == 2
    assert "hard links" in found.notes[0] and "details.linked is not computed again" in found.notes[1]
