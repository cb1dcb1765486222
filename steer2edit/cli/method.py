"""``--method`` and the options of all methods, derived from their ``Options``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import click

from steer2edit import methods
from steer2edit.cli.flags import Flag, FlagGroup, Layers, flag, shown_default
from steer2edit.errors import Steer2EditError
from steer2edit.options import DISCRIMINATIVE, Option, options_of


@dataclass(frozen=True)
class MethodFlags(FlagGroup):
    """A method and its options; the flags are those of all methods' ``Options``."""

    heading: ClassVar[str] = "Method"

    method: str
    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def params(cls) -> list[Flag]:
        """``--method``, then the options of all methods; an option that several methods have is one flag."""
        help = "Way of making the edit, one of the methods below."
        named = Option("method", str, methods.METHOD, help, ("--method",), metavar="METHOD")
        found = [flag(named, cls.heading)]
        for flags, owners in _declared().items():
            kinds = {one.kind for one in owners.values()}
            if len(kinds) > 1:
                raise Steer2EditError(f"the methods {' and '.join(owners)} declare {flags[-1]} with different types")
            one = next(iter(owners.values()))
            made = flag(one, cls.heading, name=f"method_{one.name}", default=None, help=_shared_help(owners))
            if one.name == "layers":
                made.type, made.metavar = Layers(DISCRIMINATIVE), f"FIRST-LAST|{DISCRIMINATIVE}"
            found.append(made)
        return found

    @classmethod
    def listed(cls) -> dict[str, list[tuple[str, str]]]:
        """The methods, each with the first line of its docstring."""
        return {"Methods": [(name, first_sentence(methods.load(name).__doc__)) for name in methods.names()]}

    @classmethod
    def take(cls, values: dict[str, Any]) -> MethodFlags:
        """The method, and those of its options that were given."""
        method = values.pop("method")
        names = {param.name: None for param in cls.params()}
        given = {str(name): values.pop(name) for name in names if name in values}
        return cls(
            method, {name.removeprefix("method_"): value for name, value in given.items() if value not in (None, ())}
        )

    def options(self) -> Any:
        """The method's own Options. Raises UsageError for options of other methods."""
        kind = methods.load(self.method).Options
        known = {one.name: one for one in options_of(kind)}
        strange = [flags[-1] for flags, owners in _declared().items() for one in owners.values()
                   if one.name in self.values and one.name not in known]  # fmt: skip
        if strange:
            raise click.UsageError(f"the method {self.method} has no option {', '.join(dict.fromkeys(strange))}")
        return kind(**self.values)


def first_sentence(text: str | None) -> str:
    """The first line of a docstring."""
    return next((line.strip() for line in (text or "").splitlines() if line.strip()), "")


def _declared() -> dict[tuple[str, ...], dict[str, Option]]:
    """By flag: the methods that have it, with their declarations; the default method's first."""
    found: dict[tuple[str, ...], dict[str, Option]] = {}
    for name in sorted(methods.names(), key=lambda name: (name != methods.METHOD, name)):
        for one in options_of(methods.load(name).Options):
            found.setdefault(one.flags, {})[name] = one
    return found


def _shared_help(owners: Mapping[str, Option]) -> str:
    """One help line for an option: whose it is, and what it does there."""
    lines: dict[str, list[str]] = {}
    for name, one in owners.items():
        lines.setdefault(one.help + shown_default(one), []).append(name)
    return " ".join(f"({', '.join(names)}) {text}" for text, names in lines.items())
