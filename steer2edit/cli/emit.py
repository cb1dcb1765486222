"""The commands on artefacts: ``emit`` and ``verify``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import click

from steer2edit.cli.command import command
from steer2edit.cli.dry_run import dry_run_emit
from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.options import (
    ForceFlags,
    JsonFlags,
    ModelFlags,
    RevisionFlags,
    TargetFlags,
    WritingFlags,
    progress_bar,
    read_plan,
)
from steer2edit.cli.output import artefact_lines, closing_lines, print_result
from steer2edit.errors import count_of
from steer2edit.options import option


@dataclass(frozen=True)
class EmitFlags(FlagGroup):
    """What is written, and where."""

    heading: ClassVar[str] = "Output"

    to: str = option(..., "Format of the artefact, one of the targets below.", metavar="TARGET")
    out: Path = option(..., "Folder of the artefact.", "-o", "--out")

    @classmethod
    def listed(cls) -> dict[str, list[tuple[str, str]]]:
        """The targets, each with its summary."""
        return TargetFlags.listed()


@dataclass(frozen=True)
class VerifyFlags(FlagGroup):
    """How far to go."""

    heading: ClassVar[str] = "Check"

    base: str | None = option(
        None,
        "Base model, folder or Hub id, if it is not where the receipt, or the note that emit left on this computer, says.",
        metavar="MODEL",
    )
    level: Literal["bytes", "numbers"] = option(
        "numbers", "Compare bytes only, or also the logits of base and plan with those of the artefact."
    )


@command(output=EmitFlags, writing=WritingFlags, revision=RevisionFlags, force=ForceFlags, printed=JsonFlags)
@click.argument("plan_file", metavar="PLAN")
@click.argument("model")
def emit(
    plan_file: str,
    model: str,
    output: EmitFlags,
    writing: WritingFlags,
    revision: RevisionFlags,
    force: ForceFlags,
    printed: JsonFlags,
) -> None:
    """Write a plan, from here or from the Hub, as a checkpoint, an adapter or a control vector. Runs no model."""
    from steer2edit.artefact.emit import emit as emit_plan

    checkpoint, spec = revision.open(model)
    edits = read_plan(plan_file).moved_to(checkpoint, spec)
    if writing.dry_run:
        dry_run_emit(edits, checkpoint, spec, output.to, output.out, force.force, writing.writing(), printed.as_json)
        return
    lowering = emit_plan(
        edits,
        checkpoint,
        spec,
        output.to,
        output.out,
        force=force.force,
        writing=writing.writing(),
        progress=progress_bar(),
    )
    result = {
        "artefact": str(output.out),
        "exactness": lowering.exactness,
        "changed": len(lowering.changes),
        "notes": lowering.notes,
    }

    def render(_: Any) -> str:
        artefacts = {output.to: output.out}
        lines = [f"{count_of(len(lowering.changes), 'tensor')} changed.", *lowering.notes, "", "Written:"]
        lines += artefact_lines(artefacts, {output.to: lowering.exactness})
        return "\n".join([*lines, "", *closing_lines(artefacts, model, revision.revision)])

    print_result(result, printed.as_json, render)


@command(check=VerifyFlags, model_flags=ModelFlags, printed=JsonFlags)
@click.argument("folder", metavar="DIR")
def verify(folder: str, check: VerifyFlags, model_flags: ModelFlags, printed: JsonFlags) -> None:
    """Check an artefact, here or on the Hub, against its base and plan. Exit code 1 if a check fails."""
    from dataclasses import asdict

    from steer2edit.artefact.verify import verify as verify_artefact
    from steer2edit.files.hub import fetch
    from steer2edit.report.tables import render_verification

    base = check.base
    if model_flags.revision is not None:
        if base is None:
            raise click.UsageError("--revision is that of --base; without --base the receipt names the revision")
        base = base if Path(base).exists() else f"{base}@{model_flags.revision}"
    result = verify_artefact(
        fetch(folder),
        base,
        numbers=check.level == "numbers",
        runtime=model_flags.runtime(auto="float32"),
        progress=progress_bar(),
    )
    print_result({"ok": result.ok, **asdict(result)}, printed.as_json, lambda _: render_verification(result))
    if not result.ok:
        sys.exit(1)
