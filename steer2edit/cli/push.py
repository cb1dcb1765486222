"""The command that publishes: push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from steer2edit.cli.options import PATH, json_option, print_result


@click.command()
@click.argument("source", metavar="DIR|PLAN", type=PATH)
@click.argument("repository", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Create the repository as private; refuse one that is public.")
@click.option("--dry-run", is_flag=True, help="List what would be sent, and send nothing. Needs no network.")
@click.option("--base-model", help="The base's id on the Hub, for the card of an artefact compiled from a folder.")
@click.option("--license", "licence", help="The licence for the card, instead of the base's.")
@click.option(
    "--include", multiple=True, help="Send these files of the folder too, such as 'images/*'; may be repeated."
)
@json_option
def push(source: Path, repository: str, as_json: bool, **given: Any) -> None:
    """Upload an artefact's folder, or a plan, to the Hub, with its card. Run it again to resume."""
    from steer2edit.publish import push as push_artefact

    result = push_artefact(source, repository, **given)
    print_result(result, as_json, _render)


def _render(result: dict[str, Any]) -> str:
    lines = [f"{_size(entry['bytes']):>10}  {entry['file']}" for entry in result["files"]]
    lines += [f"  left out  {name}: {reason}" for name, reason in result["left_out"].items()]
    lines += [f"      note  {note}" for note in result["notes"]]
    total = f"{len(result['files'])} files, {_size(result['bytes'])}"
    return "\n".join([*lines, f"{total}: {result['url'] or 'nothing was sent (--dry-run)'}"])


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} GB"
