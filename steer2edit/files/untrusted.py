"""Reading files that strangers wrote: regular files only, bounded in size, and JSON bounded in what it becomes.

Nothing here knows what a file means. Faults are OSError and ValueError, which the callers put in their own words.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

JSON_BYTES = 64 << 20
# a comma or bracket of JSON becomes up to 200 bytes of Python objects
_JSON_PIECES = 8_000_000
_JSON_SPACE = re.compile(r"[ \t\r\n]*")


def local(name: str | Path) -> Path | None:
    """The file or folder that a text names, with ``~`` for the home folder.

    None where there is none of that name.
    """
    try:
        path = Path(name).expanduser()
        return path if str(name) and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown user's home
        return None


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError for whatever is none: opening a pipe may wait for ever."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return open(descriptor, "rb", buffering=0)


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file's bytes. Raises OSError where there are more than ``limit``."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size} bytes, and at most {limit} are read")
        return file.read()


def parse_json(raw: bytes, *, unique: bool = False) -> Any:
    """A JSON value. Raises ValueError for what is not UTF-8, nests too deeply or holds too many values; with ``unique``
    also where an object has a key twice, and for half of a surrogate pair.
    """
    if sum(map(raw.count, (b",", b"[", b"{"))) > _JSON_PIECES:
        raise ValueError(f"it holds more than {_JSON_PIECES} values")
    text = raw.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates) if unique else json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if unique and b"\\ud" in raw.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair, which is not a character") from None
    return value


def parse_json_values(raw: bytes) -> list[Any]:
    """JSON values that stand one after another, with white space between them. Raises ValueError like :func:`parse_json`."""
    if sum(map(raw.count, (b",", b"[", b"{"))) > _JSON_PIECES:
        raise ValueError(f"it holds more than {_JSON_PIECES} values")
    text, at, values = raw.decode("utf-8"), 0, []
    decoder = json.JSONDecoder()
    try:
        while rest := _JSON_SPACE.match(text, at):
            if (at := rest.end()) == len(text):
                break
            value, at = decoder.raw_decode(text, at)
            values.append(value)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    return values


def special_files(folder: Path) -> list[str]:
    """Names in a folder that are neither files nor folders, such as pipes and devices; whoever opens one may hang."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                mode = entry.stat().st_mode
            except OSError:
                continue  # a link to nothing is said where it is needed
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                found.append(entry.name)
    return sorted(found)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice")
    return entries
