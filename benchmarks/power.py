"""How much of each behaviour every method gives at the same KL: areas under the fronts, with paired intervals.

    python benchmarks/power.py MODEL --behavior concise --behavior formal --out power/SmolLM2
    python benchmarks/power.py --summary power/SmolLM2 power/gemma-3-270m > power.md

The methods are the default edit, the component edit, activation steering, three random directions, an instruction, and rank-1
LoRA adapters trained on the same pairs by SFT and by DPO for --train-seconds of processor time. Each is brought to every --kl on
the model's own answers. The margin (or, where a behaviour has no pairs, the length of answers) is measured on the reporting half
of the questions, and the share of right answers on general questions; random directions get fewer questions and no answers.
Areas are means over log KL. Intervals are bootstrap 95 % over questions.

Several --seed deal the questions out to several reporting halves. They overlap: a question is measured once, counts as often as
it is in a half, and is drawn as one unit. The defaults of methods were chosen on the selection half of seed 0, so that seed 0
alone is untouched by that choice.

Every cell is kept when it is done (cells.jsonl in --out): the same command goes on after a kill. The time is estimated from the
base's own cell and printed before the rest; --estimate stops there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from power_cells import METHODS, UNSCALED, Bench, Cell, Journal, Settings, ask, general_questions
from power_table import plain, read_tables, render

from steer2edit.architecture import read_spec
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import behavior_files, builtin_questions
from steer2edit.runtime.model import Runtime, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.neutral_texts import neutral_texts

KLS = (0.025, 0.05, 0.1, 0.2, 0.4)
PASSES = 2.5
"""Measurements of the KL that a cell takes, about."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--summary", nargs="+", type=Path, metavar="FOLDER", help="print the table of these folders")
    parser.add_argument(
        "--row", default="edit", choices=("edit", "component"), help="with --summary: the edit compared"
    )
    parser.add_argument("--json", action="store_true", help="with --summary: print the comparisons as JSON")
    parser.add_argument("--out", type=Path, help="folder of the cells")
    parser.add_argument(
        "--behavior", action="append", choices=behavior_files(), help="repeatable; default: all built-in ones"
    )
    parser.add_argument("--method", action="append", choices=METHODS, help="repeatable; default: all")
    parser.add_argument("--kl", action="append", type=float, help=f"repeatable; default: {' '.join(map(str, KLS))}")
    parser.add_argument("--seed", action="append", type=int, help="seed of the split; repeatable; default: 0")
    parser.add_argument(
        "--questions", type=int, default=200, help="of each seed's reporting half (default %(default)s)"
    )
    parser.add_argument("--random-questions", type=int, default=64, help="for random directions (default %(default)s)")
    parser.add_argument("--knowledge", type=int, default=64, help="general questions answered (default %(default)s)")
    parser.add_argument(
        "--general-split", choices=("select", "report"), default="report", help="half of the general questions"
    )
    parser.add_argument("--answer-tokens", type=int, default=32, help="of a general answer (default %(default)s)")
    parser.add_argument(
        "--length-tokens", type=int, default=64, help="of an answer whose length counts (default %(default)s)"
    )
    parser.add_argument("--kl-rows", type=int, default=24, help="answers and windows behind a KL (default %(default)s)")
    parser.add_argument("--train-seconds", type=float, default=60.0, help="of each LoRA (default %(default)s)")
    parser.add_argument("--train-steps", type=int, help="of each LoRA, at most")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--estimate", action="store_true", help="print the estimate and stop")
    options = parser.parse_args()
    if options.summary:
        tables = [table for folder in options.summary for table in read_tables(folder)]
        print(json.dumps(plain(tables, options.row), indent=1) if options.json else render(tables, options.row))
        return
    if options.model is None or options.out is None:
        parser.error("give MODEL and --out FOLDER, or --summary FOLDER")
    if options.threads:
        torch.set_num_threads(options.threads)
    run(options)


