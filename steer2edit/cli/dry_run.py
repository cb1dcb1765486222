"""``--dry-run`` of compile and emit: what would be read, changed and written. Exit code 1 where something stands in the way."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer2edit.cli.output import print_result

if TYPE_CHECKING:
    from steer2edit.artefact.request import CompileRequest


def dry_run_emit(
    plan: Any, checkpoint: Any, spec: Any, to: str, out: Path, force: bool, writing: Any, as_json: bool
) -> None:
    """Print how much one target writes."""
    from steer2edit.dry_run import render_disk_use
    from steer2edit.errors import TargetError
    from steer2edit.files.outputs import check_new
    from steer2edit.lowering import resolve
    from steer2edit.lowering.disk_use import check_room, disk_use
    from steer2edit.targets import load

    target = load(to)
    check_new(out, force)
    found = disk_use(resolve(plan, checkpoint, spec), to, out, writing, whole_model=target.WHOLE_MODEL)
    problem = ""
    try:
        check_room(found, out)
    except TargetError as error:
        problem = str(error)
    result = {**vars(found), "fits": found.fits, "problems": [problem] if problem else []}

    def render(result: dict[str, Any]) -> str:
        lines = [render_disk_use(result), *(f"PROBLEM   {line}" for line in result["problems"])]
        return "\n".join([*lines, "nothing was written (--dry-run)"])

    print_result(result, as_json, render)
    if problem:
        sys.exit(1)


def dry_run_compile(request: CompileRequest, as_json: bool) -> None:
    """Print what a compile would do; the model is not run."""
    from steer2edit.dry_run import describe, dry_run, render

    found = dry_run(request)
    print_result(describe(found), as_json, render)
    if found.problems:
        sys.exit(1)
