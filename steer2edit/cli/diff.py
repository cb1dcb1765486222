"""``diff`` and ``revert``: what was changed in a checkpoint, and its undoing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from steer2edit.cli.command import command
from steer2edit.cli.flags import PATH, FlagGroup
from steer2edit.cli.options import ForceFlags, JsonFlags, ReplaceFlags, RevisionFlags, progress_bar
from steer2edit.cli.output import print_result
from steer2edit.errors import count_of
from steer2edit.options import option

if TYPE_CHECKING:
    from steer2edit.checkpoint import Checkpoint
    from steer2edit.plan import Structure


@dataclass(frozen=True)
class DiffFlags(FlagGroup):
    """What is listed and written."""

    heading: ClassVar[str] = "Output"

    out: Path | None = option(None, "Write the recovered plan to this file, *.plan.safetensors.", "-o", "--out")
    max_rank: int = option(32, "Largest rank that counts as low.", minimum=1)
    top: int = option(30, "Number of tensors to list.", minimum=0)


@dataclass(frozen=True)
class RevertFlags(FlagGroup):
    """What is restored, and where to."""

    heading: ClassVar[str] = "Output"

    base: str = option(..., "Folder or Hub id that EDITED was made from.", metavar="MODEL")
    out: Path | None = option(
        None, "Folder of the result.", "-o", "--out", shown_default="EDITED itself, replaced when complete"
    )
    unproven: bool = option(False, "Restore every tensor that differs, without a receipt that proves it.")


@command(output=DiffFlags, replace=ReplaceFlags, printed=JsonFlags)
@click.argument("base")
@click.argument("edited")
def diff(base: str, edited: str, output: DiffFlags, replace: ReplaceFlags, printed: JsonFlags) -> None:
    """List every tensor in which EDITED differs from BASE, and the rank of the difference.

    Works on checkpoints made by any tool, however they are divided among shards, and on those that have lost layers or experts.
    Reads each file, loads no model.
    """
    from steer2edit.checkpoint import open_checkpoint
    from steer2edit.diff.difference import compare, recover_plan
    from steer2edit.diff.missing_parts import missing_parts
    from steer2edit.errors import ArchitectureError, PlanError, first_line

    replace.check(output.out, "plan")
    ours, theirs = open_checkpoint(base), open_checkpoint(edited)
    spec: Any = None
    unknown = ""
    try:
        from steer2edit.architecture import read_spec

        spec = read_spec(ours)
    except ArchitectureError as error:
        unknown = first_line(error)
    missing = missing_parts(ours, theirs, spec, lambda: _told_by_receipt(ours, theirs))
    found = compare(ours, theirs, spec, missing, max_rank=output.max_rank, progress=progress_bar())
    result: dict[str, Any] = {
        **{key: value for key, value in vars(found).items() if key not in ("tensors", "added", "missing")},
        "missing": found.missing.described() if found.missing else None,
        "zeros": [name for name, values in found.added.items() if not bool(values.any())],
        "tensors": [_described(item) for item in found.tensors],
        "plan": None,
    }
    if output.out is not None:
        if spec is None:
            raise PlanError(f"no plan can be recovered for a layout that is not understood: {unknown}")
        plan, left_out = recover_plan(found, ours, spec)
        plan.save(output.out)
        result["plan"] = {"file": str(output.out), "edits": len(plan.edits), "left_out": left_out}
    print_result(result, printed.as_json, lambda r: _render(r, output.top))


@command(output=RevertFlags, revision=RevisionFlags, force=ForceFlags, printed=JsonFlags)
@click.argument("edited", type=PATH)
def revert(edited: Path, output: RevertFlags, revision: RevisionFlags, force: ForceFlags, printed: JsonFlags) -> None:
    """Restore the base's weights in EDITED, after checking every changed tensor against the receipt."""
    from steer2edit.artefact.revert import revert as revert_folder

    reverted = revert_folder(
        edited,
        output.base,
        output.out,
        revision=revision.revision,
        unproven=output.unproven,
        force=force.force,
        progress=progress_bar(),
    )

    def render(r: dict[str, Any]) -> str:
        proof = "each proved by the receipt" if r["proven"] else "without a receipt's proof"
        lines = [f"{r['folder']}: {count_of(len(r['tensors']), 'tensor')} restored, {proof}"]
        lines += [f"  {name} still differs: another shape or dtype, or not in both" for name in r["remaining"]]
        return "\n".join(lines)

    print_result({**asdict(reverted), "folder": str(reverted.folder)}, printed.as_json, render)


