"""What an edit does at a given KL: methods against activation steering, on held-out questions.

    python benchmarks/attributes.py MODEL --behavior concise --kl-budget 0.01 --kl-budget 0.03 --kl-budget 0.1
    python benchmarks/attributes.py MODEL --behavior truthful --method steering --method component:scale=absolute

Steering vectors come from the packaged contrast data; numbers are on the reporting split of the packaged questions (or, with
--split select, on the half by which defaults were chosen). Intervals are bootstrap 95 % over questions.
"""

from __future__ import annotations

import argparse
from typing import Any

from tabulate import tabulate

from steer2edit import methods
from steer2edit.architecture import read_spec
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import builtin_questions
from steer2edit.data.questions import knowledge_questions
from steer2edit.evaluation.assess import assess
from steer2edit.evaluation.baselines import random_direction, steering_at, to_kl
from steer2edit.evaluation.candidates import Candidate, plan_candidate
from steer2edit.evaluation.suite import Suite
from steer2edit.methods import make_plan
from steer2edit.runtime.model import Runtime, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.neutral_texts import neutral_texts
from steer2edit.strength.settle import settle_strength

METHODS = ["steering", "component"]


def options_of(text: str) -> tuple[str, Any]:
    """``name:option=value,…`` as a method's name and its options."""
    name, _, settings = text.partition(":")
    given: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        try:
            given[key] = {"true": True, "false": False}[value] if value in ("true", "false") else float(value)
        except ValueError:
            given[key] = value
    return name, methods.load(name).Options(**given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--behavior", default="concise")
    parser.add_argument("--kl-budget", type=float, action="append", default=None)
    parser.add_argument("--method", action="append", default=None, help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--span", choices=("matched", "response"), default="matched")
    parser.add_argument("--split", choices=("report", "select"), default="report")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", type=int, help="questions")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--no-utility", action="store_true", help="leave the questions of general knowledge out")
    parser.add_argument("--random", action="store_true", help="a random direction too")
    options = parser.parse_args()

    checkpoint = open_checkpoint(options.model)
    spec = read_spec(checkpoint)
    loaded = load_model(checkpoint, spec, Runtime(dtype=options.dtype))
    neutral = neutral_texts(loaded)
    behavior = Behavior.named(options.behavior, span=options.span)
    scoring = Scoring(checkpoint, spec, capture_statistics(loaded, checkpoint, behavior))
    suite = Suite(
        builtin_questions(options.behavior) or [],
        [] if options.no_utility else knowledge_questions(),
        neutral,
        max_new_tokens=options.max_new_tokens,
        limit=options.limit,
    )
    candidates: list[Candidate] = []
    for budget in options.kl_budget or [0.05]:
        for text in options.method or METHODS:
            name, chosen = options_of(text)
            plan = make_plan(scoring, method=name, options=chosen)
            plan = settle_strength(loaded, plan, kl_budget=budget, neutral=neutral)
            candidates.append(plan_candidate(loaded, text, plan))
            if options.random and text == (options.method or METHODS)[0]:
                drawn = to_kl(loaded, random_direction(plan, seed=0), neutral, budget)
                candidates.append(plan_candidate(loaded, "random direction", drawn, "random"))
        candidates.append(steering_at(loaded, scoring, neutral, budget))
    found = assess(loaded, suite, candidates, split=options.split)
    table = [[row.name, *(str(found.estimate(row, m.name)) for m in found.metrics)] for row in found.rows]
    print(tabulate(table, headers=["", *(m.name for m in found.metrics)], disable_numparse=True))
    print({m.name: found.estimate(found.rows[0], m.name).count for m in found.metrics})


if __name__ == "__main__":
    main()
