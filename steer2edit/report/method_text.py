"""How a plan was made, as text: the method's options, a training, held-out errors, single experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from steer2edit import methods
from steer2edit.errors import count_of
from steer2edit.formatting import number, pairs
from steer2edit.options import options_of

_NOT_OPTIONS = (
    *("name", "plans", "experts", "layers", "grade", "experts_left_alone", "ranks", "left_out", "silenced"),
    "discriminative_layers",
)


def method_line(method: Mapping[str, Any]) -> str:
    """The method with the options that are not its defaults, as they are typed on the command line."""
    name = str(method.get("name", "unknown"))
    if parts := method.get("plans"):
        weighed = " + ".join(f"{part['weight']:g} × {part.get('name') or part['plan'][:12]}" for part in parts)
        return f"composition: {weighed}"
    if name not in methods.names():
        rest = {key: value for key, value in method.items() if key not in _NOT_OPTIONS}
        return name + (f": {method['grade']}" if "grade" in method else f" ({pairs(rest)})" if rest else "")
    kind = methods.load(name).Options
    defaults = {one.name: one.default for one in fields(kind)}
    told = []
    for one in options_of(kind):
        value = method.get(one.name)
        if one.name == "layers" or value is None or value == defaults[one.name]:
            continue
        if one.repeated:
            told += [f"{one.flags[-1]} {item}" for item in value]
        elif one.kind is bool:
            told += [one.flags[-1]] if value == one.value else []
        else:
            told.append(f"{one.flags[-1]} {number(value) if isinstance(value, float) else value}")
    line = f"{name} with {' '.join(told)}" if told else f"{name} with its default options"
    if alone := method.get("experts_left_alone"):
        line += f"; {count_of(alone, 'expert')} left alone, because too few tokens were routed to them"
    if errors := method.get("stand_ins"):
        shares = ", ".join(f"{key} {number(error)}" for key, error in errors.items())
        line += f"; an edit of rank 1 stands in for the constant, with a relative squared error of about: {shares}"
    return line


def training_line(method: Mapping[str, Any]) -> str:
    """How long a trained plan was trained, on what, and how far its loss fell; "" for all others."""
    if not isinstance(training := method.get("training"), Mapping):
        return ""
    before, after = training["loss"]
    told = f"; {len(untouched)} outputs are left as they were" if (untouched := method.get("left_as_it_was")) else ""
    return (
        f"{training['parameters']:,} numbers in {count_of(training['steps'], 'step')} on "
        f"{count_of(training['prompts'], 'prompt')}; the classes' distance there is {number(before)} before, "
        f"{number(after)} after{told}"
    )


def held_out_line(method: Mapping[str, Any]) -> str:
    """What maps of outputs leave of the classes' distance on held-out prompts; "" for other methods."""
    if why := method.get("why_no_held_out"):
        return f"the maps' error was not measured: {why}"
    if not isinstance(held_out := method.get("held_out"), Mapping):
        return ""
    before, after = held_out["loss"]
    errors = method.get("held_out_errors", {})
    gain = f"; of a gain alone, the relative squared error is {_range(errors.values())}" if errors else ""
    worse = "" if after < before else " (no nearer)"
    return (
        f"the classes' distance on {held_out['prompts']} prompts without a part in the fit is {number(before)} before, "
        f"{number(after)} after at strength 1{worse}{gain}"
    )


def _range(values: Iterable[float]) -> str:
    ordered = sorted(values)
    return f"{number(ordered[0])} to {number(ordered[-1])}"


def expert_lines(method: Mapping[str, Any], limit: int = 20) -> list[str]:
    """What a plan does with single experts, one line each; nothing for plans that mask none."""
    marks = method.get("experts", ())
    lines = []
    for one in marks[:limit]:
        told = f"{one['layer']}:{one['expert']} {one['wish']} by {one['how']}, {one['grade']}"
        if "selected" in one:
            told += f": {one['selected']:.3%} of {one['tokens']} held-out tokens still choose it"
        lines.append(told)
    return [*lines, *([f"… and {len(marks) - limit} more"] if len(marks) > limit else [])]
