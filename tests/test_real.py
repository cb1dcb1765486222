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


def test_answers_become_shorter(compiled: Path, smollm2: Path) -> None:
    from steer2edit.architecture import read_spec
    from steer2edit.checkpoint import open_checkpoint
    from steer2edit.encoding import render_prompt
    from steer2edit.evaluation.evaluate import generate
    from steer2edit.model import Runtime, load_model

    prompts = [
        "What is the largest planet in the solar system?",
        "How does a bicycle stay upright?",
        "Why do leaves change colour in autumn?",
        "What should I keep in mind when buying a used car?",
        "Who painted the Mona Lisa?",
        "How can I sleep better at night?",
        "What is a good way to learn a new language?",
        "Explain what inflation is.",
    ]
    lengths = []
    for folder in (smollm2, compiled / "checkpoint"):
        checkpoint = open_checkpoint(folder)
        loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype="bfloat16"))
        texts = [render_prompt(prompt, loaded.tokenizer) for prompt in prompts]
        answers = generate(loaded, texts, max_new_tokens=100, add_special_tokens=False)
        lengths.append(sum(map(len, answers)))
    assert lengths[1] < 0.9 * lengths[0]
