"""File formats: the rows in the bytes of a JSON, CSV, Parquet or text file, each with its place.

JSON is told by its content, whatever the name: one object a line, objects one after another, a list of rows, an object that
holds the list, columns, or what pandas writes. A reader yields ``(place, row)`` and adds ``(place, fault)`` to the problems.
Of a table without any column that is read it yields the header alone, with null in every cell.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from steer2edit.errors import first_line, shown
from steer2edit.files.untrusted import parse_json, parse_json_values
from steer2edit.notices import notice

MAX_BYTES = 1 << 30
_MAX_ROWS = 5_000_000
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as the next one does
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

Problems = list[tuple[str, str]]
Rows = Iterator[tuple[str, object]]
Reader = Callable[[bytes, str, Problems, Collection[str]], Rows]


def key_of(name: object) -> str:
    """A column's name as it is compared: without white space around it, in lower case."""
    return str(name).strip().casefold()


def as_utf8(data: bytes, name: str) -> bytes:
    """A file's bytes in UTF-8, without a byte order mark.

    UTF-16 and UTF-32 are converted. Other bytes stay as they are.
    """
    encoding = next((encoding for mark, encoding in _BOMS if data.startswith(mark)), None)
    body = data.removeprefix(next((mark for mark, _ in _BOMS if data.startswith(mark)), b""))
    if encoding is None and len(data) >= 4 and data[:1] != b"\0" and data[1:4:2] == b"\0\0" and data[2] != 0:
        encoding = "utf-16-le"  # ASCII in two bytes, without a mark
    if encoding in (None, "utf-8"):
        return body
    try:
        text = body.decode(encoding).encode("utf-8")
    except UnicodeError:
        return body  # what reads it says that it is not UTF-8
    notice(f"{name} is in {encoding[:6].upper()}")
    return text


def read_json(data: bytes, name: str, problems: Problems, columns: Collection[str]) -> Rows:
    """Rows of JSON, in any of the layouts above."""
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    if not lines:
        return
    alone = len(lines) == 1
    if not alone and lines[0][1].lstrip()[:1] == b"{" and any(_is_json(line) for _, line in lines[:20]):
        yield from _json_lines(lines, name, problems)
        return
    try:
        values = parse_json_values(data)
    except ValueError as error:
        if alone or any(_is_json(line) for _, line in lines[:20]):
            yield from _json_lines(lines, name, problems)
            return
        at = data.count(b"\n", 0, error.start) + 1 if isinstance(error, UnicodeDecodeError) else None
        at = error.lineno if isinstance(error, json.JSONDecodeError) else at
        problems.append((f"{name} line {at}" if at else name, _reason(error)))
        return
    if len(values) == 1:
        yield from _unfolded(values[0], name, problems, columns)
    else:
        what = "line" if len(values) == len(lines) else "object"
        places = [number for number, _ in lines] if what == "line" else range(1, len(values) + 1)
        yield from ((f"{name} {what} {at}", row) for at, row in zip(places, values, strict=True))


def _json_lines(lines: list[tuple[int, bytes]], name: str, problems: Problems) -> Rows:
    for number, line in lines:
        where = f"{name} line {number}"
        try:
            yield where, parse_json(line.removeprefix(codecs.BOM_UTF8))
        except ValueError as error:
            problems.append((where, _reason(error)))


def _is_json(line: bytes) -> bool:
    """Whether a line is an object or a list by itself."""
    try:
        return isinstance(parse_json(line.removeprefix(codecs.BOM_UTF8)), (dict, list))
    except ValueError:
        return False


