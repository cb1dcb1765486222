"""Reading a checkpoint's files: what is read is what was written, and whatever is damaged is a CheckpointError."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from steer2edit.checkpoint import INDEX, SINGLE, Checkpoint, open_checkpoint, read_header, read_json
from steer2edit.errors import CheckpointError

Tensors = dict[str, torch.Tensor]
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.complex64),
]
SHAPES = [(), (1,), (7,), (1, 5), (5, 1), (6, 4), (3, 4, 5), (0,), (0, 4), (4, 0)]


def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    values = torch.randint(0, 2 if dtype is torch.bool else 50, shape)
    return values.to(dtype)


def write(folder: Path, tensors: Tensors, shards: int = 0, config: Any = None) -> Path:
    """A checkpoint in one file, or dealt over ``shards`` files with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} if config is None else config))
    if not shards:
        save_file(tensors, folder / SINGLE)
        return folder
    weight_map = {}
    for index in range(shards):
        name = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[index::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    set_index(folder, weight_map)
    return folder


def set_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return folder


def entry(start: Any = 0, end: Any = 8, shape: Any = (2,), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


def refusal(folder: Path | str, revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, revision)
    return str(caught.value)


TENSORS: Tensors = {f"layer.{i}.weight": torch.randn(3, 4) for i in range(5)} | {"norm": torch.randn(4)}


@pytest.mark.parametrize("shards", [0, 1, 2, 6])
def test_what_is_read_is_what_was_written(tmp_path: Path, shards: int) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m", TENSORS, shards))
    assert len(checkpoint.shards) == max(shards, 1)
    assert checkpoint.tensors.keys() == TENSORS.keys()
    assert (checkpoint.name, checkpoint.revision, checkpoint.from_hub) == ("m", None, False)
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.read(name), tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_are_the_tensor_whatever_their_size(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {str(shape): random(shape, dtype) for shape in SHAPES}
    checkpoint = open_checkpoint(write(tmp_path / "m", tensors))
    for name, theirs in load_file(tmp_path / "m" / SINGLE).items():
        whole = checkpoint.read(name)
        assert (whole.dtype, whole.shape) == (theirs.dtype, theirs.shape)
        assert same(whole, theirs) and same(whole, tensors[name])
        for size in (1, 3, 16, 64, 1 << 20):
            found = [(first, block.clone()) for first, block in checkpoint.blocks(name, size)]
            rows = [block.shape[0] for _, block in found]
            assert [first for first, _ in found] == [sum(rows[:i]) for i in range(len(rows))]
            joined = torch.cat([block for _, block in found]) if found else theirs
            assert joined.dtype == dtype and same(joined.view(theirs.shape), theirs)
            assert all(block.nbytes <= max(size, block.nbytes // len(block)) for _, block in found)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def test_a_dtype_that_torch_lacks_is_indexed_but_not_read(tmp_path: Path) -> None:
    header = {"w": entry(0, 3, [4], "F6_E2M3")}
    checkpoint = open_checkpoint(write_raw(tmp_path / "m", json.dumps(header).encode(), b"abc"))
    with pytest.raises(CheckpointError, match="F6_E2M3"):
        checkpoint.read("w")
    with pytest.raises(CheckpointError, match="F6_E2M3"):
        list(checkpoint.blocks("w"))


def test_a_file_cut_after_opening_is_noticed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m", TENSORS))
    last = max(checkpoint.tensors.values(), key=lambda info: info.offset)
    with open(tmp_path / "m" / SINGLE, "r+b") as file:
        file.truncate(last.offset + 1)
    with pytest.raises(CheckpointError, match="changed or truncated"):
        checkpoint.read(last.name)
    with pytest.raises(CheckpointError, match="changed or truncated"):
        list(checkpoint.blocks(last.name))


def fingerprint(folder: Path, tensors: Tensors, shards: int = 0) -> str:
    return open_checkpoint(write(folder, tensors, shards)).fingerprint


def test_the_fingerprint_does_not_depend_on_sharding_or_order(tmp_path: Path) -> None:
    prints = {fingerprint(tmp_path / str(shards), TENSORS, shards) for shards in (0, 1, 2, 5)}
    prints.add(fingerprint(tmp_path / "reversed", dict(reversed(TENSORS.items())), 2))
    assert len(prints) == 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t: {**t, "norm": t["norm"] + 1}, id="values"),
        pytest.param(lambda t: {**t, "norm": t["norm"].view(torch.int32)}, id="dtype"),
        pytest.param(lambda t: {**t, "norm": t["norm"].view(2, 2)}, id="shape"),
        pytest.param(lambda t: {("gain" if name == "norm" else name): value for name, value in t.items()}, id="name"),
        pytest.param(lambda t: {**t, "more": torch.zeros(1)}, id="addition"),
        pytest.param(
            lambda t: {**t, "layer.0.weight": t["layer.1.weight"], "layer.1.weight": t["layer.0.weight"]}, id="swap"
        ),
    ],
)
def test_the_fingerprint_depends_on_every_tensor(tmp_path: Path, change: Callable[[Tensors], Tensors]) -> None:
    changed = {name: value.clone() for name, value in change(TENSORS).items()}
    assert fingerprint(tmp_path / "a", TENSORS) != fingerprint(tmp_path / "b", changed)


GOOD = json.dumps({"a": entry(0, 8), "b": entry(8, 16), "__metadata__": {"format": "pt"}})
LYING: dict[str, tuple[Any, int]] = {
    "length beyond the file": ({"a": entry(0, 80, [20])}, 8),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
    "same place twice": ({"a": entry(0, 8), "b": entry(0, 8)}, 8),
    "gap": ({"a": entry(0, 8), "b": entry(12, 20)}, 20),
    "gap at the start": ({"a": entry(4, 12)}, 12),
    "bytes left over": ({"a": entry(0, 8)}, 9),
    "wrong byte count": ({"a": entry(0, 8, [3])}, 8),
    "odd bits": ({"a": entry(0, 1, [1], "F4")}, 1),
    "end before start": ({"a": entry(8, 0)}, 8),
    "unknown dtype": ({"a": entry(dtype="F12")}, 8),
    "dtype of another case": ({"a": entry(dtype="f32")}, 8),
    "dtype null": ({"a": entry(dtype=None)}, 8),
    "dtype list": ({"a": entry(dtype=["F32"])}, 8),
    "negative size": ({"a": entry(shape=[-2])}, 8),
    "two negative sizes": ({"a": entry(shape=[-2, -1])}, 8),
    "negative offset": ({"a": entry(-8, 0)}, 8),
    "float size": ({"a": entry(shape=[2.0])}, 8),
    "float offset": ({"a": entry(0, 8.0)}, 8),
    "bool size": ({"a": entry(shape=[2, True])}, 8),
    "string size": ({"a": entry(shape=["2"])}, 8),
    "shape string": ({"a": entry(shape="2")}, 8),
    "shape object": ({"a": entry(0, 4, {})}, 4),
    "shape null": ({"a": entry(shape=None)}, 8),
    "huge size": ({"a": entry(shape=[1 << 62, 1 << 62])}, 8),
    "huge offset": ({"a": entry(1 << 80, (1 << 80) + 8)}, 8),
    "one offset": ({"a": {**entry(), "data_offsets": [8]}}, 8),
    "three offsets": ({"a": {**entry(), "data_offsets": [0, 4, 8]}}, 8),
    "offsets null": ({"a": {**entry(), "data_offsets": None}}, 8),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "entry null": ({"a": None}, 0),
    "entry list": ({"a": [1, 2]}, 0),
    "entry string": ({"a": "x"}, 0),
    **{f"header {value!r}": (value, 0) for value in ([], [[1]], "x", 3, None, True)},
}


@pytest.mark.parametrize("case", LYING)
def test_a_header_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    header, size = LYING[case]
    assert SINGLE in refusal(write_raw(tmp_path / "m", json.dumps(header).encode(), bytes(size)))


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"not json", id="text"),
        pytest.param(b"\xff\xfe\xfd", id="bytes"),
        pytest.param(b'{"a": {"dtype": "F32"', id="cut"),
        pytest.param(b'{"a": NaN}', id="nan"),
        pytest.param(b"[" * 200_000, id="deep lists"),
        pytest.param(b'{"a":' * 200_000, id="deep objects"),
        pytest.param(
            b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 0]}}', id="digits"
        ),
        pytest.param(f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}'.encode(), id="twice"),
        pytest.param(f'{{"a": {json.dumps(entry())[:-1]}, "dtype": "F32"}}}}'.encode(), id="key twice"),
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: bytes) -> None:
    assert SINGLE in refusal(write_raw(tmp_path / "m", header, bytes(8)))


