"""``push``: publishes an artefact or a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import click

from steer2edit.cli.command import command
from steer2edit.cli.flags import PATH, FlagGroup
from steer2edit.cli.options import JsonFlags
from steer2edit.cli.output import print_result
from steer2edit.errors import count_of
from steer2edit.options import option


@dataclass(frozen=True)
class PushFlags(FlagGroup):
    """What is uploaded, and how."""

    heading: ClassVar[str] = "Upload"

    private: bool = option(False, "Create the repository as private; refuse one that is public.")
    dry_run: bool = option(False, "List what would be uploaded, and upload nothing. Needs no network.")
    base_model: str | None = option(
        None, "Hub id of the base, for the card of an artefact compiled from a folder.", metavar="MODEL"
    )
    licence: str | None = option(None, "Licence for the card, in place of the base's.", "--license")
    include: tuple[str, ...] = option(
        (), "Upload these files of the folder too, such as 'images/*'. Repeatable.", metavar="PATTERN"
    )


@command(upload=PushFlags, printed=JsonFlags)
@click.argument("source", metavar="DIR|PLAN", type=PATH)
@click.argument("repository", metavar="USER/NAME")
def push(source: Path, repository: str, upload: PushFlags, printed: JsonFlags) -> None:
    """Upload an artefact's folder, or a plan, to the Hub, with its card. Run it again to resume."""
    from steer2edit.publish import push as push_artefact

    result = push_artefact(
        source,
        repository,
        private=upload.private,
        dry_run=upload.dry_run,
        base_model=upload.base_model,
        licence=upload.licence,
        include=upload.include,
    )
    print_result(result, printed.as_json, _render)


def _render(result: dict[str, Any]) -> str:
    lines = [f"{_size(entry['bytes']):>10}  {entry['file']}" for entry in result["files"]]
    lines += [f"  left out  {name}: {reason}" for name, reason in result["left_out"].items()]
    lines += [f"      note  {note}" for note in result["notes"]]
    total = f"{count_of(len(result['files']), 'file')}, {_size(result['bytes'])}"
    return "\n".join([*lines, f"{total}: {result['url'] or 'nothing was uploaded (--dry-run)'}"])


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} GB"
