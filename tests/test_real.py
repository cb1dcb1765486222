"""The pipeline on a published model. Fetch it with examples/fetch_model.py and name its parent in STEER2EDIT_MODELS."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import run

from steer2edit.cli.app import main
from steer2edit.data.behavior_file import builtin_questions
from steer2edit.data.everyday import everyday_prompts
from steer2edit.data.prompts import prompt_text
from steer2edit.files.layout import REPORT

pytestmark = pytest.mark.real
MODELS = Path(os.environ.get("STEER2EDIT_MODELS", "models"))


@pytest.fixture(scope="module")
def smollm2() -> Path:
    folder = MODELS / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        pytest.skip(f"{folder} is not there: python examples/fetch_model.py smollm2 {folder}")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _both_cores() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a compile printed, with its report on a dozen of the packaged questions."""
    folder = tmp_path_factory.mktemp("real")
    rows = [{"prompt": prompt_text(q.prompt)} for q in (builtin_questions("concise") or [])[:24]]
    # fewer answers of the model's own than by default: writing them takes longer than everything else
    for use, every in (("neutral", 8), ("background", 5)):
        asked = [{"prompt": prompt_text(prompt)} for prompt in everyday_prompts(use)[::every]]
        (folder / f"{use}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(
        "compile", smollm2, "--behavior", "concise", "--eval", folder / "held.jsonl", "--neutral",
        folder / "neutral.jsonl", "--background", folder / "background.jsonl", "--kl-budget", 0.2, "--dtype", "bfloat16",
        "--told", "none", "--to", "checkpoint", "--to", "lora", "--out", folder / "concise", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return {"out": folder / "concise", **json.loads(result.stdout)}


@pytest.fixture(scope="module")
def compiled(made: dict[str, Any]) -> Path:
    measured = made["measured"]
    chat, prose = (measured["costs"][kind] for kind in ("chat", "prose"))
    assert 0.8 * measured["kl_budget"] <= chat["kl"] <= measured["kl_budget"]
    assert prose["perplexity"] < 1.1 * prose["base_perplexity"]
    out: Path = made["out"]
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


def test_answers_become_shorter_and_neither_steering_nor_a_random_direction_does_that_at_the_same_kl(
    made: dict[str, Any],
) -> None:
    rows = {row["kind"]: row["metrics"] for row in made["evaluation"]["rows"]}
    length = {kind: metrics["length"]["value"] for kind, metrics in rows.items()}
    assert length["edit"] < 0.7 * length["base"]
    assert length["edit"] < 0.85 * min(length["random"], length["steering"])
    page = (made["out"] / "lora" / REPORT).read_text()
    assert page.startswith("<!DOCTYPE html>") and re.search(r"That is more than [^.]*random directions", page)