@pytest.mark.parametrize("length", [len(GOOD) + 17, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_header_longer_than_its_file_is_refused(tmp_path: Path, length: int) -> None:
    assert "truncated" in refusal(write_raw(tmp_path / "m", GOOD.encode(), bytes(16), length))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 20])
def test_a_file_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    path = write_raw(tmp_path / "m", GOOD.encode(), bytes(16)) / SINGLE
    path.write_bytes(path.read_bytes()[:size])
    assert SINGLE in refusal(tmp_path / "m")


@settings(max_examples=400, deadline=None, database=None)
@given(data=st.data())
def test_no_mutation_of_a_header_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    raw = bytearray(struct.pack("<Q", len(GOOD)) + GOOD.encode() + bytes(16))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        cut = data.draw(st.integers(0, 4))
        raw[at : at + cut] = data.draw(st.one_of(st.binary(max_size=4), st.sampled_from(FRAGMENTS)))
        raw = raw or bytearray(1)
    path.write_bytes(raw)
    with suppress(CheckpointError):
        infos = read_header(path)
        assert sum(info.nbytes for info in infos) <= len(raw)


FRAGMENTS = [
    b"{}",
    b"[]",
    b"null",
    b"-1",
    b"1e9",
    b"0",
    b'"',
    b",",
    b"]",
    b"}",
    b"99999999999999999999",
    b'"a"',
    b"true",
]


