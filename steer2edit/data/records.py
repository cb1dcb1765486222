"""Rows of data files: reading JSONL, JSON, CSV and Parquet, here or on the Hub, and what is wrong with each row.

All the problems of a source are reported together.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from steer2edit.errors import DataError, HubError, first_line, listing, shown
from steer2edit.files.hub import dataset_file, read_reference
from steer2edit.files.untrusted import parse_json, read_bytes

T = TypeVar("T")

_MAX_BYTES = 1 << 30
_MAX_ROWS = 5_000_000


class Message(NamedTuple):
    """One turn of a chat; a tuple, so that prompts can be compared and hashed."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class Shape:
    """What rows hold: the ``columns`` read, what is ``missing`` given the columns there are ("" if nothing), and how both
    are said: ``purpose`` ("contrast data") and ``expected``.
    """

    columns: tuple[str, ...]
    missing: Callable[[Iterable[str]], str]
    purpose: str
    expected: str


# Of a row, its place in messages and its number makes values; notes what is wrong with it.
Build = Callable[[dict[str, object], str, int, list[str]], list[T]]


def read_source(source: str | Path, shape: Shape, build: Build[T]) -> list[T]:
    """What ``build`` makes of each row of a file, or of a Hub dataset ``user/name[@revision][:file]``, in order.

    Raises DataError, which lists every problem with its line or row.
    """
    try:
        path = Path(source).expanduser()
        folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot read {shown(str(source))}: {error}") from None
    if folder:
        raise DataError(f"{path} is a folder; name a file in it ({', '.join(_READERS)})")
    if exists:
        return _read(path, path.name, shape, build)
    repository, _, file = str(source).partition(":")
    reference = read_reference(repository)
    if reference is not None and "/" in reference.repository:
        try:
            path, file = dataset_file(reference, file, tuple(_READERS))
        except HubError as error:
            raise DataError(str(error)) from None
        return _read(path, f"{reference}:{file}", shape, build)
    raise DataError(
        f"{source} does not exist, and is no Hub dataset (user/name, user/name:file or user/name@revision:file) either"
    )


def parse_json_lines(data: bytes, name: str, shape: Shape, build: Build[T]) -> list[T]:
    """What ``build`` makes of each line. Raises DataError like :func:`read_source`."""
    return _parse(data, name, _json_lines, shape, build)


def prompt_of(value: object) -> Prompt:
    """A prompt whose :func:`prompt_fault` is empty, as text or chat messages."""
    if isinstance(value, str):
        return value
    assert isinstance(value, list)
    return tuple(Message(message["role"], message["content"]) for message in value)


def prompt_digest(prompt: Prompt) -> str:
    """16 hex digits of SHA-256 over a prompt, its case and white space aside; one user message counts as its text."""
    if not isinstance(prompt, str) and len(prompt) == 1 and prompt[0].role == "user":
        prompt = prompt[0].content
    text = prompt if isinstance(prompt, str) else json.dumps([list(message) for message in prompt])
    return hashlib.sha256(" ".join(text.split()).casefold().encode("utf-8", "surrogatepass")).hexdigest()[:16]


def prompt_fault(prompt: object) -> str:
    """What is wrong with a row's prompt; "" if nothing is."""
    if isinstance(prompt, str):
        return text_fault("prompt", prompt)
    if not isinstance(prompt, list):
        return f"prompt: expected a string or a list of chat messages, found {shown(prompt)}"
    if not prompt:
        return "prompt: the list of chat messages is empty"
    for i, message in enumerate(prompt, start=1):
        if not isinstance(message, dict):
            return f'prompt, message {i}: expected {{"role", "content"}}, found {shown(message)}'
        for key in Message._fields:
            if key not in message:
                return f'prompt, message {i}: "{key}" is missing'
            if fault := text_fault(key, message[key], filled=key == "role"):
                return f"prompt, message {i}: {fault}"
    return ""


def text_fault(key: str, value: object, filled: bool = False) -> str:
    """What is wrong with a text of a row; ``filled`` texts hold more than white space."""
    if not isinstance(value, str):
        return f"{key}: expected a string, found {shown(value)}"
    if filled and not value.strip():
        return f"{key} is empty" if not value else f"{key} holds nothing but white space"
    half = re.search("[\ud800-\udfff]", value)
    return f"{key} holds half of a surrogate pair, which is no character" if half else ""


# A reader yields each row with its place, and notes what it cannot read.
_Reader = Callable[[bytes, str, list[str], Shape], Iterator[tuple[str, object]]]


def _read(path: Path, name: str, shape: Shape, build: Build[T]) -> list[T]:
    reader = _READERS.get(PurePosixPath(name).suffix.lower())
    if reader is None:
        raise DataError(f"{name} is in no known format; expected a name that ends in {', '.join(_READERS)}")
    try:
        return _parse(read_bytes(path, _MAX_BYTES), name, reader, shape, build)
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror or error}") from None


