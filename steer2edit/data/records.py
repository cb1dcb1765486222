"""Rows of data files, here or on the Hub: find, read and check them.

A fault is said once, with the first row that has it and the number of the others.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from steer2edit.data.prompts import Fault
from steer2edit.data.readers import (
    MAX_BYTES,
    Problems,
    Reader,
    as_utf8,
    read_csv,
    read_json,
    read_parquet,
    read_text_lines,
)
from steer2edit.errors import DataError, HubError, listing, shown
from steer2edit.files.hub import dataset_file, read_reference
from steer2edit.files.stand_ins import stand_in
from steer2edit.files.untrusted import read_bytes

T = TypeVar("T")

READERS: dict[str, Reader] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text_lines,
}
_HUB = tuple(suffix for suffix in READERS if suffix != ".txt")
_GZIP = ".gz"
_REMEDIES = {
    ".zip": "unpack it",
    ".xz": "unpack it",
    ".bz2": "unpack it",
    ".zst": "unpack it",
    ".7z": "unpack it",
    ".xlsx": "save the sheet as CSV",
    ".xls": "save the sheet as CSV",
    ".ods": "save the sheet as CSV",
    ".yaml": "save the rows as JSON",
    ".yml": "save the rows as JSON",
    ".json5": "save it as JSON, without comments and trailing commas",
    ".arrow": "save it as Parquet",
    ".pkl": "save the rows as JSON; pickles are not loaded",
    ".pt": "save the rows as JSON; pickles are not loaded",
}

# Of a row, its place in messages and its number makes values. Raises Fault for what is wrong with the row.
Build = Callable[[object, str, int], list[T]]


def read_source(source: str | Path, columns: Collection[str], purpose: str, expected: str, build: Build[T]) -> list[T]:
    """What ``build`` makes of each row of a file, or of a Hub dataset ``user/name[@revision][:file]``, in order.

    ``columns`` are the names, in lower case, of the columns that are read; ``purpose`` ("contrast data") and ``expected`` are
    for messages. Raises DataError, which lists every fault.
    """
    path, name = _located(source)
    suffix = PurePosixPath(name.lower().removesuffix(_GZIP)).suffix
    reader = READERS.get(suffix)
    if reader is None:
        known = f"{', '.join(READERS)}, or one of these with {_GZIP}"
        remedy = f"{_REMEDIES[suffix]}; " if suffix in _REMEDIES else ""
        raise DataError(f"{name} is in no known format; {remedy}expected a name that ends in {known}")
    if reason := stand_in(path):
        raise DataError(reason)
    try:
        data = read_bytes(path, MAX_BYTES)
        if name.lower().endswith(_GZIP):
            data = _unpacked(data)
    except (OSError, zlib.error) as error:
        raise DataError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from None
    return parse_rows(data, name, reader, columns, purpose, expected, build)


def parse_rows(
    data: bytes, name: str, reader: Reader, columns: Collection[str], purpose: str, expected: str, build: Build[T]
) -> list[T]:
    """What ``build`` makes of each row in a file's bytes. Raises DataError like :func:`read_source`."""
    problems: Problems = []
    values: list[T] = []
    rows = 0
    if reader is not read_parquet:
        data = as_utf8(data, name)
    for where, row in reader(data, name, problems, columns):
        try:
            values += build(row, where, rows)
        except Fault as fault:
            problems += [(where, str(text)) for text in fault.args]
        rows += 1
    if not data.strip():
        problems = [(name, "is empty")]
    elif not rows and not problems:
        problems = [(name, f"holds no rows; {expected}")]
    if problems:
        raise DataError(f"{name} cannot be used as {purpose}:\n{listing(grouped(problems, name))}")
    return values


def grouped(problems: Iterable[tuple[str, str]], name: str = "") -> list[str]:
    """Each fault once: with the first place that has it, and the number of the others."""
    places: dict[str, list[str]] = {}
    for where, fault in problems:
        places.setdefault(fault, []).append(where)
    lines = []
    for fault, wheres in places.items():
        more = f" and {len(wheres) - 1} more" if len(wheres) > 1 else ""
        apart = " " if wheres[0] == name and fault.startswith(("is ", "holds ")) else ": "
        lines.append(f"{wheres[0]}{more}{apart}{fault}" if wheres[0] else fault)
    return lines


def _located(source: str | Path) -> tuple[Path, str]:
    """Where a source's file is, and its name for messages."""
    try:
        path = Path(source).expanduser()
        folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot read {shown(str(source))}: {error}") from None
    if folder:
        raise DataError(f"{path} is a folder; name a file in it ({', '.join(READERS)})")
    if exists:
        return path, path.name
    repository, _, file = str(source).partition(":")
    reference = read_reference(repository)
    if reference is not None and "/" in reference.repository:
        try:
            path, file = dataset_file(reference, file, _HUB)
        except HubError as error:
            raise DataError(str(error)) from None
        return path, f"{reference}:{file}"
    raise DataError(
        f"{source} does not exist, and is not a Hub dataset (user/name, user/name:file or user/name@revision:file) either"
    )


def _unpacked(data: bytes) -> bytes:
    pieces: list[bytes] = []
    left = MAX_BYTES
    while data:  # a file may have several parts
        unpacker = zlib.decompressobj(wbits=31)
        pieces.append(unpacker.decompress(data, left + 1))
        left -= len(pieces[-1])
        if left < 0:
            raise OSError(f"it unpacks to more than {MAX_BYTES} bytes")
        if not unpacker.eof:
            raise OSError("it is cut off")
        data = unpacker.unused_data.lstrip(b"\0")
    return b"".join(pieces)
