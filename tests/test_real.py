"""The pipeline on a published model. Fetch it with examples/fetch_model.py and name its parent in STEER2EDIT_MODELS."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from steer2edit.cli import main

pytestmark = pytest.mark.real
MODELS = Path(os.environ.get("STEER2EDIT_MODELS", "models"))


@pytest.fixture(scope="module")
def smollm2() -> Path:
    folder = MODELS / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        pytest.skip(f"{folder} is not there: python examples/fetch_model.py smollm2 {folder}")
    return folder


@pytest.fixture(scope="module")
def compiled(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "concise"
    arguments = [
        "--behavior",
        "concise",
        "--dtype",
        "bfloat16",
        "--to",
        "checkpoint",
        "--to",
        "lora",
        "--no-report",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(main, ["compile", str(smollm2), *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)["measured"]
    assert 0.8 * measured["kl_budget"] <= measured["kl"] <= measured["kl_budget"]
    assert measured["perplexity"] < 1.1 * measured["base_perplexity"]
    return out


@pytest.mark.parametrize("target", ["checkpoint", "lora"])
def test_the_artefact_verifies(compiled: Path, smollm2: Path, target: str) -> None:
    arguments = ["verify", str(compiled / target), "--base", str(smollm2), "--json"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)["numbers"]
    assert numbers["effect"] > 0.5
    if target == "lora":
        assert numbers["difference"] <= 1e-4


def test_answers_become_shorter_and_a_random_direction_does_not_do_that(
    compiled: Path, smollm2: Path, tmp_path: Path
) -> None:
    plan = compiled / "lora" / "steer2edit" / "plan.safetensors"
    arguments = [
        "eval", str(smollm2), str(plan), "--behavior", "concise", "--limit", "12", "--max-new-tokens", "80",
        "--baselines", "--draws", "1", "--dtype", "bfloat16", "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = {row["kind"]: row for row in json.loads(result.stdout)["rows"]}
    length = {kind: row["metrics"]["length"]["value"] for kind, row in rows.items()}
    assert length["edit"] < 0.7 * length["base"]
    assert length["edit"] < 0.85 * min(length[kind] for kind in ("random", "shuffled", "whole", "steering"))
