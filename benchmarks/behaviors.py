"""What a compile with the defaults does for each behaviour, written into the behaviour's file.

    python benchmarks/behaviors.py MODEL --out RUNS --behavior concise --id HuggingFaceTB/SmolLM2-135M-Instruct

For each behaviour it runs ``steer2edit compile MODEL --behavior NAME --to lora``, unless RUNS has its artefact already. With
--write the result becomes an entry under ``measured`` of the behaviour's file, in place of an older one of the same model. The
behaviour's own metric comes first, then the projection of written answers, those of general use and the signs of damage; losses
are written too. The entry holds the hash of the pairs that the artefact was compiled from. An artefact of other pairs than the
file has now is not written.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from steer2edit.bootstrap import Estimate
from steer2edit.data.behavior_file import BehaviorFile, behavior_files, open_behavior
from steer2edit.data.measurement import DIGITS, Interval, MeasuredMetric, Measurement, as_toml
from steer2edit.evaluation.evaluate import Evaluation
from steer2edit.evaluation.metrics import attributes
from steer2edit.evaluation.projection import PROJECTION
from steer2edit.evaluation.steerability import steerability
from steer2edit.files.layout import EVALUATION, PLAN
from steer2edit.plan import EditPlan
from steer2edit.plan.measured import KL_NAMES, is_kl


def measurement(evaluation: Evaluation, plan: EditPlan, model: str, name: str) -> Measurement:
    """The behaviour's own metric, the cost, and what else was measured of the edit.

    Raises SystemExit where the compile measured no effect.
    """
    row = next((row for row in evaluation.rows if row.kind == "edit"), None)
    own = attributes(evaluation.metrics)
    if row is None or not own or plan.measured.kl is None:
        raise SystemExit(f"{name}: the compile measured nothing of the behaviour")
    # the cost is the KL, and the perplexity of prose says the same of another text
    rest = [m for m in evaluation.metrics if m.role != "attribute" and not is_kl(m.name) and not m.exponential]
    metrics = []
    written = [m for m in own[1:] if m.name == PROJECTION]
    for metric in (own[0], *written, *rest):
        before, after = (evaluation.estimate(one, metric.name) for one in (evaluation.rows[0], row))
        change = evaluation.change(row, metric.name)
        metrics.append(MeasuredMetric(metric.name, metric.goal, metric.unit, *map(_interval, (before, after, change))))
    judged = steerability(evaluation, row)
    return Measurement(
        model.rpartition("/")[2],
        f"steer2edit compile {model} --behavior {name} --to lora --out {name}",
        evaluation.estimate(row, own[0].name).count,
        (KL_NAMES[plan.measured.budget_text], _rounded(plan.measured.kl)),
        None if judged is None else judged.steerable,
        tuple(metrics),
        str(plan.data["data"])[:DIGITS],
    )


def write(file: BehaviorFile, found: Measurement) -> None:
    """Put a measurement into the behaviour's file: its entries are the end of the file."""
    text = file.path.read_text(encoding="utf-8").partition("\n[[measured]]")[0].rstrip("\n") + "\n"
    others = [one for one in file.measured if one.model != found.model]
    file.path.write_text(text + as_toml(sorted([*others, found], key=lambda one: one.model)), encoding="utf-8")


def _interval(found: Estimate) -> Interval:
    return _rounded(found.value), _rounded(found.low), _rounded(found.high)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint folder, or a Hub id")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the compiled artefacts, one for each behaviour"
    )
    parser.add_argument("--behavior", action="append", help="repeatable; default: all built-in ones")
    parser.add_argument("--id", help="the model's name on the Hub, for the command that is written")
    parser.add_argument("--write", action="store_true", help="write into the behaviours' files")
    given = parser.parse_args()
    for name in given.behavior or behavior_files():
        file, out = open_behavior(name), given.out / Path(name).stem
        if not (out / EVALUATION).is_file():
            command = [sys.executable, "-m", "steer2edit", "compile", given.model, "--behavior", name, "--to", "lora"]
            subprocess.run([*command, "--out", str(out), "--force"], check=True, stdout=subprocess.DEVNULL)
        plan = EditPlan.load(out / PLAN)
        found = measurement(Evaluation.load(out / EVALUATION), plan, given.id or given.model, file.name)
        print(f"{file.name}: {found}", flush=True)
        if why := file.outdated(found):
            print(f"{file.name}: {out}: {why}. Give another --out", file=sys.stderr, flush=True)
        elif given.write:
            write(file, found)


if __name__ == "__main__":
    main()
