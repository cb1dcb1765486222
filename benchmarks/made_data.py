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
from pathlib import Path

import torch
from methods_at_kl import difference
from power import say
from power_cells import UNSCALED, Bench, Journal, Settings, ask, general_questions
from tabulate import tabulate

from steer2edit.architecture import read_spec
from steer2edit.bootstrap import estimate
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import behavior_files, builtin_questions
from steer2edit.data.prompts import prompt_digest
from steer2edit.runtime.model import Runtime, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.meet import Apply
from steer2edit.strength.neutral_texts import neutral_texts

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
        changes = [difference(cell, base, metric) for metric in base.values]
        kl = "" if not cell.kl else f"{next(iter(cell.kl.values())):.3f}"
        rows.append([method, kl, *(f"{one.value:+.3g} [{one.low:+.3g}, {one.high:+.3g}]" for one in changes)])
    for method, cell in cells.items():
        kind, _, source = method.partition(", ")
        other = cells.get(f"{kind}, {OWN}")
        if source not in ("", OWN) and other is not None and not cell.failed and not other.failed:
            pairs = [
                estimate([a - b for a, b in zip(cell.values[key], other.values[key], strict=True)])
                for key in base.values
            ]
            shown = [f"{one.value:+.3g} [{one.low:+.3g}, {one.high:+.3g}]" for one in pairs]
            rows.append([f"{kind}: {source} minus {OWN}", "", *shown])
    shown_table: str = tabulate(rows, ["", "KL", *base.values], tablefmt="github", disable_numparse=True)
    return shown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--behavior", choices=behavior_files(), default="concise")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FOLDER[@SPAN]", help="repeatable")
    parser.add_argument("--method", action="append", choices=("edit", "steering", "component"))
    parser.add_argument("--kl", type=float, default=0.1, help="nats per token (default %(default)s)")
    parser.add_argument("--questions", type=int, default=64, help="for the attribute (default %(default)s)")
    parser.add_argument("--knowledge", type=int, default=64, help="general questions answered (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer (default %(default)s)")
    parser.add_argument("--kl-rows", type=int, default=24, help="answers behind a KL (default %(default)s)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, help="torch's threads")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    checkpoint = open_checkpoint(given.model)
    spec = read_spec(checkpoint)
    loaded = load_model(checkpoint, spec, Runtime(dtype=given.dtype))
    settings = Settings(
        checkpoint.fingerprint, given.dtype, (given.kl,), (0,), given.questions, 0, given.knowledge, 40, given.tokens,
        given.kl_rows, 0.0,
    )  # fmt: skip
    journal = Journal(given.out, settings)
    asked = ask(builtin_questions(given.behavior) or [], settings.seeds, settings.questions)
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
        name: Scoring(checkpoint, spec, capture_statistics(loaded, checkpoint, b)) for name, b in behaviors.items()
    }
    costs, general = neutral_texts(loaded, limit=given.kl_rows), general_questions(given.knowledge)
    bench = Sources(
        loaded, scorings[OWN], behaviors[OWN], costs, asked, general, settings, given.out, scorings=scorings
    )
    methods = [f"{method}, {name}" for method in given.method or ("edit", "steering") for name in scorings]
    for method in (*UNSCALED, *methods):
        for cell in bench.cells(method, journal):
            journal.add(cell)
            say(cell, costs.budget.kind)
    print(f"\n{given.behavior}, at a KL of {given.kl:g} on {costs.budget.kind}\n\n{table(journal, given.behavior)}")


if __name__ == "__main__":
    main()