def test_every_damaged_shard_is_told_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TENSORS, 3)
    first, second, third = sorted(folder.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    message = refusal(folder)
    assert first.name in message and second.name in message and third.name not in message


def test_an_index_that_misplaces_a_tensor_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TENSORS, 2)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    other = next(shard for shard in index.values() if shard != index["norm"])
    set_index(folder, {**index, "norm": other, "ghost": other})
    message = refusal(folder)
    assert "'norm'" in message and "'ghost'" in message and other in message


def test_tensors_outside_the_index_are_left_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TENSORS, 2)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    del index["norm"]
    set_index(folder, index)
    assert set(open_checkpoint(folder).tensors) == TENSORS.keys() - {"norm"}


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "./model.safetensors",
        "",
        ".",
        "..",
        None,
        3,
        ["a"],
        {"a": 1},
    ],
)
def test_an_index_names_plain_files_only(tmp_path: Path, shard: Any) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    folder = write(tmp_path / "m", TENSORS)
    set_index(folder, {"norm": shard})
    assert "outside the folder" in refusal(folder)


@pytest.mark.parametrize("shard", ["gone.safetensors", "a\0b", "x" * 5000, "folder"])
def test_a_shard_that_cannot_be_read_is_named(tmp_path: Path, shard: str) -> None:
    folder = write(tmp_path / "m", TENSORS)
    (folder / "folder").mkdir()
    set_index(folder, {"norm": shard})
    assert "cannot read" in refusal(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 3, [["norm", SINGLE]]])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    folder = write(tmp_path / "m", TENSORS)
    set_index(folder, weight_map)
    assert "has no weight_map" in refusal(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\x00"])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_none_is_refused(tmp_path: Path, name: str, text: str) -> None:
    folder = write(tmp_path / "m", TENSORS)
    (folder / name).write_text(text)
    assert name in refusal(folder)


@pytest.mark.parametrize("raw", [b"\xff\xff", b"[" * 200_000, b'{"a":' * 200_000, b"9" * 10_000])
def test_json_of_any_bytes_is_read_or_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_a_config_is_needed(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TENSORS)
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)
    (folder / "config.json").mkdir()
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("pytorch_model.bin", "found pytorch_model.bin"),
        ("model.gguf", "found model.gguf"),
        ("consolidated.00.pth", "found consolidated.00.pth"),
        ("consolidated.safetensors", "found consolidated.safetensors"),
        ("adapter_config.json", "PEFT adapter"),
        ("readme.txt", "neither model.safetensors nor"),
    ],
)
def test_folders_without_safetensors_say_what_they_hold(tmp_path: Path, found: str, said: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / found).write_text("")
    assert said in refusal(tmp_path)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path / "m", TENSORS) / SINGLE
    assert "is a file; expected a checkpoint folder" in refusal(path)


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "./no-such", "no/such/folder", "a b", "a\0b", "~nobody-here/model", "user/", "../x"]
)
def test_what_is_no_folder_and_no_hub_id_does_not_exist(model: str) -> None:
    assert "does not exist" in refusal(model)


def test_a_hub_id_that_cannot_be_fetched_says_so() -> None:
    assert "neither a folder here nor could be fetched" in refusal("nobody/no-such-model")


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    assert "--revision main" in refusal(write(tmp_path / "m", TENSORS), "main")


def test_a_checkpoint_is_a_value(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TENSORS)
    first: Checkpoint = open_checkpoint(folder)
    assert first == open_checkpoint(str(folder))
