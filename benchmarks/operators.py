"""How far each compiled operator is from its paper's hooks on a real model: float32 logits, target by target.

    python benchmarks/operators.py MODEL --behavior concise --limit 12

Each number is the largest difference of a logit as a share of the largest that the hooks make. The rows are those of
``tests/operator_rows``, which the tests run on tiny models. Where an operator needs another model, the reason is printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from operator_rows import all_rows
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


def subject_of(folder: str, behavior: str, limit: int) -> Subject:
    """The model, captured on a behaviour's first rows."""
    checkpoint = open_checkpoint(folder)
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype="float32"))
    data = Behavior.named(behavior).limited(limit)
    ids = [loaded.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    contexts, _ = pad_right(ids, loaded.padding, loaded.device)
    # rows of one length, so that no padding is compared
    shortest = min(map(len, ids))
    return Subject(Path(folder).name, loaded, checkpoint, data, contexts[:, :shortest])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--behavior", default="concise")
    parser.add_argument("--limit", type=int, default=12, help="rows of the behaviour that are captured")
    parser.add_argument("--only", default="", help="systems whose names hold one of these texts, with commas between")
    parser.add_argument("--to", action="append", help="targets that are measured, all of them without it; repeatable")
    given = parser.parse_args()
    subject = subject_of(given.model, given.behavior, given.limit)
    lines = []
    for row in (row for row in all_rows() if any(one in row.system for one in given.only.split(","))):
        try:
            plan, hooked = row.planned(subject), subject.hooked(row.hooks(subject))
        except Steer2EditError as error:
            lines.append([row.system, row.command, "", first_line(error)])
            continue
        effect = float((hooked - subject.base).abs().max())
        lines.append(
            [row.system, row.command, f"{effect:.2g}", ", ".join(_errors(subject, plan, hooked, effect, given.to))]
        )
        print(lines[-1], file=sys.stderr, flush=True)
    print(tabulate(lines, ["system", "command", "effect", "error by target"], tablefmt="github", disable_numparse=True))


def _errors(
    subject: Subject, plan: EditPlan, hooked: torch.Tensor, effect: float, chosen: Sequence[str] | None
) -> list[str]:
    found = []
    for target in chosen or targets.names():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                error = float((subject.artefact(plan, target, Path(scratch) / "out") - hooked).abs().max()) / effect
                found.append(f"{target} {error:.1g}")
            except TargetError:
                found.append(f"{target} refused")
    return found


if __name__ == "__main__":
    main()
