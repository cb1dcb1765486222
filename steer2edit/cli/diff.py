"""``diff`` and ``revert``: what was changed in a checkpoint, and its undoing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from steer2edit.cli.options import PATH, force_option, json_option, print_result, progress_bar


@click.command()
@click.argument("base")
@click.argument("edited")
@click.option("-o", "--out", type=PATH, help="Write the recovered plan here, *.plan.safetensors.")
@click.option("--max-rank", type=click.IntRange(1), default=32, show_default=True, help="Ranks above it are not low.")
@click.option("--top", type=click.IntRange(0), default=30, show_default=True, help="Tensors to list.")
@json_option
def diff(base: str, edited: str, out: Path | None, max_rank: int, top: int, as_json: bool) -> None:
    """Every tensor in which EDITED differs from BASE, and the rank of the difference.

    Works on checkpoints made by any tool, however they are divided among shards. Reads each file, loads no model.
    """
    from steer2edit.checkpoint import open_checkpoint
    from steer2edit.diff.difference import compare, fused_parts, recover_plan
    from steer2edit.errors import ArchitectureError, PlanError, first_line

    ours, theirs = open_checkpoint(base), open_checkpoint(edited)
    spec: Any = None
    unknown = ""
    try:
        from steer2edit.architecture import read_spec

        spec = read_spec(ours)
    except ArchitectureError as error:
        unknown = first_line(error)
    found = compare(ours, theirs, fused_parts(spec), max_rank=max_rank, progress=progress_bar())
    result: dict[str, Any] = {
        **{key: value for key, value in vars(found).items() if key != "tensors"},
        "tensors": [_described(item) for item in found.tensors],
        "plan": None,
    }
    if out is not None:
        if spec is None:
            raise PlanError(f"no plan can be recovered for a layout that is not understood: {unknown}")
        plan, left_out = recover_plan(found, ours, spec)
        plan.save(out)
        result["plan"] = {"file": str(out), "edits": len(plan.edits), "left_out": left_out}
    print_result(result, as_json, lambda r: _render(r, top))


@click.command()
@click.argument("edited", type=PATH)
@click.option("--base", required=True, help="The folder or Hub id that EDITED was made from.")
@click.option("--revision", help="Branch, tag or commit of a Hub base.")
@click.option("-o", "--out", type=PATH, help="Folder of the result.  [default: EDITED itself, replaced when complete]")
@click.option("--unproven", is_flag=True, help="Restore whatever differs, without a receipt that vouches for it.")
@json_option
@force_option
def revert(
    edited: Path, base: str, revision: str | None, out: Path | None, unproven: bool, as_json: bool, force: bool
) -> None:
    """Give EDITED its base's bytes again, after its receipt has proved that they are."""
    from steer2edit.artefact.revert import revert as revert_folder

    done = revert_folder(edited, base, out, revision=revision, unproven=unproven, force=force, progress=progress_bar())

    def render(r: dict[str, Any]) -> str:
        proof = "each proved by the receipt" if r["proven"] else "without a receipt's proof"
        lines = [f"{r['folder']}: {len(r['tensors'])} tensors restored, {proof}"]
        lines += [f"  {name} still differs: another shape or dtype, or not in both" for name in r["remaining"]]
        return "\n".join(lines)

    print_result({**asdict(done), "folder": str(done.folder)}, as_json, render)


def _described(item: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(item).items() if key not in {"factors", "delta"}}


def _render(r: dict[str, Any], top: int) -> str:
    from tabulate import tabulate

    lines = [f"{len(r['tensors'])} tensors differ, {r['same']} are the same"]
    rows = []
    for item in r["tensors"][:top]:
        matrix = item["floor"] > 0
        rank = "-" if not matrix else "not low" if item["rank"] is None else item["rank"]
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
        lines.append(f"{len(r['dtypes'])} tensors are stored in another dtype: {', '.join(pairs)}")
    lines += [f"{name}: shape {list(a)} -> {list(b)}" for name, (a, b) in r["shapes"].items()]
    for key, where in (("only_base", "the base"), ("only_edited", "the edited checkpoint")):
        if r[key]:
            lines.append(
                f"only in {where}: {', '.join(r[key][:6])}{f' and {len(r[key]) - 6} more' if len(r[key]) > 6 else ''}"
            )
    if r["files"]:
        lines.append(f"other files that differ: {', '.join(r['files'])}")
    if r["plan"]:
        lines.append(f"{r['plan']['file']}: {r['plan']['edits']} edits recovered")
        lines += [f"  not in it: {name} ({why})" for name, why in list(r["plan"]["left_out"].items())[:top]]
    return "\n".join(lines)
