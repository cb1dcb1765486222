"""``import``: reads what others made, steering vectors or finished edits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import click

from steer2edit.cli.command import command
from steer2edit.cli.flags import Flag, FlagGroup, flag
from steer2edit.cli.options import JsonFlags, ReplaceFlags, RevisionFlags, read_plan
from steer2edit.cli.output import print_result
from steer2edit.cli.plan import print_plan
from steer2edit.importers.source import Reading
from steer2edit.options import option, options_of


@dataclass(frozen=True)
class ReadingFlags(FlagGroup):
    """How a file's entries become layers: the fields of ``Reading``."""

    heading: ClassVar[str] = "Source"

    reading: Reading

    @classmethod
    def params(cls) -> list[Flag]:
        """The flags of ``Reading``."""
        return [flag(one, cls.heading) for one in options_of(Reading)]

    @classmethod
    def take(cls, values: dict[str, Any]) -> ReadingFlags:
        """The reading, whose values are taken out of ``values``."""
        return cls(Reading(**{one.name: values.pop(one.name) for one in options_of(Reading)}))


@dataclass(frozen=True)
class ImportFlags(RevisionFlags):
    """The base that edits belong to."""

    model: str | None = option(
        None, "Base that finished edits belong to; vectors are checked against it.", metavar="MODEL"
    )


@dataclass(frozen=True)
class DifferenceFlags(FlagGroup):
    """What is made of two sources."""

    heading: ClassVar[str] = "Source"

    difference: bool = option(
        False, "Subtract the edits of MINUS from those of SOURCE, as contrastive weight steering does; needs --model."
    )

    def check(self, minus: str | None, model: str | None) -> None:
        """Raise UsageError unless a second source and --difference come together."""
        if self.difference and minus is None:
            raise click.UsageError("--difference takes two sources: SOURCE and MINUS")
        if minus is not None and not self.difference:
            raise click.UsageError("two sources are read for their difference alone: add --difference")
        if self.difference and model is None:
            raise click.UsageError("--difference is one of finished edits: name their base with --model")


@dataclass(frozen=True)
class ImportOut(FlagGroup):
    """Where the result goes."""

    heading: ClassVar[str] = "Output"

    out: Path = option(
        ..., "File to write: *.vectors.safetensors for vectors, *.plan.safetensors for edits.", "-o", "--out"
    )


@command(
    "import",
    reading=ReadingFlags,
    difference=DifferenceFlags,
    model_flags=ImportFlags,
    output=ImportOut,
    replace=ReplaceFlags,
    printed=JsonFlags,
)
@click.argument("source")
@click.argument("minus", required=False)
def import_(
    source: str,
    minus: str | None,
    reading: ReadingFlags,
    difference: DifferenceFlags,
    model_flags: ImportFlags,
    output: ImportOut,
    replace: ReplaceFlags,
    printed: JsonFlags,
) -> None:
    """Read steering vectors or finished edits that were made elsewhere.

    Vectors: control-vector GGUF (repeng, llama.cpp), the steering-vectors library's SteeringVector, Steer2Edit's direction
    files, .pt, .npz, .npy and .safetensors by layer, SAELens folders. Edits (with --model): Steer2Edit's edit packs, PEFT and
    GGUF LoRA adapters. SOURCE may be a repository on the Hub. With --difference,
    SOURCE and MINUS are adapters or plans of one base.
    """
    from steer2edit.capture.vectors import Vectors
    from steer2edit.files.hub import fetch
    from steer2edit.importers import read

    difference.check(minus, model_flags.model)
    if minus is not None:
        _import_difference((source, minus), reading.reading, model_flags, output.out, replace, printed)
        return
    content = read(fetch(source), reading.reading)
    replace.check(output.out, "vectors" if isinstance(content, Vectors) else "plan")
    if not isinstance(content, Vectors):
        if model_flags.model is None:
            raise click.UsageError(f"{source} holds finished edits: name their base with --model")
        plan = content.plan(*model_flags.open(model_flags.model))
        plan.save(output.out)
        print_plan(plan, output.out, printed.as_json)
        return
    if model_flags.model is not None:
        content.check(model_flags.open(model_flags.model)[1])
    content.save(output.out)
    result = {
        "vectors": str(output.out),
        "source": dict(content.source),
        "norms": {place: float(vector.norm()) for place, vector in content.directions.items()},
    }
    print_result(result, printed.as_json, _render)


def _import_difference(
    sources: tuple[str, str],
    reading: Reading,
    model_flags: ImportFlags,
    out: Path,
    replace: ReplaceFlags,
    printed: JsonFlags,
) -> None:
    """Write the difference of two sets of edits, each an adapter, another source of edits, or a plan."""
    from steer2edit.capture.vectors import Vectors
    from steer2edit.errors import DataError
    from steer2edit.files.hub import fetch
    from steer2edit.importers import read
    from steer2edit.importers.difference import difference

    replace.check(out, "plan")
    assert model_flags.model is not None  # checked before
    checkpoint, spec = model_flags.open(model_flags.model)
    plans = []
    for source in sources:
        if source.endswith(".plan.safetensors"):
            plan = read_plan(source)
            plan.check_base(checkpoint)
        else:
            content = read(fetch(source), reading)
            if isinstance(content, Vectors):
                raise DataError(f"{source} holds steering vectors; a difference is one of finished edits")
            plan = content.plan(checkpoint, spec)
        plans.append(plan)
    plan = difference(*plans)
    plan.save(out)
    print_plan(plan, out, printed.as_json)


def _render(result: dict[str, Any]) -> str:
    source = result["source"]
    lines = [f"{source['format']}{', made for ' + source['model'] if source.get('model') else ''}", ""]
    lines += [
        "Norm of the vector at each place:",
        *(f"  {place:<14} {norm:.4g}" for place, norm in result["norms"].items()),
    ]
    if source.get("left_out"):
        lines.append(f"  left out, because no block writes it: {', '.join(source['left_out'])}")
    command = f"  steer2edit compile MODEL --vectors {result['vectors']} --out FOLDER"
    return "\n".join([*lines, "", f"Written: {result['vectors']}", "", "Next:", command])
