"""What written answers show of a behaviour, and how many of them loop: the default edit, activation steering, and others.

    python benchmarks/written.py MODEL --behavior cautious --behavior plain --out written/SmolLM2
    python benchmarks/written.py --summary written/SmolLM2

The margin is read off responses that somebody else wrote. Here the model writes, greedily and in at most --tokens tokens, and the
base reads what it wrote (steer2edit/evaluation/projection.py). An answer's projection minus that of the base's own answer is how
far it has *moved*: 1 is the distance of the contrast data's classes. Beside it stand loops and repeated 4-grams, without a
repetition penalty or with one.

Each method is brought to every --kl on the model's own answers. A method's cells are kept when all its answers are
written: the same command goes on after a kill. Differences are paired by question; intervals are bootstrap 95 % over questions.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from power_cells import METHODS, UNSCALED, Asked, Bench, Cell, Journal, Settings
from tabulate import tabulate

from steer2edit.architecture import read_spec
from steer2edit.bootstrap import estimate
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import behavior_files, builtin_questions
from steer2edit.data.degeneration import loops, repetition
from steer2edit.data.questions import Question, take
from steer2edit.engines.engine import Answer, Request, Sampling, written
from steer2edit.engines.transformers_engine import TransformersEngine
from steer2edit.evaluation.baselines import near
from steer2edit.evaluation.projection import PROJECTION, Projection
from steer2edit.formatting import interval
from steer2edit.runtime.model import LoadedModel, Runtime, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.neutral_texts import neutral_texts


def cells(bench: Bench, projection: Projection, method: str, journal: Journal) -> Iterator[Cell]:
    """The method's cells that the journal lacks. The base reads when the method is off again."""
    name, questions, tokens = bench.behavior.name, bench.asked.questions, bench.settings.length_tokens
    budgets: Sequence[float | None] = (None,) if method in UNSCALED else bench.settings.budgets
    missing = [budget for budget in budgets if (name, method, budget) not in journal.cells]
    if not missing:
        return
    wrote: list[tuple[Cell, list[Answer]]] = []
    with bench.opened(method) as (apply, text):
        for budget in missing:
            began = time.perf_counter()
            strength: float | None = None
            kl: dict[str, float] = {}
            if budget is not None:
                found = near(apply, bench.costs.budget, budget, name=f"{name}, {method}")
                strength, kl = found.strength, {bench.costs.budget.kind: found.divergence.kl}
            with apply(1.0 if strength is None else strength):
                mine = answers(bench.loaded, questions, tokens, text, bench.settings.repetition_penalty)
            wrote.append((Cell(name, method, budget, strength, kl, seconds=time.perf_counter() - began), mine))
    for cell, mine in wrote:
        values = {
            "projection": projected(projection, questions, mine),
            "loops": [float(loops(one.ids or (), one.ended)) for one in mine],
            "repetition": [repetition(one.ids or ()) for one in mine],
            "tokens": [float(len(one.ids or ())) for one in mine],
        }
        yield replace(cell, values=values)


def answers(
    loaded: LoadedModel, questions: Sequence[Question], tokens: int, system: str = "", penalty: float = 1.0
) -> list[Answer]:
    """Greedy answers of the model as it is now."""
    requests = [Request(question.prompt, system=system or None) for question in questions]
    return written(TransformersEngine(loaded), requests, Sampling(tokens, repetition_penalty=penalty))