def _parse(data: bytes, name: str, reader: _Reader, shape: Shape, build: Build[T]) -> list[T]:
    problems: list[str] = []
    found: list[T] = []
    rows = 0
    data = data.removeprefix(codecs.BOM_UTF8)
    for where, row in reader(data, name, problems, shape):
        if not isinstance(row, dict):
            problems.append(f"{where}: expected an object, found {shown(row)}")
        elif missing := shape.missing(row):
            problems.append(f"{where}: {missing}")
        else:
            found += build(row, where, rows, problems)
        rows += 1
    if not data.strip():
        problems = [f"{name} is empty"]
    elif not rows and not problems:
        problems = [f"{name} holds no rows; {shape.expected}"]
    if problems:
        raise DataError(f"{name} cannot be used as {shape.purpose}:\n{listing(problems)}")
    return found


def _json_lines(data: bytes, name: str, problems: list[str], shape: Shape) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        where = f"{name} line {number}"
        if line.strip():
            try:
                yield where, parse_json(line)
            except ValueError as error:
                problems.append(f"{where}: {_reason(error)}")


def _json_list(data: bytes, name: str, problems: list[str], shape: Shape) -> Iterator[tuple[str, object]]:
    if not _decoded(data, name, problems).strip():
        return
    try:
        rows = parse_json(data)
    except ValueError as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        hint = "; one object a line is .jsonl" if "Extra data" in str(error) else ""
        problems.append(f"{name}{line}: {_reason(error)}{hint}")
        return
    if isinstance(rows, list):
        yield from ((f"{name} row {i}", row) for i, row in enumerate(rows, start=1))
    else:
        problems.append(f"{name}: expected a list of rows, found {shown(rows)}")


def _csv(data: bytes, name: str, problems: list[str], shape: Shape) -> Iterator[tuple[str, object]]:
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses a long response; the limit is the whole process's
    try:
        reader = csv.reader(io.StringIO(_decoded(data, name, problems), newline=""), strict=True)
        line, header = 1, None
        try:
            for cells in reader:
                where, line = f"{name} line {line}", reader.line_num + 1
                if not any(cells):
                    continue
                if header is None:
                    header = [cell.strip() for cell in cells]
                    twice = ", ".join(sorted({key for key in shape.columns if header.count(key) > 1}))
                    if fault := f"column {twice} occurs twice" if twice else shape.missing(header):
                        problems.append(f"{where} (the header): {fault}")
                        return
                elif len(cells) != len(header):
                    problems.append(f"{where}: expected {len(header)} cells as in the header, found {len(cells)}")
                else:
                    yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            problems.append(f"{name} line {line}: {error}")
    finally:
        csv.field_size_limit(limit)


def _parquet(data: bytes, name: str, problems: list[str], shape: Shape) -> Iterator[tuple[str, object]]:
    if not data:
        return
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        problems.append(f"{name}: Parquet needs pyarrow; install it with: pip install 'steer2edit[parquet]'")
        return
    try:
        schema = parquet.read_schema(io.BytesIO(data))
        columns = [column for column in schema.names if column in shape.columns]
        if missing := shape.missing(schema.names):
            problems.append(f"{name}: {missing}")
            return
        # what is stored once stays once in memory: a file of a few bytes may stand for any number of them
        plain = [c for c in columns if arrow.types.is_string(schema.field(c).type)]
        file = parquet.ParquetFile(io.BytesIO(data), read_dictionary=plain)
        held = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        if held > _MAX_BYTES:
            problems.append(f"{name}: it unpacks to {held} bytes, and at most {_MAX_BYTES} are read")
            return
        # nested texts are unpacked, each at most as long as all that is stored
        batch = 256 if plain == columns else max(1, min(256, (256 << 20) // max(held, 1)))
        yield from _parquet_rows(file, name, columns, batch)
    except (arrow.ArrowException, OSError, ValueError) as error:
        problems.append(f"{name}: {_reason(error)}")


def _parquet_rows(file: Any, name: str, columns: list[str], batch_size: int) -> Iterator[tuple[str, object]]:
    number = size = 0
    for batch in file.iter_batches(batch_size=batch_size, columns=columns):
        for index in range(batch.num_rows):
            row = {column: batch.column(place)[index].as_py() for place, column in enumerate(batch.schema.names)}
            number += 1
            size += sum(len(value) if isinstance(value, str) else len(repr(value)) for value in row.values())
            if size > _MAX_BYTES or number > _MAX_ROWS:
                raise ValueError(f"it unpacks to more than {_MAX_ROWS} rows or {_MAX_BYTES} characters")
            yield f"{name} row {number}", row


_READERS: dict[str, _Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _decoded(data: bytes, name: str, problems: list[str]) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.append(f"{name} line {line}: {_reason(error)}")
        return ""


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte 0x{error.object[error.start]:02x})"
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON: {error.msg} at column {error.colno}"
    return first_line(error)
