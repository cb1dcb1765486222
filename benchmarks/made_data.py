"""The same behaviour from several sources of pairs: what each gives and costs at one KL in chat.

    steer2edit data MODEL --positive "…" --negative "…" -o brief
    python benchmarks/made_data.py MODEL --behavior concise --data made=brief --out runs/concise

Each source (the behaviour's own pairs and every --data) is compiled by the default method and steered with, at --kl. The
attribute is measured on the reporting half of the behaviour's packaged questions, right answers on general questions. The
instruction stands beside them. A prompt of a source that is a question is refused. Cells are kept in --out: the same command
goes on after a kill. The table has each row's paired difference from the base with its 95 % interval.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from one_kl import add_flags, difference, in_words, opened
from power_cells import UNSCALED, Bench, Journal, ask
from tabulate import tabulate

from steer2edit.capture.run import capture_statistics
from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import behavior_files, builtin_questions
from steer2edit.data.prompts import prompt_digest
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.meet import Apply

OWN = "packaged"


@dataclass(frozen=True)
class Sources(Bench):
    """A bench whose methods are named "METHOD, SOURCE"; ``scorings`` are by source."""

    scorings: Mapping[str, Scoring] = field(default_factory=dict)

    @contextmanager
    def opened(self, method: str) -> Iterator[tuple[Apply, str]]:
        """What applies a method of a source at a strength, and the instruction that goes with it."""
        kind, _, source = method.partition(", ")
        values = {name: getattr(self, name) for name in Bench.__dataclass_fields__}
        with Bench(**{**values, "scoring": self.scorings[source or OWN]}).opened(kind) as found:
            yield found


def table(journal: Journal, behavior: str) -> str:
    """Paired differences from the base, and of each source's edit from the packaged pairs' edit."""
    cells = {method: cell for (name, method, _), cell in journal.cells.items() if name == behavior}
    base = cells["base"]
    rows = [["base (means)", "", *(f"{sum(v) / len(v):.3g}" for v in base.values.values())]]
    for method, cell in cells.items():
        if method == "base":
            continue
        if cell.failed:
            rows.append([method, cell.failed])
            continue
        changes = [in_words(difference(cell, base, metric)) for metric in base.values]
        kl = "" if not cell.kl else f"{next(iter(cell.kl.values())):.3f}"
        rows.append([method, kl, *changes])
    for method, cell in cells.items():
        kind, _, source = method.partition(", ")
        other = cells.get(f"{kind}, {OWN}")
        if source not in ("", OWN) and other is not None and not cell.failed and not other.failed:
            shown = [in_words(difference(cell, other, metric)) for metric in base.values]
            rows.append([f"{kind}: {source} minus {OWN}", "", *shown])
    shown_table: str = tabulate(rows, ["", "KL", *base.values], tablefmt="github", disable_numparse=True)
    return shown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, questions=64, knowledge=64, tokens=96, kl_rows=24)
    parser.add_argument("--behavior", choices=behavior_files(), default="concise")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FOLDER[@SPAN]", help="repeatable")
    parser.add_argument("--method", action="append", choices=("edit", "steering", "component"))
    given = parser.parse_args()
    at = opened(given, written=0, answer_tokens=40)
    asked = ask(builtin_questions(given.behavior) or [], at.settings.seeds, at.settings.questions)
    behaviors = {OWN: Behavior.named(given.behavior)}
    for text in given.data:
        name, _, place = text.partition("=")
        folder, _, span = place.partition("@")
        behaviors[name] = Behavior.from_data(folder, span=span or "matched")
    seen = {prompt_digest(question.prompt) for question in asked.questions}
    for name, behavior in behaviors.items():
        if seen & {prompt_digest(example.prompt) for example in behavior.examples}:
            sys.exit(f"{name} has prompts of {given.behavior}'s questions: no number may rest on them")
    scorings = {
        name: Scoring(at.checkpoint, at.loaded.spec, capture_statistics(at.loaded, at.checkpoint, behavior))
        for name, behavior in behaviors.items()
    }
    bench = Sources(
        at.loaded, scorings[OWN], behaviors[OWN], at.costs, asked, at.general, at.settings, given.out, scorings=scorings
    )
    methods = [f"{method}, {name}" for method in given.method or ("edit", "steering") for name in scorings]
    at.measure(bench, (*UNSCALED, *methods))
    print(
        f"\n{given.behavior}, at a KL of {given.kl:g} on {at.costs.budget.kind}\n\n{table(at.journal, given.behavior)}"
    )


if __name__ == "__main__":
    main()
