"""The demo runs the real pipeline, and the edit does what it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from steer2edit.artefact.verify import Verification
from steer2edit.cli.app import main


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


def test_the_mixtures_own_experts_carry_the_workings_and_others_do_not(tmp_path: Path) -> None:
    arguments = ["demo", "--experts", "--behavior", "reasoning", "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    one = json.loads(result.stdout)["behaviors"]["reasoning"]
    base, masked, opposite, drawn, *edits = one["rows"]
    assert masked["attribute"] < base["attribute"] - 0.2
    assert masked["utility"] > base["utility"] - 0.05
    for row in (opposite, *drawn["draws"]):
        assert row["attribute"] > masked["attribute"] + 0.1
    # no draw is another one again
    assert len({row["kl"] for row in drawn["draws"]}) == len(drawn["draws"]) >= 5
    assert all(edit["kl"] <= masked["kl"] * 1.001 for edit in edits)
    check = one["verified"]
    assert check["ok"] and check["experts"]["selected"] == 0 and check["experts"]["reference_difference"] == 0
    assert "off by bias (exact" in one["exactness"]
    assert Path(one["heatmap"]).read_bytes().startswith(b"\x89PNG")


def test_a_mask_that_does_not_verify_fails_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer2edit.demo import experts

    monkeypatch.setattr(experts, "verify", lambda *_args, **_kwargs: Verification("checkpoint", 1, ("broken",)))
    monkeypatch.setattr(experts, "DRAWS", 1)
    monkeypatch.setattr(experts._Behavior, "edits", lambda _self, _kl: [])
    arguments = ["demo", "--experts", "--behavior", "caution", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "FAILED ['broken']" in result.stdout
