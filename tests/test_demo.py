"""The demo runs the real pipeline, and the edit does what it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from steer2edit.cli import main


@pytest.mark.parametrize("behavior", ["truthfulness", "caution"])
def test_the_edit_raises_the_attribute_and_keeps_the_utility(tmp_path: Path, behavior: str) -> None:
    arguments = ["demo", "--behavior", behavior, "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    one = json.loads(result.stdout)["behaviors"][behavior]
    rows = {row["model"]: row for row in one["rows"]}
    base, edited = rows["base"], rows["edited checkpoint"]
    assert edited["attribute"] > base["attribute"] + 0.2
    assert edited["utility"] > base["utility"] - 0.05
    assert all(check["ok"] for check in one["verified"].values())
    assert len(one["samples"]) == 3
    assert all(Path(plot).read_bytes().startswith(b"\x89PNG") for plot in one["heatmaps"])
    text = CliRunner().invoke(main, ["demo", "--behavior", behavior, "--out", str(tmp_path / "out")])
    assert text.exit_code == 2 and "--force" in text.stderr


def test_an_unknown_behavior_names_the_known_ones(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["demo", "--behavior", "humour", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "truthfulness" in result.stderr
