"""Options declared once: a dataclass field that carries its flag, its help and the range that a search tries.

The command line, ``tune`` and the tables of the documents are derived from these fields. This module imports nothing heavy, so
that ``--help`` stays fast.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_KEY = "option"
DISCRIMINATIVE = "discriminative"
"""In place of a range of layers: those that ``scoring.discriminative`` finds."""


@dataclass(frozen=True)
class Between:
    """A search tries numbers from ``low`` to ``high``, with ``log`` evenly on a logarithmic scale."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class AnyLayer:
    """A search tries the numbers of the model's layers."""


@dataclass(frozen=True)
class AnyChoice:
    """A search tries every value that the option's type allows."""


SearchRange = Between | AnyLayer | AnyChoice


@dataclass(frozen=True)
class Option:
    """One option: ``name`` is the field's, ``kind`` its type without None.

    ``flags`` are what is typed on the command line. ``value`` is what the flag of a bool stands for. ``minimum`` and
    ``maximum`` bound numbers. ``rare`` options are listed last in the help, ``hidden`` ones not at all.
    """

    name: str
    kind: Any
    default: Any
    help: str
    flags: tuple[str, ...]
    value: bool = True
    minimum: float | None = None
    maximum: float | None = None
    metavar: str | None = None
    shown_default: str | None = None
    rare: bool = False
    hidden: bool = False
    required: bool = False
    search: SearchRange | None = None

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal; none for other types."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def repeated(self) -> bool:
        """Whether the flag may be given several times: its type is ``tuple[X, ...]``."""
        return get_origin(self.kind) is tuple and get_args(self.kind)[-1] is Ellipsis


def option(
    default: Any,
    help: str = "",
    *flags: str,
    value: bool = True,
    minimum: float | None = None,
    maximum: float | None = None,
    metavar: str | None = None,
    shown_default: str | None = None,
    rare: bool = False,
    hidden: bool = False,
    search: SearchRange | None = None,
) -> Any:
    """A dataclass field that is an option. Without ``flags`` the flag is the field's name; see :class:`Option`.

    An option whose default is ``...`` is required.
    """
    declared = {
        **{"help": help, "flags": flags, "value": value, "minimum": minimum, "maximum": maximum, "metavar": metavar},
        **{"shown_default": shown_default, "rare": rare, "hidden": hidden, "search": search},
    }
    return field(default=MISSING if default is ... else default, kw_only=True, metadata={_KEY: declared})


def options_of(kind: Any) -> tuple[Option, ...]:
    """The options of a dataclass, in order; its fields that were not made by :func:`option` are none."""
    hints = get_type_hints(kind)
    found = []
    for one in fields(kind):
        if _KEY in one.metadata:
            declared: Mapping[str, Any] = one.metadata[_KEY]
            flags = declared["flags"] or (f"--{one.name.replace('_', '-')}",)
            required = one.default is MISSING
            default = None if required else one.default
            rest = {**declared, "flags": flags, "required": required}
            found.append(Option(name=one.name, kind=_without_none(hints[one.name]), default=default, **rest))
    return tuple(found)


def read_layers(text: str) -> tuple[int, int]:
    """The first and last layer from a text such as ``4-20`` or ``7``. Raises ValueError for any other text."""
    first, dash, last = text.partition("-")
    if (
        not (first.isascii() and first.isdigit())
        or (dash and not (last.isascii() and last.isdigit()))
        or len(text) > 20
    ):
        raise ValueError(f"{text!r} is not a range of layers; expected one such as 4-20 or 7")
    return int(first), int(last if dash else first)


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        rest = [one for one in get_args(hint) if one is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return hint
