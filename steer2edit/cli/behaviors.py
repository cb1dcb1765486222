"""``behaviors``: what there is to compile, and what was measured of it."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import click

from steer2edit.cli.command import command
from steer2edit.cli.options import JsonFlags
from steer2edit.cli.output import print_result
from steer2edit.errors import count_of

if TYPE_CHECKING:
    from steer2edit.data.behavior_file import BehaviorFile

_SHOWN_PAIRS = 3
_WIDTH = 110


@command(printed=JsonFlags)
@click.argument("name", required=False, metavar="[NAME|FILE]")
def behaviors(name: str | None, printed: JsonFlags) -> None:
    """List the behaviours that --behavior takes: what each is, its metric, its data, and what was measured.

    With a NAME or a TOML FILE, show that one whole, with three pairs.
    """
    from steer2edit.data.behavior_file import behavior_files, open_behavior

    if name is not None:
        file = open_behavior(name)
        print_result(_whole(file), printed.as_json, lambda _: _render_whole(file))
        return
    files = [open_behavior(one) for one in behavior_files()]
    result = {"behaviors": [_described(file) for file in files]}
    print_result(result, printed.as_json, lambda _: _render_list(files))


def _described(file: BehaviorFile) -> dict[str, Any]:
    """A behaviour in plain values, without its texts."""
    return {
        "name": file.name,
        "description": file.description,
        "metric": file.metric.described(),
        "pairs": _pairs(file),
        "questions": len(file.read_questions()),
        "measured": [
            {
                **vars(one),
                "metrics": [{**vars(metric), "worse": metric.worse} for metric in one.metrics],
                "outdated": file.outdated(one),
            }
            for one in file.measured
        ],
    }


def _whole(file: BehaviorFile) -> dict[str, Any]:
    """A behaviour in plain values, with instructions, rubric and the first pairs."""
    return {
        **_described(file),
        "file": str(file.path),
        "positive": file.positive,
        "negative": file.negative,
        "rubric": file.rubric,
        "prompts": file.prompts if isinstance(file.prompts, (str, tuple)) else str(file.prompts),
        "first_pairs": _first_pairs(file),
    }


def _pairs(file: BehaviorFile) -> int:
    return len({example.row for example in file.read_pairs()}) if file.pairs is not None else 0


def _first_pairs(file: BehaviorFile) -> list[dict[str, str]]:
    rows: dict[int, dict[str, str]] = {}
    for example in file.read_pairs() if file.pairs is not None else ():
        prompt = example.prompt if isinstance(example.prompt, str) else example.prompt[-1].content
        rows.setdefault(example.row, {"prompt": prompt})[example.label] = example.response
    return list(rows.values())[:_SHOWN_PAIRS]


def _metric_text(file: BehaviorFile) -> str:
    metric, unit = file.metric, f" ({file.metric.kind.unit})" if file.metric.kind.unit else ""
    return f"{metric.title or metric.name}{unit}, {metric.goal} is better: {metric.kind.description}"


def _data_text(file: BehaviorFile) -> str:
    pairs, asked = _pairs(file), count_of(len(file.read_questions()), "held-out question")
    if not pairs:
        return f"no pairs yet (steer2edit data makes them); {asked}"
    return f"{count_of(pairs, 'pair')}, {asked}"


def _measured_texts(file: BehaviorFile) -> list[str]:
    reasons = ((one, file.outdated(one)) for one in file.measured)
    return [str(one) if why is None else f"{why}. {one}" for one, why in reasons] or ["nothing yet"]


def _render_list(files: list[BehaviorFile]) -> str:
    lines = []
    for file in files:
        facts = {"": file.description, "Metric": _metric_text(file), "Data": _data_text(file)}
        lines += [file.name]
        lines += [line for key, text in facts.items() for line in _wrapped(key, text)]
        lines += [line for text in _measured_texts(file) for line in _wrapped("Measured", text)]
        lines += [""]
    if any(file.measured for file in files):
        lines += [
            "Numbers: before → after (change [95 % interval], paired by question), with the options that are the defaults.",
            "",
        ]
    lines += [
        "Next:",
        "  steer2edit behaviors NAME",
        "  steer2edit compile MODEL --behavior NAME --to lora --out DIR",
    ]
    return "\n".join(lines)


def _render_whole(file: BehaviorFile) -> str:
    facts = {
        "Behaviour": file.name,
        "": file.description,
        "Positive": file.positive,
        "Negative": file.negative,
        "Rubric": file.rubric or "none",
        "Metric": _metric_text(file),
        **({"Pattern": file.metric.pattern} if file.metric.pattern else {}),
        "Data": _data_text(file),
        "File": str(file.path),
    }
    lines = [line for key, text in facts.items() for line in _wrapped(key, text)]
    lines += [line for text in _measured_texts(file) for line in _wrapped("Measured", text)]
    lines += [line for one in file.measured for line in _wrapped("Command", one.command)]
    for number, pair in enumerate(_first_pairs(file), start=1):
        lines += ["", f"Pair {number}"]
        lines += [line for key, text in pair.items() for line in _wrapped(key.capitalize(), text)]
    return "\n".join(lines)


def _wrapped(key: str, text: str) -> list[str]:
    """A text under its key, in lines of the terminal's usual width."""
    lines = textwrap.wrap(text, _WIDTH - 13, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"  {key if number == 0 else '':<9}  {line}" for number, line in enumerate(lines)]
