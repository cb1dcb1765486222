"""What becomes of the demo's behaviours when two of them share one artefact, beside how much their edits overlap.

    python benchmarks/interference.py [--kl-budget 0.0025]

Each behaviour is compiled into the embedded model as the demo does it. For every pair its held-out tasks are answered by the
base, by each plan alone, and by both plans merged at weight 1.
"""

from __future__ import annotations

import argparse
from itertools import combinations

from tabulate import tabulate

from steer2edit.architecture import read_spec
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.compose import overlap
from steer2edit.demo import invented_world
from steer2edit.demo.run import (
    KL_BUDGET,
    RUNTIME,
    answers_to,
    demo_behavior,
    model_folder,
    neutral_documents,
    one_thread,
    rates_of,
)
from steer2edit.methods import make_plan
from steer2edit.plan import EditPlan, merge
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.neutral_texts import neutral_texts
from steer2edit.strength.settle import settle_strength


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kl-budget", type=float, default=KL_BUDGET)
    given = parser.parse_args()
    checkpoint = open_checkpoint(model_folder())
    spec = read_spec(checkpoint)
    loaded = load_model(checkpoint, spec, RUNTIME)
    neutral, background = neutral_texts(loaded, neutral_documents()), neutral_documents(seed=2)

    def compiled(name: str) -> EditPlan:
        statistics = capture_statistics(loaded, checkpoint, demo_behavior(name), background=background)
        plan = make_plan(Scoring(checkpoint, spec, statistics))
        return settle_strength(loaded, plan, kl_budget=given.kl_budget, neutral=neutral)

    plans = {name: compiled(name) for name in invented_world.BEHAVIORS}
    empty = EditPlan(next(iter(plans.values())).base, ())
    rows = []
    for first, second in combinations(plans, 2):
        both = merge([plans[first], plans[second]])
        total = overlap([plans[first], plans[second]], spec)[0]
        shared = f"{total.update:+.2f}, {total.direction:+.2f}, {total.components:.0%}"
        for name, other in ((first, second), (second, first)):
            tasks = invented_world.tasks(name)
            row = [f"{first} + {second}", shared, name]
            for plan in (empty, plans[name], plans[other], both):
                with edited(loaded, plan):
                    rates = rates_of(tasks, answers_to(loaded, tasks))
                row.append(f"{rates['attribute']:.0%}, {rates['utility']:.0%}")
            with edited(loaded, both):
                row.append(f"{neutral.budget.measure().kl:.4f}")
            rows.append(row)
    heads = [
        "pair",
        "update, direction, components",
        "attribute and utility of",
        "base",
        "alone",
        "the other",
        "both",
        "KL of both",
    ]
    print(tabulate(rows, headers=heads, disable_numparse=True))


if __name__ == "__main__":
    with one_thread():
        main()
