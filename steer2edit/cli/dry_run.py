"""``--dry-run`` of compile and emit: what would be read, changed and written. Exit code 1 where something stands in the way."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer2edit.cli.output import columns, print_result
from steer2edit.errors import count_of

if TYPE_CHECKING:
    from steer2edit.architecture import ModelSpec
    from steer2edit.artefact.request import CompileRequest
    from steer2edit.checkpoint import Checkpoint
    from steer2edit.lowering import Writing
    from steer2edit.plan import EditPlan


def dry_run_emit(
    plan: EditPlan,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    to: str,
    out: Path,
    force: bool,
    writing: Writing,
    as_json: bool,
) -> None:
    """Print how much one target writes. Raises what emit would raise before it reads the matrices that it edits."""
    from steer2edit.artefact.emit import check_emit
    from steer2edit.errors import TargetError
    from steer2edit.files.outputs import check_new
    from steer2edit.lowering.disk_use import check_room, disk_use
    from steer2edit.targets import load

    target = load(to)
    resolved = check_emit(plan, checkpoint, spec, to, out)
    check_new(out, force)
    use = disk_use(resolved, to, out, writing, whole_model=target.WHOLE_MODEL)
    problem = ""
    try:
        check_room(use, out)
    except TargetError as error:
        problem = str(error)
    result = {**vars(use), "fits": use.fits, "problems": [problem] if problem else []}

    def render(result: dict[str, Any]) -> str:
        lines = [*_target_lines(result), *(f"Problem: {line}" for line in result["problems"])]
        return "\n".join([*lines, "", "Nothing was written (--dry-run)."])

    print_result(result, as_json, render)
    if problem:
        sys.exit(1)


def dry_run_compile(request: CompileRequest, as_json: bool) -> None:
    """Print what a compile would do; the model is not run."""
    from steer2edit.dry_run import dry_run

    outlook = dry_run(request)
    print_result(outlook.described(), as_json, _render)
    if outlook.problems:
        sys.exit(1)


def _render(result: Mapping[str, Any]) -> str:
    from steer2edit.dry_run import SEARCH_PASSES
    from steer2edit.plan.measured import TEXT_NAMES

    free = f", {_size(result['memory_free'])} free" if result["memory_free"] is not None else ""
    own = f", of which the base writes {result['own_answers']:,} at most, once" if result["own_answers"] else ""
    text = f"{count_of(result['neutral'], 'token', style=',')} of {TEXT_NAMES[result['neutral_kind']]}"
    text += ", which are written once" if result["neutral_own"] else ""
    examples, tokens = (count_of(result[f"{one}s"], one, style=",") for one in ("example", "token"))
    captured = f"{examples}, {tokens}"
    rows = {
        "Memory": f"{_size(result['memory'])} needed{free}; the running model alone takes {_size(result['model'])}",
        "Capture": f"{captured}{own}{_about(result['capture'])}",
        "Plan": f"at most {count_of(result['matrices'], 'matrix', 'matrices')}; reads {_size(result['read'])} once",
        "Strength": f"1 to {SEARCH_PASSES} passes over {text}{_about(result['search'])}",
    }
    lines = columns(rows)
    for one in result["targets"]:
        lines += ["", *_target_lines(one)]
    lines += (
        ["", *(f"May be refused: {refusal}" for refusal in result["may_be_refused"])]
        if result["may_be_refused"]
        else []
    )
    lines += ["", *(f"Problem: {problem}" for problem in result["problems"])] if result["problems"] else []
    return "\n".join([*lines, "", "Nothing was run or written (--dry-run)."])


def _target_lines(one: Mapping[str, Any]) -> list[str]:
    """How much one target reads, changes and writes."""
    copied = ", ".join(
        f"{_size(one[key])} {what}"
        for key, what in (("copied", "copied"), ("shared", "shared with the base by hard links"))
        if one[key]
    )
    rates = ", ".join(
        f"{name} {rate / 1e6:.0f} MB/s (measured on {_size(one['sampled'][name])})"
        for name, rate in one["rates"].items()
    )
    rows = {
        "  Edited": f"at most {count_of(one['tensors'], 'matrix', 'matrices')}, {_size(one['edited'])}",
        "  Rest": copied,
        "  Disk": f"{_size(one['written'])} to write, {_size(one['free'])} free{_about(one['seconds'])}",
        "  Speed": rates,
        "  Memory": f"{_size(one['memory'])} while writing",
    }
    return [f"Target {one['target']}:", *columns(rows)]


def _about(seconds: float | None) -> str:
    return "" if seconds is None else f"; about {seconds:.0f} s" if seconds >= 10 else f"; about {seconds:.1f} s"


def _size(count: int) -> str:
    if count >= 1e8:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
