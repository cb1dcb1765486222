"""``demo``: the pipeline on an embedded model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from steer2edit.cli.command import command
from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.options import ForceFlags, JsonFlags, progress_bar, quieten_transformers
from steer2edit.cli.output import print_result
from steer2edit.options import option


@dataclass(frozen=True)
class DemoFlags(FlagGroup):
    """What is shown, and where it goes."""

    heading: ClassVar[str] = "Output"

    behaviors: tuple[str, ...] = option(
        (),
        "Behaviour: reasoning, truthfulness or caution; all three without it. Repeatable.",
        "--behavior",
        metavar="NAME",
    )
    experts: bool = option(False, "Use the embedded mixture: rank its experts, and switch some off.")
    out: Path = option(Path("steer2edit-demo"), "Folder that everything is written into.", "-o", "--out")


@command(shown=DemoFlags, force=ForceFlags, printed=JsonFlags)
def demo(shown: DemoFlags, force: ForceFlags, printed: JsonFlags) -> None:
    """Run the whole pipeline on an embedded tiny model, in seconds."""
    quieten_transformers()
    if shown.experts:
        from steer2edit.demo.experts import render, run
    else:
        from steer2edit.demo.run import render, run
    result = run(shown.out, behaviors=shown.behaviors, force=force.force, progress=progress_bar())
    print_result(result, printed.as_json, render)
    if not result["ok"]:
        sys.exit(1)
