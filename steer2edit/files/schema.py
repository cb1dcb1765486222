"""What the JSON in this project's own files must hold, checked before anything relies on it.

A kind is a type (``float`` stands for any number, ``int`` leaves out booleans), a tuple of kinds (any of them), a list of
one kind (a list of such values), a dict (an object with these keys: those that end in ``?`` may be missing, ``str`` as a key
gives the kind of all others), or a function that gives a kind, for what holds itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steer2edit.errors import listing, shown

NUMBER: Any = float
TEXT: Any = (str, None)
MAYBE: Any = (float, None)

_NAMES = {
    str: "a text",
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
_DEEPEST = 40
_LARGEST = 1 << 63


def check(value: Any, kind: Any, what: str) -> None:
    """Raise ValueError, listing every value in ``what`` that is not of its kind."""
    if problems := faults(value, kind, what):
        raise ValueError(f"{what} is not what it should be:\n{listing(problems)}")


def faults(value: Any, kind: Any, where: str = "", depth: int = 0) -> list[str]:
    """What is wrong with a value, each with its place."""
    if depth > _DEEPEST:
        return [f"{where} nests too deeply"]
    if callable(kind) and not isinstance(kind, type):
        kind = kind()
    if isinstance(kind, tuple):
        found = [faults(value, one, where, depth + 1) for one in kind]
        return [] if not all(found) else [f"{where} is {shown(value)}, expected {' or '.join(map(_named, kind))}"]
    if isinstance(kind, list) and isinstance(value, list):
        return [fault for i, one in enumerate(value) for fault in faults(one, kind[0], f"{where}[{i}]", depth + 1)]
    if isinstance(kind, Mapping) and isinstance(value, dict):
        return _object_faults(value, kind, where, depth)
    if kind is None or isinstance(kind, type):
        plain = float if kind is float and type(value) is int else type(value)
        sound = value is None if kind is None else plain is kind
        if sound and type(value) is int:
            sound = abs(value) < _LARGEST
        return [] if sound else [f"{where} is {shown(value)}, expected {_named(kind)}"]
    return [f"{where} is {shown(value)}, expected {_named(kind)}"]


def _object_faults(value: dict[str, Any], kind: Mapping[Any, Any], where: str, depth: int) -> list[str]:
    found = []
    named = {key.removesuffix("?"): inner for key, inner in kind.items() if key is not str}
    for key in kind:
        if key is not str and not key.endswith("?") and key not in value:
            found.append(f"{where}.{key} is missing")
    for key, inner in value.items():
        wanted = named.get(key, kind.get(str))
        if wanted is not None:
            found += faults(inner, wanted, f"{where}.{key}", depth + 1)
    return found


def _named(kind: Any) -> str:
    if callable(kind) and not isinstance(kind, type):
        kind = kind()
    if kind is None:
        return "null"
    if isinstance(kind, type):
        return _NAMES[kind]
    return "a list" if isinstance(kind, list) else "an object"
