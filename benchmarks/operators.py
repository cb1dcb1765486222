"""How far each compiled operator is from its paper's hooks on a real model: float32 logits, target by target.

    python benchmarks/operators.py MODEL --behavior concise --limit 12 --to checkpoint --out operators.json

Each number is the largest difference of a logit as a share of the largest that the hooks make. The rows are those of
``tests/operator_rows``, which the tests run on tiny models. Where an operator needs another model, the reason is printed.
The model is copied as float32 first, so that no rounding to its stored numbers is measured. ``--out`` keeps each row as it is
measured, and the same command goes on after a kill. ``docs/generate.py`` reads ``docs/operators.measured.json``, which this
program wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from operator_rows import all_rows
from operator_rows.row import Row
from operator_rows.subject import Subject

from steer2edit import targets
from steer2edit.architecture import read_spec
from steer2edit.artefact.numbers import PROMPTS
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.errors import Steer2EditError, TargetError, first_line
from steer2edit.plan import EditPlan
from steer2edit.runtime.batches import pad_right
from steer2edit.runtime.model import Runtime, load_model


def subject_of(folder: str, behavior: str, limit: int, scratch: Path) -> Subject:
    """The model in float32, captured on a behaviour's first rows; its copy lies in ``scratch``."""
    stored = open_checkpoint(folder)
    loaded = load_model(stored, read_spec(stored), Runtime(dtype="float32"))
    loaded.model.save_pretrained(scratch / "float32")
    loaded.tokenizer.save_pretrained(scratch / "float32")
    checkpoint = open_checkpoint(scratch / "float32")
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype="float32"))
    data = Behavior.named(behavior).limited(limit)
    ids = [loaded.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    contexts, _ = pad_right(ids, loaded.padding, loaded.device)
    # rows of one length, so that no padding is compared
    shortest = min(map(len, ids))
    return Subject(loaded.spec.model_type, loaded, checkpoint, data, contexts[:, :shortest])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--behavior", default="concise")
    parser.add_argument("--limit", type=int, default=12, help="rows of the behaviour that are captured")
    parser.add_argument("--only", default="", help="systems whose names hold one of these texts, with commas between")
    parser.add_argument("--to", action="append", help="targets that are measured, all of them without it; repeatable")
    parser.add_argument(
        "--out", type=Path, help="JSON file that keeps the rows; those of this command are not run again"
    )
    parser.add_argument("--threads", type=int, help="torch's threads")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        _measure(subject_of(given.model, given.behavior, given.limit, Path(scratch)), given)


def _measure(subject: Subject, given: argparse.Namespace) -> None:
    settings = {
        "model": Path(given.model).name,
        "command": f"benchmarks/operators.py MODEL --behavior {given.behavior} --limit {given.limit}"
        + "".join(f" --to {target}" for target in given.to or ()),
    }
    results = _kept(given.out, settings)
    for row in (row for row in all_rows() if any(one in row.system for one in given.only.split(","))):
        if row.name in results:
            continue
        results[row.name] = _measured(row, subject, given.to)
        print(row.name, results[row.name], file=sys.stderr, flush=True)
        if given.out is not None:
            kept = given.out.with_name(f"{given.out.name}.part")
            kept.write_text(json.dumps({**settings, "rows": results}, indent=1) + "\n", encoding="utf-8")
            kept.replace(given.out)
    names = {row.name: row for row in all_rows()}
    lines = [
        [names[name].system, names[name].command, one.get("effect", ""), one.get("why") or _told(one["errors"])]
        for name, one in results.items()
        if name in names
    ]
    print(tabulate(lines, ["system", "command", "effect", "error by target"], tablefmt="github", disable_numparse=True))


def _kept(path: Path | None, settings: Mapping[str, str]) -> dict[str, Any]:
    """The rows that the same command has measured already."""
    if path is None or not path.is_file():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    if any(kept[name] != value for name, value in settings.items()):
        sys.exit(f"{path} holds the rows of another command: {kept['command']} on {kept['model']}")
    rows: dict[str, Any] = kept["rows"]
    return rows


def _measured(row: Row, subject: Subject, chosen: Sequence[str] | None) -> dict[str, Any]:
    """A row's effect and errors, or why it has none."""
    if not {subject.spec.model_type, "llama"} & set(row.families):
        return {"why": f"it is for another kind of model, such as {' or '.join(row.families)}"}
    try:
        plan, hooked = row.planned(subject), subject.hooked(row.hooks(subject))
    except Steer2EditError as error:
        return {"why": first_line(error)}
    effect = float((hooked - subject.base).abs().max())
    return {"effect": float(f"{effect:.2g}"), "errors": _errors(subject, plan, hooked, effect, chosen)}


def _told(errors: Mapping[str, float | None]) -> str:
    return ", ".join(f"{target} {'refused' if error is None else f'{error:.1g}'}" for target, error in errors.items())


def _errors(
    subject: Subject, plan: EditPlan, hooked: torch.Tensor, effect: float, chosen: Sequence[str] | None
) -> dict[str, float | None]:
    """Of each target the error of its artefact, a share of the effect; None where it refuses the plan."""
    errors: dict[str, float | None] = {}
    for target in chosen or targets.names():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                logits = subject.artefact(plan, target, Path(scratch) / "out")
                errors[target] = float(f"{float((logits - hooked).abs().max()) / effect:.1g}")
            except TargetError:
                errors[target] = None
    return errors


if __name__ == "__main__":
    main()
