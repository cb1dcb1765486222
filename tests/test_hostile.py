"""Hostile files: never a traceback, a hang, a lot of memory, or a write outside the output; one message and exit code 2."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, llama_config, make_tokenizer, run, save_tiny
from hostile import TARGETS, attack, make_sound, run_limited
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from steer2edit.checkpoint import open_checkpoint, read_header
from steer2edit.data.contrast import read_contrast
from steer2edit.data.templates import render_prompt
from steer2edit.errors import CheckpointError, DataError, PlanError, printable
from steer2edit.files.atomic import load_tensors
from steer2edit.files.untrusted import parse_json
from steer2edit.importers.adapters import read_peft
from steer2edit.runtime.adapters import with_adapter
from steer2edit.runtime.model import load_weights


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "runs").mkdir()
    make_sound(folder / "sound", lambda path: save_tiny(path, llama_config(), max_shard_size="60KB"), ROWS)
    return folder


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**40))
@example(seed=225)  # tokenizer: an end token that is a list
def test_mutated_files_are_survived(sound: Path, target: str, seed: int) -> None:
    assert attack(target, seed, sound / "sound", sound / "runs") is None


def shard(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def entry(**changes: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}}).encode()


HEADERS: dict[str, tuple[bytes, str]] = {
    "length of 2^64": (struct.pack("<Q", 2**64 - 1) + b"{}", "claims 18446744073709551615 bytes"),
    "nothing": (b"", "too few"),
    "a list": (shard(b"[]"), "damaged header"),
    "UTF-16": (shard(entry().decode().encode("utf-16")), "damaged header"),
    "nests deeply": (shard(b"[" * 200_000), "nests too deeply"),
    "100 MB of lists": (shard(b'{"a":[' + b"[]," * (33 << 20) + b"[]]}"), "more than"),
    "a key twice": (shard(b'{"a":1,"a":2}'), "occurs twice"),
    "an infinite extent": (
        shard(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}'),
        "not whole numbers",
    ),
    "an extent of 4000 digits": (shard(entry(shape=[10**4000] * 200)), "which no tensor has"),
    "an extent past any memory": (shard(entry(shape=[2**62, 0], data_offsets=[0, 0])), "which no tensor has"),
    "a thousand axes": (shard(entry(shape=[1] * 1000), b"\0" * 4), "which no tensor has"),
    "an extent of true": (shard(entry(shape=[True]), b"\0" * 4), "not whole numbers"),
    "a dtype that is a list": (shard(entry(dtype=[])), "unknown dtype"),
    "offsets backwards": (shard(entry(data_offsets=[4, 0]), b"\0" * 4), "does not take"),
    "offsets past the end": (shard(entry(data_offsets=[4, 8]), b"\0" * 4), "begins at byte"),
    "half of a surrogate pair": (shard(entry().replace(b'"a"', b'"\\ud800"'), b"\0" * 4), "surrogate"),
    "metadata that is no text": (shard(b'{"__metadata__":{"a":1}}'), "not an object of texts"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers(kind: str, tmp_path: Path) -> None:
    raw, message = HEADERS[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("special", [fifo, device])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "anything"])
def test_pipes_and_devices_are_not_opened(
    special: Callable[[Path], None], name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    for file in tiny_llama.iterdir():
        if file.name != name:
            (tmp_path / file.name).symlink_to(file)  # as in the Hub's cache
    assert name == "anything" or not (tmp_path / name).exists()
    special(tmp_path / name)
    with pytest.raises(CheckpointError, match="neither file nor folder"):
        open_checkpoint(tmp_path)
    with pytest.raises(PlanError, match="not a regular file"):
        load_tensors(tmp_path / name)


CONFIGS: dict[str, dict[str, Any]] = {
    "a thousand million layers": {"num_hidden_layers": 10**9},
    "layers without end": {"num_hidden_layers": 10**400},
    "layers in a text": {"num_hidden_layers": "3"},
    "layers that are true": {"num_hidden_layers": True},
    "no heads": {"num_attention_heads": 0},
    "heads in a list": {"num_attention_heads": [4]},
    "a negative size": {"hidden_size": -32},
    "a size that is not a number": {"hidden_size": float("nan")},
    "a type that is a list": {"model_type": ["llama"]},
    "a text config that is itself odd": {"text_config": {"num_hidden_layers": {}}},
    "a type with escapes": {"model_type": "\x1b[2J"},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs(kind: str, sound: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (sound / "sound" / "model").iterdir():
        (model / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps({**config, **CONFIGS[kind]}))
    stats = sound / "sound" / "x.stats.safetensors"
    assert run_limited(["plan", str(model), "--stats", str(stats), "-o", str(tmp_path / "out")]) is None


def test_an_index_may_not_point_outside_the_folder(tiny_llama_bf16: Path, tmp_path: Path) -> None:
    for file in tiny_llama_bf16.iterdir():
        (tmp_path / file.name).symlink_to(file)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for place in ("../x.safetensors", "/etc/passwd", "a/../b", "..", "", "a\\/b", None, 3, ["x"]):
        (tmp_path / "model.safetensors.index.json").unlink()
        index["weight_map"]["model.norm.weight"] = place
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)


@given(st.binary(max_size=200))
@settings(max_examples=200)
def test_json_is_a_value_or_a_value_error(raw: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse_json(raw, unique=True)


@given(st.text(max_size=60))
def test_what_is_printed_moves_no_cursor_and_can_be_encoded(text: str) -> None:
    said = printable(text)
    said.encode("utf-8")
    assert not any(
        (ord(character) < 32 and character not in "\n\t") or 0x7F <= ord(character) < 0xA0 for character in said
    )
    assert printable(said) == said


TEMPLATES = {
    "runs on and on": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x",
    "a billion characters": "{{ 'x' * 10**10 }}",
    "ever larger": "{% set n = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "reaches for Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "opens a file": "{{ cycler.__init__.__globals__.os.popen('touch HERE').read() }}",
    "includes a file": "{% include '/etc/passwd' %}",
    "recurses": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_chat_templates(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer2edit.data.template_trials._SECONDS", 0.3)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES[kind].replace("HERE", str(tmp_path / "touched"))
    with pytest.raises(DataError, match="rejects messages"):
        render_prompt("what is the cat ?", tokenizer)
    assert not (tmp_path / "touched").exists()


def test_a_pickle_is_not_loaded(loaded: Any, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "adapter").mkdir()
    torch.save({"a": Trap()}, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 1, "target_modules": ["o_proj"]}'
    )
    with pytest.raises(CheckpointError, match="pickles"):
        with_adapter(loaded.model, tmp_path / "adapter")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_replication": [[0, 3]] * 100_000}, "repeats layers"),
        ({"r": 10**9}, "the rank 1000000000"),
        ({"rank_pattern": {"o_proj": 10**9}}, "the rank 1000000000"),
    ],
)
def test_a_few_words_of_an_adapter_s_config_do_not_build_gigabytes(
    sound: Path, loaded: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(sound / "sound" / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        with_adapter(loaded.model, tmp_path / "adapter")


def test_a_regular_expression_that_never_ends_is_stopped(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer2edit.importers.adapters._SECONDS", 0.3)
    shutil.copytree(sound / "sound" / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_pattern": {"((\\w|\\.)+)+!": 2}}))
    with pytest.raises(DataError, match="longer than"):
        read_peft(tmp_path / "adapter")


def test_a_model_with_an_adapter_in_its_folder_is_not_taken_for_another(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}'
    )
    with pytest.raises(CheckpointError, match="beside a model"):
        load_weights(tmp_path / "model")


def test_a_small_parquet_file_that_stands_for_a_large_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    indices = arrow.array([0] * 20_000, arrow.int32())
    texts = arrow.DictionaryArray.from_arrays(indices, arrow.array(["x" * 1000]))
    parquet.write_table(arrow.table({"prompt": texts, "positive": texts, "negative": texts}), tmp_path / "rows.parquet")
    assert (tmp_path / "rows.parquet").stat().st_size < 20_000
    monkeypatch.setattr("steer2edit.data.readers.MAX_BYTES", 1_000_000)
    with pytest.raises(DataError, match="unpacks to more than"):
        read_contrast(tmp_path / "rows.parquet")


def test_a_link_to_the_readers_own_files_is_not_copied(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    model = tmp_path / "model"
    model.mkdir()
    for file in (sound / "sound" / "model").iterdir():
        (model / file.name).symlink_to(file)  # all in one place, as in the Hub's cache: copied
    plan = sound / "sound" / "x.plan.safetensors"
    assert run("emit", plan, model, "--to", "checkpoint", "-o", tmp_path / "sound").exit_code == 0
    (model / "vocab.json").symlink_to(tmp_path / "secret")
    result = run("emit", plan, model, "--to", "checkpoint", "-o", tmp_path / "out")
    assert result.exit_code == 2 and "vocab.json" in result.stderr and "links to files elsewhere" in result.stderr
    assert not (tmp_path / "out").exists()
