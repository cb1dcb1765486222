"""Results on stdout: as JSON, or as text with the next commands to type."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from steer2edit.cli.foreign_warnings import tell_warnings
from steer2edit.errors import printable
from steer2edit.notices import notices


def print_result(result: Any, as_json: bool, render: Callable[[Any], str]) -> None:
    """A result on stdout, as JSON or as text. JSON objects also hold the run's notices, where there are any."""
    tell_warnings()
    texts = notices()
    if as_json and texts and isinstance(result, dict):
        result = {**result, "notices": texts}
    click.echo(json.dumps(result, indent=1, default=list) if as_json else printable(render(result)))


def artefact_lines(artefacts: Mapping[str, Path], exactness: Mapping[str, str]) -> list[str]:
    """One line for each artefact that was made: its target, its folder, how exact it is."""
    width = max(map(len, artefacts), default=0)
    lines = [f"  {target:<{width}}  {folder}  ({exactness[target]})" for target, folder in artefacts.items()]
    if len(artefacts) > 1:
        lines.append("  (several targets: each has its own folder inside the one that --out names)")
    return lines


def closing_lines(artefacts: Mapping[str, Path], model: str, revision: str | None = None) -> list[str]:
    """What to do next with artefacts that were written: commands, and the lines that load each."""
    from steer2edit.artefact.model_card import snippet_of
    from steer2edit.artefact.receipt import read_receipt

    lines = ["Next:", *next_lines(artefacts, model, revision)]
    for folder in artefacts.values():
        snippet = snippet_of(read_receipt(folder), folder=str(folder), base_folder=model)
        lines += ["", f"Load {folder}:", *(f"  {line}" for line in snippet.lines)]
        lines += [f"  ({snippet.remark})"] if snippet.remark else []
    return lines


def next_lines(artefacts: Mapping[str, Path], model: str, revision: str | None = None) -> list[str]:
    """The commands to type next, which work as they stand."""
    # the receipt names a base on the Hub; one that is a folder must be named again
    base = f" --base {shlex.quote(model)}" if Path(model).expanduser().exists() else ""
    lines = [f"  steer2edit verify {shlex.quote(str(folder))}{base}" for folder in artefacts.values()]
    first = next(iter(artefacts.values()))
    lines.append(f"  steer2edit show {shlex.quote(str(first))}")
    chat = next((folder for target, folder in artefacts.items() if target in ("checkpoint", "lora")), None)
    if chat is not None:
        version = f" --revision {shlex.quote(revision)}" if revision and not base else ""
        lines.append(f"  steer2edit chat {shlex.quote(model)} {shlex.quote(str(chat))}{version}")
    return lines


def columns(rows: Mapping[str, str]) -> list[str]:
    """Labelled lines, the labels in one column; empty texts are left out."""
    width = max((len(label) for label, text in rows.items() if text), default=0)
    return [f"{label:<{width}}  {text}" for label, text in rows.items() if text]
