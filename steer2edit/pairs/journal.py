"""The journal of a run: every answer is written down at once, so that a killed run goes on.

It is a file of lines. The first holds the settings that answers depend on, each other one a key and its value. What a kill left
half written at the end is dropped. A later line of the same key counts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from steer2edit.errors import DataError, Steer2EditError, count_of, shown
from steer2edit.files.untrusted import parse_json, read_bytes
from steer2edit.notices import notice

JOURNAL = "journal.jsonl"
FORMAT = "steer2edit.journal.2"
_OLDER = ("steer2edit.journal.1",)
_MAX_BYTES = 8 << 30
_SHOWN = 5
"""Of the settings that differ no more are named."""
_ASIDE = ("versions",)
"""What may be otherwise when a run goes on: it is recorded and not compared."""


OTHERWISE = "give another folder (compile: --data-out), or begin anew with steer2edit data --force"
"""What to do about a journal of other settings, for an error."""


def key_of(*parts: Any) -> str:
    """24 hex digits that stand for plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii")).hexdigest()[:24]


class Journal:
    """The values by key, in memory and in the file.

    ``settings`` are plain values that what is written depends on. With ``clear`` the journal begins anew: what another run left
    stays until there is a first value, and then ``clear`` removes it. Raises DataError where the file is of other settings, or
    not a journal; ``otherwise`` says what to do then.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        clear: Callable[[], None] | None = None,
        otherwise: str = OTHERWISE,
    ) -> None:
        self.path, self._otherwise = path, otherwise
        self._values: dict[str, Any] = {}
        self._head = {"format": FORMAT, "settings": _plain(settings)}
        self._clear = clear
        self._opened: IO[bytes] | None = None
        if clear is None:
            self.begin()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._opened is not None:
            self._opened.close()

    def begin(self) -> None:
        """Open the file, unless it is open. Only from here on is anything gone that another run left."""
        if self._opened is not None:
            return
        try:
            if self._clear is not None:
                self._clear()
            whole = self._read(self._head) if self.path.exists() else 0
            self._opened = open(self.path, "r+b" if self.path.exists() else "x+b")  # noqa: SIM115
            self._opened.truncate(whole)
            self._opened.seek(whole)
        except OSError as error:
            raise Steer2EditError(f"cannot write {self.path}: {error.strerror or error}") from None
        if not whole:
            self._line(self._head)
            self.sync()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def get(self, key: str) -> Any:
        """The value of a key, or None."""
        return self._values.get(key)

    def add(self, key: str, value: Any) -> None:
        """Write a value down; :meth:`sync` makes it safe."""
        self.begin()
        self._values[key] = value
        self._line({"key": key, "value": value})

    def sync(self) -> None:
        """Force what was written to the disk. Raises Steer2EditError where the disk is full."""
        file = self._file
        try:
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise Steer2EditError(f"cannot write {self.path}: {error.strerror or error}") from None

    @property
    def _file(self) -> IO[bytes]:
        self.begin()
        assert self._opened is not None
        return self._opened

    def _line(self, value: Any) -> None:
        file = self._file
        try:
            file.write(json.dumps(value, ensure_ascii=True).encode("ascii") + b"\n")
            file.flush()
        except OSError as error:
            raise Steer2EditError(f"cannot write {self.path}: {error.strerror or error}") from None

    def _read(self, head: Mapping[str, Any]) -> int:
        """Take up the values of a file, and say how many bytes of it are whole lines. Raises DataError."""
        data = read_bytes(self.path, _MAX_BYTES)
        lines = data.split(b"\n")
        if len(lines) == 1 and len(data) < 1 << 16 and not data.rstrip(b"\0"):
            return 0  # killed before the first line was there
        first = _parsed(lines[0]) if len(lines) > 1 else None
        if isinstance(first, dict) and first.get("format") in _OLDER:
            raise DataError(f"{self.path} is an older steer2edit's, which wrote it otherwise: {self._otherwise}")
        if not isinstance(first, dict) or first.get("format") != FORMAT or not isinstance(first.get("settings"), dict):
            if len(lines) == 1 and b'{"format": "steer2edit.journal'.startswith(data[:30]):
                return 0
            raise DataError(f"{self.path} is not a journal of steer2edit: {self._otherwise}")
        if other := differing(first["settings"], head["settings"]):
            lines_of = "; ".join(other[:_SHOWN])
            raise DataError(
                f"{self.path.parent} holds answers of other settings: {lines_of}. To go on, {self._otherwise}"
            )
        whole = len(lines[0]) + 1
        for line in lines[1:-1]:
            entry = _parsed(line)
            if not isinstance(entry, dict) or entry.keys() != {"key", "value"} or not isinstance(entry["key"], str):
                break
            self._values[entry["key"]] = entry["value"]
            whole += len(line) + 1
        if whole < len(data):
            lost = count_of(len(data) - whole, "byte")
            notice(f"the end of {self.path.name} is half written: {lost} dropped")
        return whole


def _set_to(value: Any) -> str:
    """A setting for people."""
    return "none" if value is None else shown(value)


def without_versions(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings in one level, without the versions of what is installed: what two runs are compared by."""
    return _flat(_plain(settings))


def _parsed(line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return None


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))


def differing(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Which plain settings are other ones now, each as a line; versions of what is installed are not compared.

    Several settings below one that the other side does not divide, such as a judge where there was none, are one line.
    """
    one, two = _flat(known), _flat(_plain(wanted))
    lines = {}
    for key in {**one, **two}:
        if one.get(key) == two.get(key):
            continue
        above = [key[:at] for at, letter in enumerate(key) if letter == "."]
        if (before := next((part for part in above if part in one), None)) is not None:
            lines[before] = f"{before} was {_set_to(one[before])} and is set"
        elif (after := next((part for part in above if part in two), None)) is not None:
            lines[after] = f"{after} was set and is {_set_to(two[after])}"
        else:
            lines[key] = f"{key} was {_set_to(one.get(key))} and is {_set_to(two.get(key))}"
    return list(lines.values())


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if key in _ASIDE:
            continue
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
