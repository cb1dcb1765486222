"""Documents that are made from data are up to date."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_families_is_what_its_script_makes() -> None:
    made = runpy.run_path(str(DOCS / "make_families.py"))["page"]()
    assert (DOCS / "families.md").read_text(encoding="utf-8") == made, "run python docs/make_families.py"
