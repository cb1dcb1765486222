"""Models as people bring them: each is compiled, or refused in a sentence that names what is wrong with it.

The layouts are those of public models that made trouble, built small.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, save_tiny
from safetensors.torch import load_file, save_file

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.checkpoint import INDEX, SINGLE, open_checkpoint
from steer2edit.errors import Steer2EditError
from steer2edit.notices import collected
from steer2edit.plan import Base, EditPlan, LowRank
from steer2edit.runtime.model import load_weights

Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], None]
LAYER = "model.layers.1"
# a size that config.json may leave to the class: its default
HEADS = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config(num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    return save_tiny(tmp_path_factory.mktemp("public") / "base", config, torch.bfloat16)


def tensors(change: Callable[[Tensors], Tensors]) -> Change:
    """Other tensors in the single file."""

    def apply(folder: Path) -> None:
        changed = change(load_file(folder / SINGLE))
        save_file({name: value.contiguous().clone() for name, value in changed.items()}, folder / SINGLE)

    return apply


def config(**changes: Any) -> Change:
    """Other settings in config.json; ``...`` takes one out."""

    def apply(folder: Path) -> None:
        path = folder / "config.json"
        settings = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))

    return apply


def without(*parts: str) -> Change:
    return tensors(lambda w: {name: value for name, value in w.items() if not any(part in name for part in parts)})


def prefixed(prefix: str) -> Change:
    return tensors(lambda w: {f"{prefix}{name}": value for name, value in w.items()})


def shards(folder: Path, count: int = 2) -> dict[str, str]:
    """Deal the single file over shards with an index; the weight map."""
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {name: names[i * count // len(weights)] for i, name in enumerate(weights)}
    for shard in names:
        save_file({name: weights[name] for name, one in weight_map.items() if one == shard}, folder / shard)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def unmerged_lora(weights: Tensors) -> Tensors:
    split: Tensors = {}
    for name, value in weights.items():
        head = name.removesuffix("weight")
        if "down_proj" in name:
            split |= {f"{head}base_layer.weight": value, f"{head}lora_A.default.weight": torch.zeros(4, value.shape[1])}
            split |= {f"{head}lora_B.default.weight": torch.zeros(value.shape[0], 4)}
        else:
            split[name] = value
    return split


def index_drops_q(folder: Path) -> None:
    weight_map = shards(folder)
    write_index(folder, {name: shard for name, shard in weight_map.items() if f"{LAYER}.self_attn.q_proj" not in name})


def dup_across_shards(folder: Path) -> None:
    weight_map = shards(folder)
    twice = next(name for name, shard in weight_map.items() if shard.startswith("model-00001"))
    last = folder / "model-00002-of-00002.safetensors"
    save_file({**load_file(last), twice: torch.zeros(1)}, last)


def stale_index(folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    weight_map = shards(folder, 3)
    for path in folder.glob("model-0*"):
        path.unlink()
    save_file(weights, folder / SINGLE)
    shards(folder, 2)
    write_index(folder, weight_map)


def quantised(method: str) -> Change:
    return config(quantization_config={"quant_method": method, "bits": 4})


def moved(source: str, target: str) -> Change:
    return lambda folder: (folder / source).rename(folder / target) and None


def shard_lost(folder: Path) -> None:
    shards(folder, 3)
    (folder / "model-00003-of-00003.safetensors").unlink()


def index_lost(folder: Path) -> None:
    shards(folder)
    (folder / INDEX).unlink()


def dangling(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("../../blobs/gone")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")


def only_pickled(folder: Path) -> None:
    pickled(folder)
    (folder / SINGLE).unlink()


def truncated(folder: Path) -> None:
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:-500])


# case: how it is made, and what the refusal says
REFUSED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "miss_q": (without(f"{LAYER}.self_attn.q_proj"), (f"{LAYER}.self_attn.q_proj.weight is missing",)),
    "miss_up": (without(f"{LAYER}.mlp.up_proj"), (f"{LAYER}.mlp.up_proj.weight is missing",)),
    "miss_norm": (without("model.norm"), ("model.norm.weight is missing",)),
    "miss_ln": (without(f"{LAYER}.input_layernorm"), (f"{LAYER}.input_layernorm.weight is missing",)),
    "miss_many": (
        without(f"{LAYER}.input_layernorm", "layers.2.mlp.gate", "layers.0.self_attn.v_", "model.norm", "embed_tokens"),
        (f"{LAYER}.input_layernorm.weight", "layers.2.mlp.gate_proj.weight", "layers.0.self_attn.v_proj.weight",
         "model.norm.weight", "model.embed_tokens.weight"),
    ),
    "miss_bias": (
        tensors(lambda w: w | {f"model.layers.{i}.self_attn.q_proj.bias": torch.zeros(32) for i in (0, 2)}),
        (f"{LAYER}.self_attn.q_proj.bias is missing",),
    ),
    "miss_head": (config(tie_word_embeddings=False), ("lm_head.weight is missing", "tie_word_embeddings")),
    "miss_head_by_default": (config(tie_word_embeddings=...), ("lm_head.weight is missing", "tie_word_embeddings")),
    "missing_one": (without(f"{LAYER}.mlp.down_proj"), (f"{LAYER}.mlp.down_proj.weight is missing",)),
    "missing_layer": (without("layers.2."), ("layer 2: model.layers.2.self_attn.o_proj.weight is missing",)),
    "layers_mismatch": (config(num_hidden_layers=4), ("layer 3",)),
    "index_drops_q": (index_drops_q, (f"does not name '{LAYER}.self_attn.q_proj.weight'",)),
    "dup_across_shards": (dup_across_shards, ("is in two shards", "model-00001-of", "model-00002-of")),
    "stale_index": (stale_index, ("cannot read 'model-00001-of-00003.safetensors'",)),
    "missing_shard": (shard_lost, ("cannot read 'model-00003-of-00003.safetensors'",)),
    "no_index": (index_lost, ("shards without their index", INDEX)),
    "odd_name": (moved(SINGLE, "model-00001-of-00001.safetensors"), (f"rename it to {SINGLE}",)),
    "dangling": (dangling, ("a link to ../../blobs/gone, which does not exist",)),
    "truncated": (truncated, ("is truncated",)),
    "only_bin": (only_pickled, ("found pytorch_model.bin", "save_pretrained")),
    "orig_mod": (prefixed("_orig_mod."), ("'_orig_mod.'", "torch.compile")),
    "orig_mod_inside": (
        tensors(lambda w: {name.replace("model.", "model._orig_mod.", 1): value for name, value in w.items()}),
        ("'_orig_mod.'", "torch.compile"),
    ),
    "module_prefix": (prefixed("module."), ("'module.'", "DataParallel")),
    "fsdp_prefix": (prefixed("_fsdp_wrapped_module."), ("'_fsdp_wrapped_module.'", "FSDP")),
    "peft_prefix": (prefixed("base_model.model."), ("'base_model.model.'", "PEFT")),
    "merged_unmerged_lora": (tensors(unmerged_lora), ("not merged (9 tensors", "merge_and_unload")),
    "no_kv_heads": (config(num_key_value_heads=...), ("k_proj.weight has the shape [16, 32]; expected 32 rows",)),
    "adapter_top": (lambda folder: shutil.copy(folder / "config.json", folder / "adapter_config.json") and None,
                    ("adapter_config.json beside a model",)),
    "quant_gptq": (quantised("gptq"), ("names gptq", "none of its tensors is quantised so")),
    "quant_bnb": (quantised("bitsandbytes"), ("names bitsandbytes", "none of its tensors is quantised so")),
    "quant_bnb_nocfg": (
        tensors(lambda w: w | {f"{LAYER}.mlp.up_proj.weight.absmax": torch.zeros(4)}), ("is quantised", "absmax"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_compiled_is_refused_by_name(base: Path, tmp_path: Path, case: str) -> None:
    change, says = REFUSED[case]
    shutil.copytree(base, tmp_path / case)
    change(tmp_path / case)
    with pytest.raises(Steer2EditError) as caught:
        read_spec(open_checkpoint(tmp_path / case))
    message = str(caught.value)
    assert not [text for text in says if text not in message], message
    assert all(text not in message for text in ("layers.0.self_attn.q_proj", "Traceback"))


def beside(name: str, content: bytes) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return apply


def consolidated(folder: Path) -> None:
    save_file(load_file(folder / SINGLE), folder / "consolidated.safetensors")
    shards(folder)


def both(*changes: Change) -> Change:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def again(name: str, source: str) -> Change:
    """Tensors of a block once more, under another prefix."""
    return tensors(lambda w: w | {key.replace(source, name): value for key, value in w.items() if source in key})


COMPILED: dict[str, Change] = {
    "plain": lambda folder: None,
    "inv_freq": tensors(lambda w: w | {f"{LAYER}.self_attn.rotary_emb.inv_freq": torch.rand(4)}),
    "tied_lm_head_saved": tensors(lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"]}),
    "tied_lm_head_differs": tensors(lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] + 1}),
    "float_tag": config(time_step_limit=[0.0, {"__float__": "Infinity"}]),
    "bad_genconf": beside(
        "generation_config.json", b'{"do_sample": false, "temperature": 0.6, "eos_token_id": [2, 3]}'
    ),
    "genconf_broken": beside("generation_config.json", b'{"temperature": 0.6,}'),
    "no_genconf": lambda folder: (folder / "generation_config.json").unlink(),
    "consolidated_beside": consolidated,
    "bin_and_safetensors": pickled,
    "index_to_single": lambda folder: write_index(folder, dict.fromkeys(load_file(folder / SINGLE), SINGLE)),
    "sharded": lambda folder: shards(folder, 3) and None,
    "no_model_prefix": tensors(lambda w: {name.removeprefix("model."): value for name, value in w.items()}),
    "mtp": again("mtp.layers.0.", "model.layers.0."),
    "extra_layer": again("model.layers.3.", "model.layers.2."),
    "mixed": tensors(lambda w: {n: v.float() if "norm" in n else v.half() if "up_" in n else v for n, v in w.items()}),
    "f64": tensors(lambda w: {name: value.double() for name, value in w.items()}),
    "torch_dtype_only": config(dtype=..., torch_dtype="bfloat16"),
    "no_dtype": config(dtype=...),
    "rope_old": config(rope_parameters=..., rope_theta=1e4, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "head_dim_null": config(head_dim=None),
    "nested_adapter": beside("adapter/adapter_config.json", b'{"peft_type": "LORA"}'),
    "single_of_two": lambda folder: two_sets(folder),
}


def infinity(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + ', "time_step_limit": [0.0, Infinity], "x": NaN}')


def two_sets(folder: Path) -> None:
    """The file that is loaded, and stale shards of it."""
    weights = load_file(folder / SINGLE)
    shards(folder)
    save_file({name: value + 1 for name, value in weights.items()}, folder / SINGLE)


COMPILED["infinity"] = infinity


@pytest.mark.parametrize("case", COMPILED)
def test_a_model_as_people_publish_it_is_compiled(base: Path, tmp_path: Path, case: str) -> None:
    """What is emitted loads as the base does, but for the edit."""
    shutil.copytree(base, tmp_path / case)
    COMPILED[case](tmp_path / case)
    with collected():
        checkpoint = open_checkpoint(tmp_path / case)
    spec = read_spec(checkpoint)
    name = spec.site("mlp_out.1").tensor
    edit = LowRank(name, torch.ones(32, 1), torch.full((1, 48), 0.5))
    emit(EditPlan(Base.of(checkpoint), (edit,)), checkpoint, spec, "checkpoint", tmp_path / "out")
    if case == "genconf_broken":
        return  # transformers cannot load it, neither here nor there
    before, after = (load_weights(folder).state_dict() for folder in (tmp_path / case, tmp_path / "out"))
    loaded = name if name in before else f"model.{name}"
    differing = [key for key, value in before.items() if not torch.equal(value, after[key])]
    assert differing == [loaded]
    assert (after[loaded] - before[loaded] - 0.5).abs().max() < 0.02
    assert not list((tmp_path / "out").glob("consolidated*"))


def test_a_folder_may_be_called_anything_and_be_read_only(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Mein Modell – ü (v2)"
    shutil.copytree(base, folder)
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        assert open_checkpoint(folder).name == folder.name
        assert read_spec(open_checkpoint(folder)).layers == 3
    finally:
        folder.chmod(0o755)


def test_a_snapshot_in_a_hub_cache_is_opened_and_its_parents_name_it(base: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--user--tiny"
    snapshot, blobs = repository / "snapshots" / ("a" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in base.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert read_spec(open_checkpoint(snapshot)).layers == 3
    with pytest.raises(Steer2EditError, match=f"snapshots/{'a' * 40}"):
        open_checkpoint(repository)
