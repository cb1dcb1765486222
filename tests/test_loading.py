"""A model is loaded whole, or refused with the names: nothing is random, and nothing is dropped that may matter."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from safetensors.torch import load_file, save_file

from steer2edit.errors import CheckpointError
from steer2edit.notices import collected
from steer2edit.runtime import model
from steer2edit.runtime.adapters import with_adapter
from steer2edit.runtime.loading import check_release
from steer2edit.runtime.model import empty_model, load_weights

Tensors = dict[str, torch.Tensor]
Q, UP, NORM, FINAL = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.2.mlp.up_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.norm.weight",
)


@pytest.fixture
def changed(tiny_llama: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], object]], Path]:
    """``changed(edit)``: the tiny llama with other tensors in its file."""

    def write(edit: Callable[[Tensors], object]) -> Path:
        folder = shutil.copytree(tiny_llama, tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return write


@pytest.mark.parametrize("names", [[Q], [UP], [NORM], [FINAL], ["lm_head.weight"], [Q, UP, NORM, FINAL]])
def test_every_missing_weight_is_named(names: list[str], changed: Callable[..., Path]) -> None:
    folder = changed(lambda tensors: [tensors.pop(name) for name in names])
    with pytest.raises(CheckpointError, match="lacks weights") as error:
        load_weights(folder)
    assert all(f"- {name}" in str(error.value) for name in names)


def test_a_weight_under_another_name_is_missing_and_has_no_place(changed: Callable[..., Path]) -> None:
    folder = changed(lambda tensors: tensors.update(output=tensors.pop("lm_head.weight")))
    with pytest.raises(CheckpointError, match=r"(?s)lm_head\.weight.*no place for.*- output"):
        load_weights(folder)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", f"{Q.removesuffix('.weight')}.lora_A.weight"])
def test_a_weight_without_a_place_is_refused(name: str, changed: Callable[..., Path]) -> None:
    folder = changed(lambda tensors: tensors.update({name: torch.ones(64)}))
    with pytest.raises(CheckpointError, match=f"(?s)would be ignored.*{name}"):
        load_weights(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.k_scale", "position_ids"]
)
def test_tables_and_scales_of_older_releases_are_passed_over(name: str, changed: Callable[..., Path]) -> None:
    folder = changed(lambda tensors: tensors.update({name: torch.ones(8)}))
    with collected() as notices:
        load_weights(folder)
    assert not notices


@pytest.mark.parametrize("name", ["mtp.fc.weight", "model.layers.3.mlp.up_proj.weight", "v_head.summary.weight"])
def test_parts_that_are_left_out_are_told_once(name: str, changed: Callable[..., Path]) -> None:
    folder = changed(lambda tensors: tensors.update({name: torch.ones(8), f"{name}_2": torch.ones(8)}))
    with collected() as notices:
        load_weights(folder)
        load_weights(folder)
    assert notices == [f"transformers' LlamaForCausalLM does not run 2 tensors of {folder}, such as {name}"]


def test_other_shapes_than_the_config_says_are_named(changed: Callable[..., Path]) -> None:
    folder = changed(lambda tensors: tensors.update({UP: torch.ones(40, 32)}))
    with pytest.raises(CheckpointError) as error:
        load_weights(folder)
    assert f"{UP}: [40, 32] in the file, [48, 32] by the config" in str(error.value)


def test_an_unknown_rope_type_is_named(changed: Callable[..., Path]) -> None:
    folder = changed(lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": {"type": "su", "factor": 2.0}}))
    with pytest.raises(CheckpointError, match="rope type 'su'"):
        load_weights(folder)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"transformers_version": "99.1.0.dev0"}, "was written by 99.1.0: pip install -U 'transformers>=99.1.0'"),
        ({"transformers_version": None}, "a newer release may: pip install -U transformers"),
        ({"transformers_version": "4.1"}, "though config.json was written by 4.1: the model's page"),
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}},
            "(auto_map in config.json), and --trust-remote-code",
        ),
    ],
)
def test_a_type_that_transformers_does_not_know_is_named_with_what_to_install(
    settings: dict[str, object], told: str, changed: Callable[..., Path]
) -> None:
    folder = changed(lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama_next", **settings}))
    with pytest.raises(CheckpointError, match="does not know the model type 'llama_next'") as caught:
        load_weights(folder)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("config", "before", "since"),
    [
        ({"model_type": "qwen2_5_omni_thinker"}, "5.20.0", "5.21"),
        ({"model_type": "aria", "text_config": {"model_type": "aria_text"}}, "5.17.0", "5.18"),
        ({"text_config": {"model_type": "aria_text"}}, "5.15.1", "5.18"),
    ],
)
def test_a_type_whose_modules_were_others_before_is_refused_with_the_release_from_which_it_works(
    config: dict[str, object], before: str, since: str, changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(lambda tensors: None)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, **config}))
    monkeypatch.setattr("transformers.__version__", before)
    for load in (load_weights, empty_model):
        with pytest.raises(CheckpointError, match=re.escape(f"transformers {before}; edits find them from {since} on")):
            load(folder)
    for release in (f"{since}.0", f"{since}.0.dev0", "5.24.0", "6.0.0"):
        monkeypatch.setattr("transformers.__version__", release)
        check_release(folder, config)


def test_a_command_ends_with_2_before_anything_is_written(changed: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed(lambda tensors: tensors.pop(Q))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "what ?", "positive": "yes", "negative": "no"}\n')
    result = run("capture", folder, "--data", rows, "-o", tmp_path / "stats.safetensors")
    assert result.exit_code == 2 and Q in result.stderr
    assert not list(tmp_path.glob("stats*"))


def test_an_adapter_without_some_of_its_weights_is_refused_with_the_names(tiny_llama: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_weights(tiny_llama), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if "layers.1" in name and "lora_B" in name)
    del tensors[lost]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"PEFT cannot load .*missing adapter keys.*layers\.1.*lora_B"):
        with_adapter(load_weights(tiny_llama), tmp_path)


def test_what_a_library_prints_while_a_model_is_loaded_is_not_a_result(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = model._first_that_knows

    def talks(*arguments: Any) -> Any:
        print("a banner")
        return make(*arguments)

    monkeypatch.setattr(model, "_first_that_knows", talks)
    load_weights(tiny_llama)
    printed = capsys.readouterr()
    assert printed.out == "" and "a banner" in printed.err
