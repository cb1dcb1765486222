"""Writes steer2edit/architecture/class_defaults.json from transformers' config classes: python docs/make_class_defaults.py"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steer2edit.architecture.config import ALIASES, HEADS, HIDDEN, LAYERS, OTHERS
from steer2edit.architecture.find_family import KNOWN
from steer2edit.architecture.wrappers import MULTIMODAL

TABLE = Path(__file__).parents[1] / "steer2edit" / "architecture" / "class_defaults.json"
_KEYS = {
    *(name for names in ALIASES for name in names),
    *OTHERS,
    *(one.key for family in KNOWN for one in family.multipliers.values()),
}


def model_types() -> list[str]:
    """Every model type that is described, and the multimodal models around them."""
    return sorted({*(name for family in KNOWN for name in family.model_types), *MULTIMODAL})


def defaults_of(model_type: str) -> dict[str, Any]:
    """The defaults of a type's config class that do not follow from other settings."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    plain = _settings(kind())
    fixed = dict(plain)
    for name, value in _changes(plain):
        try:
            changed = _settings(kind(**{name: value}))
        except Exception:  # classes check their settings against each other, each with errors of its own
            continue
        # what moves when another setting is changed is computed from it
        fixed = {key: value for key, value in fixed.items() if key == name or changed.get(key) == value}
    if "v_head_dim" in plain.keys() - fixed.keys():  # then a head's size is not head_dim
        fixed.pop("head_dim", None)
    inner = kind().get_text_config()
    if inner.model_type != model_type and inner.model_type:
        fixed["text_model_type"] = inner.model_type
    return fixed


def table() -> dict[str, dict[str, Any]]:
    """Defaults by model type, for the types that the installed transformers knows."""
    from transformers import CONFIG_MAPPING

    return {name: defaults_of(name) for name in model_types() if name in CONFIG_MAPPING}


def text() -> str:
    """The file's content: one line for each type."""
    import transformers

    lines = [f"  {json.dumps(name)}: {json.dumps(values, sort_keys=True)}" for name, values in table().items()]
    note = f"made by docs/make_class_defaults.py from transformers {transformers.__version__}; do not edit by hand"
    return f'{{"about": {json.dumps(note)},\n "defaults": {{\n' + ",\n".join(lines) + "\n}}\n"


def _settings(config: Any) -> dict[str, Any]:
    values: Mapping[str, Any] = config.to_dict()
    return {key: values[key] for key in sorted(_KEYS & values.keys()) if _is_plain(values[key])}


def _is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, str)) or (
        isinstance(value, list) and all(isinstance(one, (int, float)) for one in value)
    )


def _changes(plain: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Single settings to change: the sizes that others may be computed from, doubled."""
    return [(name, 2 * plain[name]) for name in (*HIDDEN, *LAYERS, *HEADS) if type(plain.get(name)) is int]


if __name__ == "__main__":
    TABLE.write_text(text(), encoding="utf-8")
