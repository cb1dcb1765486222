"""Sizes that config.json leaves to its class: what is read without transformers is what transformers makes of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import save_tiny
from family_configs import COMMON_SETTINGS, family_config
from releases import config_class
from test_families import CAUSAL
from wrapper_models import wrapper

from steer2edit.architecture import config as sizes
from steer2edit.architecture import read_spec
from steer2edit.architecture.find_family import KNOWN
from steer2edit.checkpoint import open_checkpoint

_SCRIPT = Path(__file__).parents[1] / "docs" / "make_class_defaults.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_class_defaults", _SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_its_transformers_says(script: Any) -> None:
    stored = json.loads(script.TABLE.read_text())
    if f"transformers {transformers.__version__};" not in stored["about"]:
        pytest.skip(f"the table was made from another transformers than {transformers.__version__}: {stored['about']}")
    assert stored["defaults"] == script.table()


def test_every_described_type_has_its_defaults() -> None:
    assert not [name for family in KNOWN for name in family.model_types if not sizes.class_defaults(name)]


@pytest.mark.parametrize("model_type", [name for family in KNOWN for name in family.model_types])
def test_sizes_read_from_what_is_left_are_those_of_the_class(model_type: str) -> None:
    """Of a config that gives only its type."""
    config = config_class(model_type)().get_text_config()
    values = sizes.text_config({"model_type": model_type}).values
    hidden = sizes.integer(values, *sizes.HIDDEN)
    assert hidden == config.hidden_size
    if isinstance(getattr(config, "num_hidden_layers", None), int) and "layers_block_type" not in config.to_dict():
        assert sizes.layer_count(values) == config.num_hidden_layers
    heads = sizes.head_count(values, optional=True)
    # where layers have heads of several sizes, transformers gives the common ones only in the dictionary
    given = config.to_dict()
    count = given.get("num_attention_heads") or getattr(config, "num_attention_heads", None)
    if isinstance(count, int) and heads:
        assert heads == count
        sizes_given = (given.get(name) or getattr(config, name, None) for name in ("v_head_dim", "head_dim"))
        width = next((size for size in sizes_given if size), None)
        assert sizes.head_size(values, hidden, heads) == (width or hidden // heads)


def strip(folder: Path, *names: str, part: str | None = None) -> Path:
    """Take settings out of a folder's config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in names:
        (config if part is None else config[part]).pop(name)
    path.write_text(json.dumps(config))
    return folder


def heads(folder: Path) -> set[tuple[int | None, int]]:
    return {(s.heads, s.in_features) for s in read_spec(open_checkpoint(folder)).sites if s.heads is not None}


@pytest.mark.parametrize(
    ("model_type", "size"), [("gemma", 256), ("gemma2", 256), ("gemma3_text", 256), ("qwen3", 128)]
)
def test_a_head_size_that_is_left_out_is_the_class_default(tmp_path: Path, model_type: str, size: int) -> None:
    folder = strip(save_tiny(tmp_path / "m", family_config(model_type, head_dim=size)), "head_dim")
    assert heads(folder) == {(4, 4 * size)}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_a_head_size_that_the_class_computes_is_computed(tmp_path: Path, model_type: str) -> None:
    folder = strip(save_tiny(tmp_path / "m", family_config(model_type, head_dim=8)), "head_dim")
    assert heads(folder) == {(4, 32)}


@pytest.mark.parametrize("name", ["gemma3", "llava", "mistral3"])
def test_a_multimodal_model_may_leave_out_its_text_sizes(tmp_path: Path, name: str) -> None:
    """As Gemma 3 4B, LLaVA and Pixtral are published."""
    text = {"gemma3": "gemma3_text", "llava": "llama", "mistral3": "mistral"}[name]
    default = sizes.class_defaults(text)
    count = default["num_attention_heads"]
    config: Any = transformers.CONFIG_MAPPING[name](
        text_config={**COMMON_SETTINGS, "model_type": text, "num_attention_heads": count, "num_key_value_heads": 2,
                     "head_dim": 4},
        vision_config=_VISION[name],
    )  # fmt: skip
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path / "m")
    folder = strip(tmp_path / "m", "num_attention_heads", part="text_config")
    assert heads(folder) == {(count, 4 * count)}


_TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
         "patch_size": 8}  # fmt: skip
_VISION: dict[str, dict[str, Any]] = {
    "gemma3": _TINY,
    "llava": {**_TINY, "model_type": "clip_vision_model"},
    "mistral3": {**_TINY, "model_type": "pixtral"},
}


def test_a_text_config_without_a_type_has_its_wrappers(tmp_path: Path) -> None:
    folder = strip(wrapper(tmp_path / "m", "llava"), "model_type", part="text_config")
    assert read_spec(open_checkpoint(folder)).model_type == "llama"


def test_a_size_given_under_another_name_is_not_a_default() -> None:
    assert sizes.integer(sizes.completed({"hidden_size": 8}, "gpt2"), *sizes.HIDDEN) == 8
    assert sizes.integer(sizes.completed({"n_embd": 8}, "gpt2"), *sizes.HIDDEN) == 8


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"global_head_dim": 8}, [(4, 16), (4, 8)]),
        ({"swa_head_dim": 32, "swa_num_attention_heads": 2}, [(2, 32), (4, 16)]),
        ({"attention_other_setting": {"num_attention_heads": 2, "head_dim": 32}}, [(2, 32), (4, 16)]),
        ({"per_layer_config": {"01": {"head_dim": 8}}}, [(4, 16), (4, 8)]),
        ({"head_dim": 16}, [(4, 16), (4, 16)]),
    ],
)
def test_layers_may_have_heads_of_their_own(given: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    """As Gemma 4 and dots3 note are published, and as transformers writes such a config."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    values = {"num_attention_heads": 4, "head_dim": 16, **kinds, **given}
    layers = [sizes.layer_values(values, layer) for layer in range(2)]
    assert [(sizes.head_count(own), sizes.head_size(own, 64, 4)) for own in layers] == expected


def test_layers_that_are_listed_are_counted() -> None:
    assert sizes.layer_count(sizes.completed({"layers_block_type": ["mlp", "moe", "mlp"]}, "nemotron_h")) == 3


def test_the_tests_and_the_page_know_every_family() -> None:
    """Counts and lists are derived from the entries: a family that is added is tested and documented."""
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text()
    for family in KNOWN:
        assert f"| {family.name} |" in page
        assert all(name in page for name in family.model_types)
    assert set(CAUSAL) <= {name for family in KNOWN for name in family.model_types}