def run(options: argparse.Namespace) -> None:
    """Measure the cells that are missing, and say beforehand how long that takes."""
    checkpoint = open_checkpoint(options.model)
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype=options.dtype))
    settings = Settings(
        checkpoint.fingerprint,
        options.dtype,
        tuple(options.kl or KLS),
        tuple(options.seed or [0]),
        options.questions,
        options.random_questions,
        options.knowledge,
        options.answer_tokens,
        options.length_tokens,
        options.kl_rows,
        options.train_seconds,
        options.train_steps,
        options.general_split,
    )
    journal = Journal(options.out, settings)
    costs = neutral_texts(loaded, limit=options.kl_rows)
    general = general_questions(options.knowledge, options.general_split)
    names, methods = options.behavior or list(behavior_files()), options.method or list(METHODS)
    for place, name in enumerate(names):
        asked = ask(builtin_questions(name) or [], settings.seeds, settings.questions)
        kept = options.out / f"questions-{name}.json"
        described = json.dumps(asked.described()) + "\n"
        if kept.is_file() and kept.read_text() != described:
            sys.exit(f"{kept} holds other questions than the package has now: give another --out")
        kept.write_text(described)
        missing = [m for m in ("base", *methods) if any(key not in journal.cells for key in keys(name, m, settings))]
        if not missing and not options.estimate:
            continue
        behavior = Behavior.named(name)
        started = time.perf_counter()
        scoring = Scoring(checkpoint, loaded.spec, capture_statistics(loaded, checkpoint, behavior))
        captured = time.perf_counter() - started
        bench = Bench(loaded, scoring, behavior, costs, asked, general, settings, options.out)
        for method in ("base", *methods):
            for cell in bench.cells(method, journal):
                journal.add(cell)
                say(cell, costs.budget.kind)
                if method == "base":
                    print(estimate(bench, journal, names[place:], methods, captured), file=sys.stderr, flush=True)
            if method == "base" and options.estimate:
                print(estimate(bench, journal, names[place:], methods, captured))
                return


def keys(name: str, method: str, settings: Settings) -> list[tuple[str, str, float | None]]:
    """The cells of a method."""
    return [(name, method, budget) for budget in ((None,) if method in UNSCALED else settings.budgets)]


def estimate(bench: Bench, journal: Journal, names: list[str], methods: list[str], captured: float) -> str:
    """How long the missing cells take, in words, from what the base's cell and a pass over the text take."""
    base = journal.cells[names[0], "base", None]
    started = time.perf_counter()
    bench.costs.budget.measure()
    pass_ = time.perf_counter() - started
    prose = 0.0 if bench.costs.other is None else pass_ * bench.costs.other.tokens / bench.costs.budget.tokens
    settings = bench.settings
    share = min(1.0, settings.random_questions / len(bench.asked.questions))
    total, count = captured * (len(names) - 1), 0
    for name in names:
        for method in methods:
            missing = sum(key not in journal.cells for key in keys(name, method, settings))
            count += missing
            own = base.seconds * (share if method.startswith("random") else 1)
            total += missing * (own + (0 if method in UNSCALED else PASSES * pass_ + prose))
            if method in ("sft", "dpo") and missing:
                total += settings.train_seconds
    return (
        f"{count} cells in {len(names)} behaviours: about {total / 60:.0f} minutes (a base cell takes {base.seconds:.0f} s, a "
        f"pass over the text of the cost {pass_:.1f} s)"
    )


def say(cell: Cell, kind: str) -> None:
    """A line on what a cell gave."""
    means = ", ".join(f"{name} {sum(values) / len(values):.3g}" for name, values in cell.values.items())
    at = "" if cell.budget is None else f" at KL {cell.kl.get(kind, float('nan')):.3g} of {cell.budget:g}"
    print(
        f"{cell.behavior}: {cell.method}{at}: {cell.failed or means} ({cell.seconds:.0f} s)",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()
