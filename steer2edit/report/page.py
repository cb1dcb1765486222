"""The report page: one HTML file that shows what an edit does and what it changed.

The page loads nothing and runs nothing. Every text from data is escaped where it enters a tag.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steer2edit import __version__
from steer2edit.artefact.receipt import read_receipt
from steer2edit.data.contrast import Example
from steer2edit.evaluation.evaluate import Evaluation
from steer2edit.files.atomic import write_bytes, write_text
from steer2edit.files.layout import REPORT
from steer2edit.notices import notice
from steer2edit.plan import EditPlan
from steer2edit.report.changes import changed, loading, reproduction
from steer2edit.report.data import shown_data
from steer2edit.report.drawing import Drawing
from steer2edit.report.figures import of_plan
from steer2edit.report.markup import STYLE, figures, section, tag
from steer2edit.report.measured import answers, candidates, limits, selection
from steer2edit.report.tradeoff import tradeoff
from steer2edit.report.verdict import verdict_on

_CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Report:
    """The contents of a report: a plan, and what is known besides.

    ``trials`` and ``settings`` are a study's, as ``tune.StudyResult.described`` has them; ``receipt`` is an artefact's;
    ``command`` is the command line of the run. ``examples`` are the data that the plan was made of.
    """

    plan: EditPlan
    evaluation: Evaluation | None = None
    receipt: Mapping[str, Any] | None = None
    trials: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    examples: Sequence[Example] = ()


def write_pages(
    plan: EditPlan, evaluation: Evaluation, folders: Iterable[Path], examples: Sequence[Example] = ()
) -> None:
    """Write the report page of a compile into each artefact's folder, with some of its ``examples``.

    Without matplotlib, no page is written.
    """
    if not importlib.util.find_spec("matplotlib"):
        notice(f"no {REPORT} is written: its figures need matplotlib (pip install 'steer2edit[plots]')")
        return
    for folder in folders:
        write_report(Report(plan, evaluation, receipt=read_receipt(folder), examples=examples), folder / REPORT)


def write_report(report: Report, path: Path, pngs: bool = False) -> list[Path]:
    """Write the page and, with ``pngs``, each figure as ``<stem>-<name>.png`` beside it. Gives the files.

    Raises Steer2EditError without matplotlib, or where a file cannot be written.
    """
    drawings = _drawings(report)
    write_text(path, _page(report, drawings), "report")
    written = [path]
    for drawing in drawings if pngs else ():
        file = path.with_name(f"{path.stem}-{drawing.name}.png")
        write_bytes(file, drawing.png(), "picture")
        written.append(file)
    return written


def render_page(report: Report) -> str:
    """The report as one HTML text. Raises Steer2EditError without matplotlib."""
    return _page(report, _drawings(report))


def verdict(report: Report) -> str:
    """The result in words: how far the edit moves the behaviour, and how far control edits do."""
    return verdict_on(report.plan, report.evaluation, report.settings)


def _drawings(report: Report) -> list[Drawing]:
    scatter = tradeoff(report.evaluation, report.trials, report.settings)
    return [*([] if scatter is None else [scatter]), *of_plan(report.plan)]


def _page(report: Report, drawings: Sequence[Drawing]) -> str:
    name = f"{report.plan.data.get('name') or 'edits'} in {report.plan.base.name}"
    plan, evaluation = report.plan, report.evaluation
    sections = (
        section("tradeoff", "Trade-off", figures(one for one in drawings if one.name == "tradeoff")),
        section("candidates", "Candidates", *candidates(evaluation)),
        section("answers", "Before and after", *answers(evaluation)),
        section("data", "Where the data came from", *shown_data(plan, report.examples)),
        section("changed", "What changed", *changed(plan, [one for one in drawings if one.name != "tradeoff"])),
        section("selection", "Selection", *selection(report.trials, report.settings, evaluation)),
        section("load", "Load it", *loading(plan, report.receipt)),
        section(
            "reproduce",
            "Reproduce it",
            *reproduction(plan, evaluation, report.receipt, report.settings, report.command),
        ),
        section("limits", "Limits", *limits(plan, evaluation)),
    )
    head = (
        '<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_CSP}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"{tag('title', name)}\n<style>{STYLE}</style>"
    )
    header = tag(
        "header",
        tag("p", "steer2edit report", class_="eyebrow"),
        tag("h1", name),
        tag("p", verdict(report), class_="verdict"),
    )
    footer = tag("footer", f"Made by steer2edit {__version__}. This file loads nothing from the network.")
    body = "\n".join([header, tag("main", *(one for one in sections if one)), footer])
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
