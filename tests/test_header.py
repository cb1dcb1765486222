"""Headers of safetensors files: what is damaged or lies is a CheckpointError, and nothing else is raised."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import entry, refusal, write_raw
from hypothesis import given, settings
from hypothesis import strategies as st

from steer2edit.checkpoint import SINGLE, read_header
from steer2edit.errors import CheckpointError

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
