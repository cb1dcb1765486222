"""Reading a checkpoint: what is read is what was written, and what cannot be opened is a CheckpointError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import TENSORS, Tensors, entry, refusal, write, write_raw
from safetensors.torch import load_file

from steer2edit.checkpoint import INDEX, SINGLE, Checkpoint, open_checkpoint, read_json
from steer2edit.errors import CheckpointError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.complex64),
]
SHAPES = [(), (1,), (7,), (1, 5), (5, 1), (6, 4), (3, 4, 5), (0,), (0, 4), (4, 0)]


def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    values = torch.randint(0, 2 if dtype is torch.bool else 50, shape)
    return values.to(dtype)


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


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\x00"])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_none_is_refused(tmp_path: Path, name: str, text: str) -> None:
    folder = write(tmp_path / "m", TENSORS, 2)
    (folder / name).write_text(text)
    assert name in refusal(folder)


@pytest.mark.parametrize("raw", [b"\xff\xff", b"[" * 200_000, b'{"a":' * 200_000, b"9" * 10_000])
def test_json_of_any_bytes_is_read_or_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


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