def projected(projection: Projection, questions: Sequence[Question], given: Sequence[Answer]) -> list[float]:
    """Where each answer stands between the classes, as the base reads it."""
    return list(projection.samples(questions, [one.text for one in given])[PROJECTION].values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--summary", nargs="+", type=Path, metavar="FOLDER", help="print the table of these folders")
    parser.add_argument("--out", type=Path, help="folder of the cells; adapters of power.py in it are used")
    parser.add_argument("--behavior", action="append", choices=behavior_files(), help="repeatable; default: all")
    parser.add_argument(
        "--method", action="append", choices=METHODS, help="repeatable; default: edit, steering, instruction"
    )
    parser.add_argument("--kl", action="append", type=float, help="repeatable; default: 0.025 0.05 0.1")
    parser.add_argument("--split", choices=("select", "report"), default="report", help="half of the questions")
    parser.add_argument("--questions", type=int, default=200, help="answered (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most (default %(default)s)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="of decoding (default %(default)s: none)")
    parser.add_argument("--kl-rows", type=int, default=24, help="answers behind a KL (default %(default)s)")
    parser.add_argument("--train-seconds", type=float, default=180.0, help="of a LoRA that is not there")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, help="torch's threads")
    options = parser.parse_args()
    if options.summary:
        print("\n\n".join(table(folder) for folder in options.summary))
        return
    if options.model is None or options.out is None:
        parser.error("give MODEL and --out FOLDER, or --summary FOLDER")
    if options.threads:
        torch.set_num_threads(options.threads)
    run(options)


def run(options: argparse.Namespace) -> None:
    """Measure the cells that are missing."""
    checkpoint = open_checkpoint(options.model)
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype=options.dtype))
    settings = Settings(
        fingerprint=checkpoint.fingerprint,
        dtype=options.dtype,
        budgets=tuple(options.kl or (0.025, 0.05, 0.1)),
        seeds=(0,),
        questions=options.questions,
        random_questions=options.questions,
        knowledge=0,
        answer_tokens=0,
        length_tokens=options.tokens,
        kl_rows=options.kl_rows,
        train_seconds=options.train_seconds,
        general_split=options.split,
        repetition_penalty=options.repetition_penalty,
    )
    journal = Journal(options.out, settings)
    costs = neutral_texts(loaded, limit=options.kl_rows)
    for name in options.behavior or behavior_files():
        questions = sorted(builtin_questions(name) or [], key=lambda q: q.digest[::-1])
        asked = Asked("projection", tuple(take(questions, options.split)[: options.questions]), ())
        behavior = Behavior.named(name)
        scoring = Scoring(checkpoint, loaded.spec, capture_statistics(loaded, checkpoint, behavior))
        projection = Projection.of(loaded, scoring.statistics)
        if projection is None:
            sys.exit(f"{name}: the streams of the classes do not differ")
        bench = Bench(loaded, scoring, behavior, costs, asked, [], settings, options.out)
        for method in ("base", *(options.method or ("edit", "steering", "instruction"))):
            for cell in cells(bench, projection, method, journal):
                journal.add(cell)
                means = ", ".join(f"{key} {sum(values) / len(values):.3g}" for key, values in cell.values.items())
                at = "" if cell.budget is None else f" at KL {cell.budget:g}"
                print(f"{name}: {method}{at}: {means} ({cell.seconds:.0f} s)", file=sys.stderr, flush=True)
    print(table(options.out))


def table(folder: Path) -> str:
    """How far answers moved from the base's, beside the edit's difference from the method, and how many more loop."""
    every = Journal(folder).cells
    rows = []
    for (name, method, budget), cell in every.items():
        if method == "base":
            continue
        base, edit = every[name, "base", None], every.get((name, "edit", budget))
        beyond = _difference(edit, cell, "projection") if edit is not None and method != "edit" else ""
        moved, looped = (_difference(cell, base, metric) for metric in ("projection", "loops"))
        rows.append((name, method, budget, moved, beyond, looped, len(base.values["loops"])))
    heads = ("behaviour", "method", "KL", "moved", "edit minus it", "loops minus base", "questions")
    return str(tabulate(rows, heads, tablefmt="github"))


def _difference(one: Cell, other: Cell, metric: str) -> str:
    pairs = zip(one.values[metric], other.values[metric], strict=True)
    return interval(estimate([a - b for a, b in pairs]), signed=True)


if __name__ == "__main__":
    main()
