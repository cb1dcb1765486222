"""``import``: reads what others made, steering vectors or finished edits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import click

from steer2edit.cli.command import command
from steer2edit.cli.flags import Flag, FlagGroup, flag
from steer2edit.cli.options import JsonFlags, ReplaceFlags, RevisionFlags
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

    model: str | None = option(None, "Base that finished edits belong to; vectors are checked against it.")


@dataclass(frozen=True)
class ImportOut(FlagGroup):
    """Where the result goes."""

    heading: ClassVar[str] = "Output"

    out: Path = option(
        ..., "File to write: *.vectors.safetensors for vectors, *.plan.safetensors for edits.", "-o", "--out"
    )


@command(
    "import", reading=ReadingFlags, model_flags=ImportFlags, output=ImportOut, replace=ReplaceFlags, printed=JsonFlags
)
@click.argument("source")
def import_(
    source: str,
    reading: ReadingFlags,
    model_flags: ImportFlags,
    output: ImportOut,
    replace: ReplaceFlags,
    printed: JsonFlags,
) -> None:
    """Read steering vectors or finished edits that were made elsewhere.

    Vectors: control-vector GGUF (repeng, llama.cpp), the steering-vectors library's SteeringVector, Steer2Edit's direction
    files, .pt, .npz, .npy and .safetensors by layer, SAELens folders. Edits (with --model): Steer2Edit's edit packs, PEFT and
    GGUF LoRA adapters. SOURCE may be a repository on the Hub.
    """
    from steer2edit.capture.vectors import Vectors
    from steer2edit.files.hub import fetch
    from steer2edit.importers import read

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
