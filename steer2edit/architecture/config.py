"""What config.json says of a language model's sizes, with the config class's own defaults where it says nothing.

transformers' config classes fill what a config.json leaves out: Gemma's ``head_dim`` is 256 whatever the width. Those
defaults are in ``class_defaults.json``, which ``docs/make_class_defaults.py`` writes from transformers, so that reading a
model needs no transformers. Only defaults that do not follow from other settings are in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from steer2edit.errors import ArchitectureError

HIDDEN = ("hidden_size", "n_embd", "d_model", "embed_dim")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""The names that configs give the number of experts."""
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
"""The names that configs give the number of experts that a token passes through."""
OTHERS = (
    *("head_dim", "v_head_dim", "num_key_value_heads", "tie_word_embeddings", "do_layer_norm_before"),
    *("n_group", "num_expert_group", "topk_group", "topk_method"),
    *("use_routing_bias", "use_expert_bias", "moe_router_enable_expert_bias"),
)
"""Settings with one name that are read beside the sizes; a family's multipliers are too."""
ALIASES = (HIDDEN, LAYERS, HEADS, EXPERT_COUNTS, TOP_K)
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_TABLE = Path(__file__).with_name("class_defaults.json")


@dataclass(frozen=True)
class TextConfig:
    """The language model's part of a config.json.

    ``given`` are its settings, ``values`` the same with the class's defaults for what is not given; ``nested`` is whether they
    stand in a part of their own, as in a multimodal model.
    """

    model_type: str
    given: Mapping[str, Any]
    values: Mapping[str, Any]
    nested: bool

    @property
    def filled(self) -> Mapping[str, Any]:
        """The sizes that the class's defaults give, because config.json does not."""
        sizes = (*HIDDEN, *LAYERS, *HEADS, "head_dim", "v_head_dim", "num_key_value_heads")
        return {name: self.values[name] for name in sizes if name in self.values and name not in self.given}


def text_config(config: Mapping[str, Any]) -> TextConfig:
    """The language model's settings in a config.json, completed by its config class's defaults."""
    part = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), None)
    settings = config if part is None else part
    outer = str(config.get("model_type") or "")
    inner = class_defaults(outer).get("text_model_type") if part is not None else None
    model_type = str(settings.get("model_type") or inner or outer)
    # a flat config of a multimodal model is its language model's
    sizes = str(class_defaults(model_type).get("text_model_type") or model_type)
    return TextConfig(model_type, settings, completed(settings, sizes), part is not None)


def completed(given: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Settings with the class's defaults for those that are not given under any of their names."""
    named = {name for names in ALIASES if any(name in given for name in names) for name in names}
    if isinstance(given.get("layers_block_type"), list):  # its length is the number of layers
        named |= set(LAYERS)
    defaults = class_defaults(model_type)
    return {**{name: value for name, value in defaults.items() if name not in named}, **given}


def class_defaults(model_type: str) -> Mapping[str, Any]:
    """The fixed defaults of a model type's config class; empty for a type that transformers does not know."""
    return _table().get(model_type, {})


def integer(config: Mapping[str, Any], *keys: str) -> int:
    """The first of ``keys`` that config.json gives. Raises ArchitectureError for anything but a positive whole number."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 24:
            return value
        if value is not None:
            raise ArchitectureError(f"config.json: {key} is {value!r}, expected a positive whole number")
    raise ArchitectureError(f"config.json has no {' or '.join(keys)}")


def number(config: Mapping[str, Any], key: str, item: int | None = None) -> float:
    """A finite number of config.json, or the ``item``-th of a list of them. Raises ArchitectureError for anything else."""
    value = config.get(key)
    one = value[item] if item is not None and isinstance(value, list) and len(value) > item else value
    if isinstance(one, bool) or not isinstance(one, (int, float)) or not -1e9 < one < 1e9:
        raise ArchitectureError(f"config.json: {key} is {value!r}, expected {'numbers' if item else 'a number'}")
    return float(one)


def layer_count(values: Mapping[str, Any]) -> int:
    """How many blocks the model has."""
    kinds = values.get("layers_block_type")
    if isinstance(kinds, list) and kinds and values.get("num_hidden_layers") is None:
        return len(kinds)
    return integer(values, *LAYERS)


def head_count(values: Mapping[str, Any], *, optional: bool = False) -> int:
    """How many attention heads there are; 0 where that is ``optional`` and the config gives none."""
    # a model without attention may call something else its heads
    names = ("num_attention_heads", "n_head") if optional else HEADS
    if optional and all(values.get(name) is None for name in names):
        return 0
    return integer(values, *names)


def head_size(values: Mapping[str, Any], hidden: int, heads: int) -> int:
    """How many input columns of attention's writer a head has; 0 where there are no heads."""
    if not heads:
        return 0
    sizes = [key for key in ("v_head_dim", "head_dim") if values.get(key) is not None]
    return integer(values, *sizes) if sizes else hidden // heads


def layer_values(values: Mapping[str, Any], layer: int) -> Mapping[str, Any]:
    """The settings as one layer has them, where layers differ: ``values`` itself where they do not.

    transformers writes ``per_layer_config``. The published files have ``global_head_dim`` for layers of full attention
    (Gemma 4), and ``swa_`` before the settings of those with a window (dots3 note) or a part for them (Step 3.7).
    """
    by_layer, kinds = values.get("per_layer_config"), values.get("layer_types")
    if isinstance(by_layer, dict):
        own = next((one for key, one in by_layer.items() if str(key).isdigit() and int(key) == layer), None)
        return {**values, **own} if isinstance(own, dict) else values
    kind = kinds[layer] if isinstance(kinds, list) and layer < len(kinds) else None
    if kind == "full_attention" and values.get("global_head_dim") is not None:
        return {**values, "head_dim": values["global_head_dim"]}
    windowed = {name: value for name, value in values.items() if name.startswith("swa_") and value is not None}
    if kind == "sliding_attention" and isinstance(values.get("attention_other_setting"), dict):
        return {**values, **values["attention_other_setting"]}
    if kind == "sliding_attention" and windowed:
        return {**values, **{name.removeprefix("swa_"): value for name, value in windowed.items()}}
    return values


def table_source() -> str:
    """The release of transformers that the class defaults were read from, such as ``transformers 5.24.0``."""
    about = str(_file()["about"])
    return about.partition(" from ")[2].partition(";")[0]


def _table() -> Mapping[str, Mapping[str, Any]]:
    table: dict[str, dict[str, Any]] = _file()["defaults"]
    return table


@cache
def _file() -> Mapping[str, Any]:
    content: dict[str, Any] = json.loads(_TABLE.read_text(encoding="utf-8"))
    return content