def _unfolded(value: Any, name: str, problems: Problems, columns: Collection[str]) -> Rows:
    """The rows of one JSON value: a list, an object that holds one, columns, or one row."""
    if isinstance(value, list):
        yield from ((f"{name} row {number}", row) for number, row in enumerate(value, start=1))
        return
    if not isinstance(value, dict):
        problems.append((name, f"expected a list of rows, found {shown(value)}"))
        return
    known = [key for key in value if key_of(key) in columns]
    lists = {key: entry for key, entry in value.items() if isinstance(entry, list)}
    row_lists = [
        key for key, entry in lists.items() if key not in known and all(isinstance(row, dict) for row in entry)
    ]
    if not known and isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        rows: list[Any] = [
            dict(zip(value["columns"], row, strict=False)) for row in value["data"] if isinstance(row, list)
        ]
    elif not known and len(row_lists) == 1:
        rows = value[row_lists[0]]
    elif known and all(_is_column(value[key]) for key in known):
        cells = {
            key: entry if isinstance(entry, list) else list(entry.values())
            for key, entry in value.items()
            if _is_column(entry)
        }
        lengths = {key: len(entry) for key, entry in cells.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{key} {length}" for key, length in lengths.items())
            problems.append((name, f"its columns have different numbers of rows: {counts}"))
            return
        rows = [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]
    else:
        yield f"{name} line 1", value
        return
    yield from ((f"{name} row {number}", row) for number, row in enumerate(rows, start=1))


def _is_column(value: Any) -> bool:
    """Whether a JSON value is a column of cells, and not one cell: a chat or a message."""
    if isinstance(value, dict):
        return bool(value) and all(re.fullmatch(r"-?\d+", str(key)) for key in value)
    return isinstance(value, list) and not all(isinstance(cell, dict) for cell in value)


def read_csv(data: bytes, name: str, problems: Problems, columns: Collection[str]) -> Rows:
    """Rows of a table with a header, whose cells are separated by commas, semicolons, tabs or vertical bars."""
    text = _decoded(data, name, problems)
    first, _, rest = text.partition("\n")
    offset = 0
    delimiter = ""
    if separator := re.fullmatch(r'"?sep=(.)"?\s*', first):
        delimiter, text, offset = separator[1], rest, 1
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses a long response; the limit is the whole process's
    try:
        delimiter = delimiter or _delimiter(text, columns)
        if delimiter != ",":
            notice(f"{name}: cells are separated by {_DELIMITERS.get(delimiter, shown(delimiter))}")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        line, header = 1 + offset, None
        try:
            for cells in reader:
                where, line = f"{name} line {line}", reader.line_num + 1 + offset
                if not any(cells):
                    continue
                if header is None:
                    header = [cell.strip() for cell in cells]
                    keys = [key_of(cell) for cell in header]
                    if fault := _header_fault(keys, columns):
                        problems.append((f"{where} (the header)", fault))
                        return
                    if not set(keys) & set(columns):
                        yield f"{where} (the header)", dict.fromkeys(header)
                        return
                elif len(cells) != len(header):
                    hint = (
                        "; a cell that holds the separator needs quotes around it" if len(cells) > len(header) else ""
                    )
                    problems.append((where, f"expected {len(header)} cells as in the header, found {len(cells)}{hint}"))
                else:
                    yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            problems.append((f"{name} line {line}", str(error)))
    finally:
        csv.field_size_limit(limit)


def _header_fault(keys: list[str], columns: Collection[str]) -> str:
    twice = ", ".join(sorted({key for key in columns if keys.count(key) > 1}))
    if twice:
        return f"column {twice} occurs twice"
    return ""


def _delimiter(text: str, columns: Collection[str]) -> str:
    """The separator by which the first line names most columns that are read."""
    line = next((line for line in text.splitlines() if line.strip()), "")

    def named(delimiter: str) -> int:
        cells = next(csv.reader([line], delimiter=delimiter), [])
        return sum(key_of(cell) in columns for cell in cells)

    return max(_DELIMITERS, key=named)


def read_parquet(data: bytes, name: str, problems: Problems, columns: Collection[str]) -> Rows:
    """Rows of a Parquet file, with those of its columns that are read."""
    if not data:
        return
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        problems.append((name, "Parquet needs pyarrow; install it with: pip install 'steer2edit[parquet]'"))
        return
    try:
        schema = parquet.read_schema(io.BytesIO(data))
        names = [column for column in schema.names if key_of(column) in columns]
        if not names:
            yield name, dict.fromkeys(schema.names)
            return
        # what is stored once stays once in memory: a file of a few bytes may stand for any number of them
        plain = [c for c in names if arrow.types.is_string(schema.field(c).type)]
        file = parquet.ParquetFile(io.BytesIO(data), read_dictionary=plain)
        unpacked = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        if unpacked > MAX_BYTES:
            problems.append((name, f"it unpacks to {unpacked} bytes, and at most {MAX_BYTES} are read"))
            return
        # nested texts are unpacked, each at most as long as all that is stored
        batch = 256 if plain == names else max(1, min(256, (256 << 20) // max(unpacked, 1)))
        yield from _parquet_rows(file, name, names, batch)
    except (arrow.ArrowException, OSError, ValueError) as error:
        problems.append((name, _reason(error)))


def _parquet_rows(file: Any, name: str, columns: list[str], batch_size: int) -> Rows:
    number = size = 0
    for batch in file.iter_batches(batch_size=batch_size, columns=columns):
        for index in range(batch.num_rows):
            row = {column: _text(batch.column(place)[index].as_py()) for place, column in enumerate(batch.schema.names)}
            number += 1
            size += sum(len(value) if isinstance(value, str) else len(repr(value)) for value in row.values())
            if size > MAX_BYTES or number > _MAX_ROWS:
                raise ValueError(f"it unpacks to more than {_MAX_ROWS} rows or {MAX_BYTES} characters")
            yield f"{name} row {number}", row


def _text(value: Any) -> Any:
    """A cell of bytes as the text that it is; any other cell as it is."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def read_text_lines(data: bytes, name: str, problems: Problems, columns: Collection[str]) -> Rows:
    """The lines of a text file, each of them a row that is a text."""
    for number, line in enumerate(_decoded(data, name, problems).split("\n"), start=1):
        if line.strip():
            yield f"{name} line {number}", line.strip()


def _decoded(data: bytes, name: str, problems: Problems) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.append((f"{name} line {line}", _reason(error)))
        return ""


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON: {error.msg} at column {error.colno}"
    return first_line(error)
