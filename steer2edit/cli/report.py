"""``report``: the page of an edit or a study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import click

from steer2edit.cli.command import command
from steer2edit.cli.flags import PATH, FlagGroup
from steer2edit.cli.options import ReplaceFlags
from steer2edit.options import option


@dataclass(frozen=True)
class PageFlags(FlagGroup):
    """The page, and what goes into it."""

    heading: ClassVar[str] = "Output"

    out: Path = option(..., "Page to write, *.html.", "-o", "--out")
    evaluation: Path | None = option(None, "Evaluation of this plan that eval -o wrote.")
    data: str | None = option(
        None, "Data of the plan (a file, a folder or a behaviour), to show eight pairs of it.", metavar="DATA|NAME"
    )
    pngs: bool = option(False, "Write each figure as a PNG file too, beside the page.", "--png")


@command(page=PageFlags, replace=ReplaceFlags)
@click.argument("source", metavar="STUDY|PLAN|DIR", type=PATH)
def report(source: Path, page: PageFlags, replace: ReplaceFlags) -> None:
    """Write one page that shows what an edit does: trade-off, changes, answers, and how to load and reproduce it."""
    from dataclasses import replace as replaced

    from steer2edit.data.behavior import Behavior
    from steer2edit.data.behavior_file import is_behavior
    from steer2edit.report.data import check_data
    from steer2edit.report.load import read_report
    from steer2edit.report.page import write_report

    replace.check(page.out, "report")
    found = read_report(source, page.evaluation)
    if page.data is not None:
        read = Behavior.named if is_behavior(page.data) else Behavior.from_data
        examples = read(page.data).examples
        check_data(found.plan, examples)
        found = replaced(found, examples=examples)
    write_report(found, page.out, pngs=page.pngs)
    click.echo(str(page.out))
