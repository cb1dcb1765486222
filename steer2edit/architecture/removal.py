"""A checkpoint with fewer layers.

Which models can lose some, how tensors are numbered anew, and what the config says then.

A layer that is removed passes its stream on unchanged. Nothing else of the model may know a layer's number. So a type is listed
here only if the model without layers was compared with the whole one that skips them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from steer2edit.architecture.config import LAYERS, layer_count, text_config
from steer2edit.architecture.sites import MatrixRole, ModelSpec
from steer2edit.checkpoint import Checkpoint

TYPES = (
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "smollm3",
        "phi",
        "phi3",
        "olmo",
        "olmo2",
    ),
    *("olmo3", "granite", "cohere", "cohere2", "stablelm", "starcoder2", "gpt2", "gpt_neox"),
    *("mixtral", "olmoe", "qwen3_moe", "gpt_oss"),
)
"""Types of which the model without a layer was compared with the whole one that skips it."""
_LISTED = ("gemma2", "gemma3_text", "smollm3", "olmo3", "cohere2", "gpt_oss")
"""Types whose layers differ by their number, unless config.json lists the kind of each."""
_LISTS = ("layer_types", "no_rope_layers")
"""Settings with a value for each layer."""
_PREDICTING = re.compile(r"nextn|mtp")
_SHARED = re.compile(r"kv_shared|shared_kv|share_kv|kv_sharing")
_BY_NUMBER: Mapping[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (None, 1), "mlp_only_layers": (None, []), "scale_attn_by_inverse_layer_idx": (None, False),
}  # fmt: skip
"""Settings by which layers differ, with the values at which they do not."""


def layer_problems(gone: Sequence[int], checkpoint: Checkpoint, spec: ModelSpec) -> list[str]:
    """Why these layers cannot be removed from this model; none where they can."""
    count = spec.layers
    if strange := [layer for layer in gone if layer >= count]:
        return [f"layer {strange[0]} is not in this model, which has the layers 0-{count - 1}"]
    problems = []
    if len(gone) == count:
        problems.append("no layer would be left")
    values = text_config(checkpoint.config).values
    told = {key: value for key, value in values.items() if value not in (None, 0, False, [], {})}
    if found := [key for key in told if _SHARED.search(key)]:
        problems.append(
            f"layers share their keys and values ({found[0]} in config.json): one that goes takes others' with it"
        )
    predicting = [key for key in told if _PREDICTING.search(key)]
    beyond = [
        name for name in checkpoint.tensors if (number := _number(name, _prefix(spec))) is not None and number >= count
    ]
    if predicting or beyond:
        what = f"{predicting[0]} in config.json" if predicting else beyond[0]
        problems.append(
            f"layers that predict several tokens stand behind the last one ({what}), and are counted from it"
        )
    if spec.model_type not in TYPES:
        problems.append(
            f"of the type {spec.model_type} the model without a layer was not compared with the whole one that skips it"
        )
        return problems
    lists = values.get("layer_types")
    sliding = spec.model_type in _LISTED or bool(values.get("use_sliding_window"))
    if sliding and not (isinstance(lists, list) and len(lists) == count):
        problems.append(
            "its layers differ by their number, and config.json has no layer_types: save it with a newer transformers"
        )
    problems += [
        f"its layers differ by their number ({key} is {values.get(key)!r} in config.json)"
        for key, same in _BY_NUMBER.items()
        if values.get(key) not in same
    ]
    problems += [
        f"config.json has the list {key}, which may have a value for each layer"
        for key, value in values.items()
        if isinstance(value, list) and len(value) == count and "layer" in key and key not in (*_LISTS, *_BY_NUMBER)
    ]
    if any(site.role is MatrixRole.PER_LAYER_OUT for site in spec.sites):
        problems.append("its embedding has a part for each layer")
    return problems


def renumbered(name: str, gone: Sequence[int], spec: ModelSpec) -> str | None:
    """A tensor's name in the model without the layers; None where it goes with them."""
    prefix = _prefix(spec)
    number = _number(name, prefix)
    if number is None:
        return name
    if number in gone:
        return None
    new = number - sum(layer < number for layer in gone)
    return f"{prefix}{new}{name[len(prefix) + len(str(number)) :]}"


def layer_number(name: str, spec: ModelSpec) -> int | None:
    """The layer that a tensor belongs to; None for one outside of the layers."""
    return _number(name, _prefix(spec))


def set_layers(values: dict[str, Any], gone: Sequence[int]) -> None:
    """Change a text model's config, in place, to that without the layers."""
    count = layer_count(text_config(values).values)
    left = count - len(gone)
    values.update(dict.fromkeys([key for key in LAYERS if key in values] or LAYERS[:1], left))
    for key in _LISTS:
        if isinstance(values.get(key), list) and len(values[key]) == count:
            values[key] = [value for layer, value in enumerate(values[key]) if layer not in gone]


def _prefix(spec: ModelSpec) -> str:
    """What comes before a layer's number in the names of its tensors: ``model.layers.``."""
    site = spec.sites[0]
    return site.tensor.partition(f".{site.layer}.")[0] + "."


def _number(name: str, prefix: str) -> int | None:
    number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
    return int(number) if number.isdecimal() else None
