"""What every method that is compiled gives and costs at one KL in chat: attribute, perplexity, right answers, repetition.

    python benchmarks/methods_at_kl.py MODEL --behavior concise --behavior formal --out methods/SmolLM2

Methods are brought to --kl on the model's own answers: rotation by its angle,
silence by the number of heads that write against the behaviour, the others by their strength. ``lineas`` is transport with
trained maps. What cannot be brought there is named. Questions are those of the reporting half; the table has each method's paired
difference from the base with its 95 % interval, losses first. Cells are kept in --out: the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from one_kl import add_flags, difference, in_words, opened
from power_cells import Bench, Journal, ask
from tabulate import tabulate

from steer2edit.bootstrap import Estimate
from steer2edit.capture.affine_maps import contrast_runs
from steer2edit.capture.run import capture_statistics
from steer2edit.data import contrast
from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import behavior_files, builtin_questions
from steer2edit.data.degeneration import repetition
from steer2edit.data.tokens import Encoded, windows
from steer2edit.evaluation.likelihood import response_log_probabilities
from steer2edit.methods import make_plan, names
from steer2edit.methods.rotation import Options as Rotation
from steer2edit.methods.silence import Options as Silence
from steer2edit.methods.transport import Options as Transport
from steer2edit.runtime.hooks import edited
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.meet import Apply

BETTER: Mapping[str, int] = {"margin": 1, "length": -1, "right": 1, "nats": -1, "repetition": -1}
"""Metrics, and whether more of them is better (1) or less (-1)."""
PROSE_TOKENS = 4096
LINEAS = "lineas"
ANGLE, HEADS = 20.0, 8
"""Degrees, and heads, of a strength of 1."""


def _silence(strength: float) -> Silence:
    return Silence(strongest=max(1, round(HEADS * strength)), side="against")


@dataclass(frozen=True)
class Methods(Bench):
    """A bench whose methods are those of the package, and which measures prose and repetition too."""

    fit_steps: int = Transport().fit_steps

    @contextmanager
    def opened(self, method: str) -> Iterator[tuple[Apply, str]]:
        """What applies a method at a strength; a rotation's is its angle, and silence's its number of heads."""
        if method == LINEAS:
            options = Transport(fit="lineas", fit_steps=self.fit_steps)
            yield partial(edited, self.loaded, make_plan(self.scoring, method="transport", options=options)), ""
        elif method not in names():
            # the bench calls activation steering by the name that the default method has here
            with super().opened("steering" if method == "activation" else method) as found:
                yield found
        elif method == "rotation":
            yield self._planned(method, lambda strength: Rotation(angle=ANGLE * strength)), ""
        elif method == "silence":
            yield self._planned(method, _silence), ""
        else:
            yield partial(edited, self.loaded, make_plan(self.scoring, method=method)), ""

    def _planned(self, method: str, options: Any) -> Apply:
        return lambda strength: edited(
            self.loaded, make_plan(self.scoring, method=method, options=options(strength)), 1.0
        )

    def values(self, method: str, text: str) -> dict[str, list[float]]:
        """The bench's metrics, nats per token of prose by window, and the repetition of written answers."""
        found = super().values(method, text)
        rows = windows(self.loaded.tokenizer, [contrast.neutral_text()], PROSE_TOKENS)
        prose = [Encoded(tuple(row), 1, "background", i) for i, row in enumerate(rows) if len(row) > 1]
        found["nats"] = [-float(one.mean()) for one in response_log_probabilities(self.loaded, prose)]
        questions = self.asked.questions[: self.settings.random_questions]
        answers, _ = self._written(questions, None, self.settings.length_tokens)
        tokens = [self.loaded.tokenizer(answer)["input_ids"] for answer in answers]
        found["repetition"] = [float(repetition(row)) for row in tokens]
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, questions=100, knowledge=48, tokens=48, kl_rows=16)
    parser.add_argument("--behavior", action="append", choices=behavior_files(), help="repeatable; default: concise")
    parser.add_argument("--method", action="append", choices=[*names(), LINEAS], help="repeatable; default: all")
    parser.add_argument("--fit-steps", type=int, default=Transport().fit_steps, help="of lineas (default %(default)s)")
    parser.add_argument("--written", type=int, default=24, help="answers that are written (default %(default)s)")
    given = parser.parse_args()
    at = opened(given, written=given.written, answer_tokens=given.tokens)
    loaded = at.loaded
    for name in given.behavior or ["concise"]:
        asked = ask(builtin_questions(name) or [], at.settings.seeds, at.settings.questions)
        behavior = Behavior.named(name)
        runs = contrast_runs(loaded, behavior)
        scoring = Scoring(at.checkpoint, loaded.spec, capture_statistics(loaded, at.checkpoint, behavior), runs)
        bench = Methods(loaded, scoring, behavior, at.costs, asked, at.general, at.settings, given.out, given.fit_steps)
        at.measure(bench, ("base", "activation", *(given.method or [*names(), LINEAS])))
        print(f"\n{name}, at a KL of {given.kl:g} on {at.costs.budget.kind}\n\n{table(at.journal, name)}")


def table(journal: Journal, name: str) -> str:
    """Each method's paired differences from the base; those that are worse beyond doubt are marked, and come first."""
    base = journal.cells[name, "base", None]
    rows = []
    for cell in (cell for key, cell in journal.cells.items() if key[0] == name and key[1] != "base"):
        if cell.failed:
            rows.append((0, [cell.method, *[""] * len(base.values), cell.failed]))
            continue
        changes = {metric: difference(cell, base, metric) for metric in base.values}
        lost = [metric for metric, one in changes.items() if worse(one, BETTER[metric])]
        shown = [in_words(one) for one in changes.values()]
        rows.append((len(lost), [cell.method, *shown, f"worse: {', '.join(lost)}" if lost else ""]))
    rows.sort(key=lambda one: -one[0])
    means = [f"{sum(values) / len(values):.3g}" for values in base.values.values()]
    perplexity = math.exp(sum(base.values["nats"]) / len(base.values["nats"]))
    lines = [*(row for _, row in rows), ["base (means)", *means, f"perplexity {perplexity:.3g}"]]
    shown_table: str = tabulate(lines, ["method", *base.values, ""], tablefmt="github", disable_numparse=True)
    return shown_table


def worse(change: Estimate, better: int) -> bool:
    """Whether the whole interval is on the side of less of what is better."""
    return change.high < 0 if better > 0 else change.low > 0


if __name__ == "__main__":
    main()
