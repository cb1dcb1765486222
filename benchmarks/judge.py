"""What a model says as a judge against the sixty answers that are labelled by hand.

python benchmarks/judge.py MODEL|URL [--server-model NAME] [--dtype float32] [--json]
"""

from __future__ import annotations

import argparse
import json

from steer2edit.engines.agreement import TRAITS, agreement_of, labelled_answers
from steer2edit.engines.judge import coherence_request, trait_request
from steer2edit.engines.opening import open_named
from steer2edit.runtime.model import DTYPES, Runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("judge", metavar="MODEL|URL")
    parser.add_argument("--server-model")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    engine = open_named(given.judge, Runtime(dtype=given.dtype), model=given.server_model)
    rows = labelled_answers()
    shown = engine.yes([trait_request(row.trait, row.prompt, row.answer) for row in rows])
    sense = engine.yes([coherence_request(row.prompt, row.answer) for row in rows])
    trials = {"all traits": agreement_of("traits", shown, [row.shows for row in rows])}
    for name, trait in TRAITS.items():
        part = [index for index, row in enumerate(rows) if row.trait == trait]
        trials[name] = agreement_of(name, [shown[i] for i in part], [rows[i].shows for i in part])
    # what makes no sense shows no trait: is the judge better where all makes sense?
    part = [index for index, row in enumerate(rows) if row.coherent]
    trials["all traits, coherent answers"] = agreement_of(
        "traits", [shown[i] for i in part], [rows[i].shows for i in part]
    )
    trials["coherence"] = agreement_of("coherence", sense, [row.coherent for row in rows])
    if given.json:
        described = {name: trial.described() for name, trial in trials.items()}
        print(json.dumps({"engine": engine.described(), "trials": described}, indent=1))
        return
    print(f"{'':32}{'labels':>7}  {'AUC':<20}{'right':<20}used")
    for name, trial in trials.items():
        area = f"{trial.auc:.2f} [{trial.low:.2f}, {trial.high:.2f}]"
        right = f"{trial.right.value:.2f} [{trial.right.low:.2f}, {trial.right.high:.2f}]"
        print(f"{name:32}{trial.count:>7}  {area:<20}{right:<20}{'yes' if trial.trusted else 'no'}")


if __name__ == "__main__":
    main()
