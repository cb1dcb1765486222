"""Flags from declarations: a frozen dataclass of options becomes click options, and their values become the dataclass.

A command's function gets one typed value for each group of flags. Each group has a heading in the help.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args

import click

from steer2edit.options import Option, options_of, read_layers

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # not generic in click 8.1


class Number(click.FloatRange):
    """A finite number within bounds. NaN is within all that click knows, since no comparison with it holds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


PATH = click.Path(path_type=Path)
_KINDS: dict[Any, tuple[Any, str]] = {
    int: (click.INT, "N"),
    float: (Number(), "NUMBER"),
    str: (click.STRING, "TEXT"),
    Path: (PATH, "PATH"),
}


class Layers(_ParamType):
    """A first and a last layer, such as 4-20, or one of the ``words``."""

    name = "layers"

    def __init__(self, *words: str) -> None:
        self.words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str) or value in self.words:
            return value
        try:
            return read_layers(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Flag(click.Option):
    """A click option that knows its heading in the help, and whether it is rarely needed."""

    def __init__(self, *names: Any, heading: str = "Options", rare: bool = False, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.heading, self.rare = heading, rare

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The names with their metavar, and the help, which already says the default."""
        if self.hidden:
            return None
        names = ", ".join(self.opts)
        return names if self.is_flag else f"{names} {self.metavar}", self.help or ""


Group = TypeVar("Group", bound="FlagGroup")


@dataclass(frozen=True)
class FlagGroup:
    """Base of the groups of flags: its fields made by ``steer2edit.options.option`` are flags."""

    heading: ClassVar[str] = "Options"
    first: ClassVar[tuple[str, ...]] = ()
    """Fields whose flags come first in the help, whatever class of the group declares them."""

    @classmethod
    def params(cls) -> list[Flag]:
        """The flags, in the order of the fields but for those of ``first``."""
        order = {name: place for place, name in enumerate(cls.first)}
        ordered = sorted(options_of(cls), key=lambda one: order.get(one.name, len(order)))
        return [flag(one, cls.heading) for one in ordered]

    @classmethod
    def listed(cls) -> dict[str, list[tuple[str, str]]]:
        """Further sections of the help, such as a list of what a flag may name."""
        return {}

    @classmethod
    def take(cls: type[Group], values: dict[str, Any]) -> Group:
        """The group with its values, which are taken out of ``values``."""
        return cls(**{one.name: values.pop(one.name) for one in options_of(cls)})


def flag(one: Option, heading: str, *, name: str | None = None, default: Any = ..., help: str | None = None) -> Flag:
    """The click option of one declaration; with ``name``, ``default`` or ``help`` in place of its own."""
    default = one.default if default is ... else default
    kind, metavar = _kind(one)
    said = one.help if help is None else help
    if help is None:
        said += shown_default(one)
    settings: dict[str, Any] = {"help": said, "metavar": metavar, "required": one.required, "default": default}
    if one.kind is bool:
        settings = {"help": said, "type": bool, "is_flag": True, "flag_value": one.value, "default": default}
    elif one.repeated:
        settings |= {"type": kind, "multiple": True}
    else:
        settings |= {"type": kind}
    return Flag([*one.flags, name or one.name], heading=heading, rare=one.rare, hidden=one.hidden, **settings)


def shown_default(one: Option) -> str:
    """The end of a help line: the default, or that the option is required."""
    if one.required:
        return "  [required]"
    if one.shown_default is not None:
        return f"  [default: {one.shown_default}]"
    values = one.default if isinstance(one.default, Sequence) and not isinstance(one.default, str) else [one.default]
    told = [f"{value:g}" if isinstance(value, float) else str(value) for value in values if value not in (None, "")]
    return f"  [default: {', '.join(told)}]" if told and one.kind is not bool else ""


def _kind(one: Option) -> tuple[Any, str]:
    """The click type, and the metavar."""
    kind = get_args(one.kind)[0] if one.repeated else one.kind
    if one.choices:
        return click.Choice(one.choices), f"[{'|'.join(one.choices)}]"
    if kind == tuple[int, int]:
        return Layers(), one.metavar or "FIRST-LAST"
    found, metavar = _KINDS.get(kind, (click.STRING, "TEXT"))
    if one.minimum is not None or one.maximum is not None:
        bounded = click.IntRange if kind is int else Number
        found = bounded(one.minimum, one.maximum)  # type: ignore[arg-type]
    return found, one.metavar or metavar