def _told_by_receipt(base: Checkpoint, edited: Checkpoint) -> Structure | None:
    """What the plan in an artefact removes from this base; None where there is none, or it cannot be read."""
    from steer2edit.artefact.receipt import read_receipt
    from steer2edit.errors import Steer2EditError, first_line
    from steer2edit.files.layout import PLAN, RECEIPT
    from steer2edit.notices import notice
    from steer2edit.plan import EditPlan

    if not (edited.path / RECEIPT).is_file():
        return None
    try:
        receipt = read_receipt(edited.path)
        if receipt["base"]["fingerprint"] != base.fingerprint:
            return None
        return EditPlan.load(edited.path / PLAN).structure
    except Steer2EditError as error:
        notice(f"the receipt of {edited.name} does not tell what is missing: {first_line(error)}")
        return None


def _described(item: Any) -> dict[str, Any]:
    values = {key: value for key, value in vars(item).items() if key not in {"factors", "delta", "scaled"}}
    if item.scaled is None:
        return values
    axis, factors = item.scaled
    lines = int((factors != 1).sum())
    return {**values, "scaled": {"lines": lines, "axis": "columns" if axis else "rows", "factors": factors.tolist()}}


def _missing_lines(missing: dict[str, Any] | None) -> list[str]:
    """What the edited checkpoint has lost, in words."""
    if missing is None:
        return []
    lines = []
    if layers := missing.get("layers"):
        what = f"layer {layers[0]}" if len(layers) == 1 else f"the layers {', '.join(map(str, layers))}"
        lines.append(f"The edited checkpoint has lost {what}.")
    lines += [
        f"Layer {layer} has lost the expert{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))}."
        for layer, gone in missing["remove"].items()
    ]
    if missing["top_k"] is not None:
        lines.append(f"Each token passes through {count_of(missing['top_k'], 'expert')} of a layer.")
    if lines and (missing.get("layers") or missing["remove"]):
        lines.append("Layers and experts are numbered as in the base.")
    return [*lines, ""]


def _render(r: dict[str, Any], top: int) -> str:
    from tabulate import tabulate

    differing = count_of(len(r["tensors"]), "tensor differs", "tensors differ")
    lines = [*_missing_lines(r["missing"]), f"{differing}, {count_of(r['same'], 'is', 'are')} the same"]
    rows = []
    for item in r["tensors"][:top]:
        matrix = item["floor"] > 0
        rank = "-" if not matrix else "not low" if item["rank"] is None else item["rank"]
        if "scaled" in item:
            rank = f"{item['scaled']['lines']} {item['scaled']['axis']} scaled"
        first = item["singular"][0] if item["singular"] else item["next"]
        rows.append(
            [item["tensor"], rank, item["norm"], f"{item['relative']:.2%}", f"{item['entries']:.1%}"]
            + ([first, item["next"], item["floor"]] if matrix else ["", "", ""])
        )
    if rows:
        headers = [
            "tensor",
            "rank",
            "norm",
            "of the base",
            "entries",
            "largest s.v.",
            "first left out",
            "rounding floor",
        ]
        lines.append(tabulate(rows, headers=headers, floatfmt=".3g"))
    if len(r["tensors"]) > top:
        lines.append(f"… and {len(r['tensors']) - top} more (--top)")
    if r["dtypes"]:
        pairs = sorted({f"{a} -> {b}" for a, b in r["dtypes"].values()})
        lines.append(
            f"{count_of(len(r['dtypes']), 'tensor is', 'tensors are')} stored in another dtype: {', '.join(pairs)}"
        )
    lines += [f"{name}: shape {list(a)} -> {list(b)}" for name, (a, b) in r["shapes"].items()]
    for key, where in (("only_base", "the base"), ("only_edited", "the edited checkpoint")):
        if r[key]:
            zeros = f" ({len(r['zeros'])} of them zeros)" if key == "only_edited" and r["zeros"] else ""
            rest = f" and {len(r[key]) - 6} more" if len(r[key]) > 6 else ""
            lines.append(f"only in {where}{zeros}: {', '.join(r[key][:6])}{rest}")
    if r["files"]:
        lines.append(f"other files that differ: {', '.join(r['files'])}")
    if r["plan"]:
        lines.append(f"{r['plan']['file']}: {r['plan']['edits']} edits recovered")
        lines += [f"  not in it: {name} ({why})" for name, why in list(r["plan"]["left_out"].items())[:top]]
    return "\n".join(lines)
