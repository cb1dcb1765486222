"""``data``: contrast data made by the user's own model."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from steer2edit.cli.command import command
from steer2edit.cli.engine_flags import EngineFlags
from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.making import Making
from steer2edit.cli.making_flags import AnswerFlags, AuthorFlags, PromptFlags, WayFlags
from steer2edit.cli.options import JsonFlags, ModelFlags
from steer2edit.cli.output import columns, print_result
from steer2edit.errors import count_of
from steer2edit.options import option

if TYPE_CHECKING:
    from steer2edit.pairs.make import Made


MANY = 1000
"""More rows than this are not advised."""


@dataclass(frozen=True)
class FolderFlags(FlagGroup):
    """Where the data goes."""

    heading: ClassVar[str] = "Output"

    out: Path = option(..., "Folder of the data; a run that was interrupted goes on there.", "-o", "--out")
    force: bool = option(False, "Begin anew, with new answers, where the folder holds answers of other settings.")


@command(
    way=WayFlags,
    prompts=PromptFlags,
    answers=AnswerFlags,
    authors=AuthorFlags,
    engine=EngineFlags,
    model_flags=ModelFlags,
    output=FolderFlags,
    printed=JsonFlags,
)
@click.argument("model")
def data(
    model: str,
    way: WayFlags,
    prompts: PromptFlags,
    answers: AnswerFlags,
    authors: AuthorFlags,
    engine: EngineFlags,
    model_flags: ModelFlags,
    output: FolderFlags,
    printed: JsonFlags,
) -> None:
    """Make contrast data for a behaviour, from MODEL's own answers.

    The folder is what compile, eval and tune take as --data. Every answer is written down at once: started again, an
    interrupted run goes on. Exit code 1: the data does not hold the behaviour.
    """
    asked = Making(model, way, prompts, answers, authors, engine, model_flags)
    made = asked.run(output.out, output.force)
    print_result(result_of(made), printed.as_json, lambda _: render(made, model))
    if not made.verdict.sound:
        sys.exit(1)


def result_of(made: Made) -> dict[str, Any]:
    """The result as JSON: the receipt, and what it took."""
    took = {"answers": made.pace.answers, "tokens": made.pace.tokens, "seconds": round(made.pace.seconds, 1)}
    return {
        "folder": str(made.folder),
        "reused": made.reused,
        "written": {**took, "tokens_per_second": round(made.pace.tokens_per_second, 1)},
        **made.receipt,
    }


def render(made: Made, model: str) -> str:
    """What was made, in words."""
    from steer2edit.pairs.folder import FILES

    behavior, rows = made.receipt["behavior"], made.receipt["rows"]
    pace = made.pace
    lines = {
        "Behaviour": f"{behavior['name']}: {behavior['description']}",
        "Answers": str(made.answers) if made.answers is not None else "",
        "Rows": str(made.tally),
        "Lengths": f"positive {count_of(round(made.lengths.positive), 'token')}, negative {made.lengths.negative:.0f}"
        if made.lengths
        else "",
        "Differences": "; ".join(f"{one.metric} {one.found}" for one in made.differences),
        "Verdict": f"{made.verdict.word} ({'; '.join(made.verdict.reasons)})",
        "Written": "nothing new: every answer was there"
        if made.reused
        else f"{count_of(pace.answers, 'answer')}, {count_of(pace.tokens, 'token')}, {pace.tokens_per_second:.0f} tokens/s",
    }
    found = columns(lines)
    # a line of train is a row, one of the others a prompt
    kinds = {part: "row" if part == "train" else "prompt" for part in FILES}
    counts = [f"  {name}  {count_of(rows[part], kinds[part])}" for part, name in FILES.items()]
    found += ["", f"{made.folder}:", *counts]
    if not made.verdict.sound:
        return "\n".join([*found, "", *advice(made)])
    command = f"steer2edit compile {shlex.quote(model)} --data {shlex.quote(str(made.folder))} --to lora --out "
    return "\n".join([*found, "", "Next:", f"  {command}{shlex.quote(made.folder.name)}-lora"])


def advice(made: Made) -> list[str]:
    """What to do about data that does not hold its behaviour, by what is wrong with it."""
    from steer2edit.pairs.filters import CUT
    from steer2edit.pairs.samples import samples_of
    from steer2edit.pairs.separation import LEAST_PROMPTS
    from steer2edit.pairs.verdict import RELIABLE

    lines = ["The data does not hold the behaviour, and compile refuses it. What helps, with steer2edit data:"]
    needed = None if made.separation is None else made.separation.pairs_for(RELIABLE)
    if min(len(samples_of(made.rows, side)) for side in ("positive", "negative")) < LEAST_PROMPTS:
        lines.append("  --prompts, --max-prompts   more prompts, so that more rows are left")
    elif needed is not None and needed <= MANY and all(one.obeyed for one in made.differences):
        more = f"about {count_of(needed, 'row')} in train.jsonl, if what they have in common is not chance"
        lines.append(f"  --prompts, --max-prompts   more prompts: {more}")
    reasons = [*made.tally.reasons, *(made.answers.reasons if made.answers else ())]
    if CUT in reasons:
        lines.append("  --max-new-tokens           longer answers, fewer of which are cut off")
    if made.receipt["made"]["way"] == "sorted":
        lines.append("  --samples, --tails         more answers to each prompt, or more of them at each end")
        return [*lines, "  --answers-by MODEL|URL     another model, whose answers differ more"]
    return [
        *lines,
        "  --answers-by MODEL|URL     a stronger model, which obeys the instructions",
        "  --positive, --negative     other instructions; models of this size obey what is concrete",
        "  --by …                     the ends of the model's own answers, which need no obedience",
    ]
