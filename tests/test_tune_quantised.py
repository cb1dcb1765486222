"""``tune`` and ``eval`` of a quantised model: what edits are computed from, and what the knee is written beside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS, run
from quantised_models import GPTQ, gptq, quantised_copy
from safetensors.torch import save_file

from steer2edit.architecture import read_spec
from steer2edit.artefact.verify import verify
from steer2edit.checkpoint import open_checkpoint
from steer2edit.cli.options import ModelFlags
from steer2edit.evaluation import baselines
from steer2edit.plan import EditPlan
from steer2edit.runtime.model import LoadedModel, load_model
from steer2edit.scoring.scores import Scoring

HELD = [{**row, "prompt": f"{row['prompt']} {word}"} for row in ROWS for word in ("old", "new")]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The tiny llama in GPTQ's layout."""
    folder = tmp_path_factory.mktemp("quantised") / "gptq"
    quantised_copy(tiny_llama, folder, GPTQ, gptq)
    return folder


@pytest.fixture
def arguments(quantised: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A search on the quantised model, which runs here as the numbers that it stands for: no library of the format is needed."""
    plain = tmp_path / "plain"
    shutil.copytree(tiny_llama, plain)
    checkpoint = open_checkpoint(quantised)
    save_file(
        {name: checkpoint.read(name).clone() for name in checkpoint.tensors},
        plain / "model.safetensors",
        {"format": "pt"},
    )

    def load(_self: ModelFlags, *_: Any) -> LoadedModel:
        running = open_checkpoint(plain)
        return load_model(running, read_spec(running))

    monkeypatch.setattr(ModelFlags, "load", load)
    for name, rows in (("pairs", ROWS), ("held", HELD)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "n.txt").write_text("the old cat sees a small bird and the river runs . " * 24)
    return [
        "tune", quantised, "--data", tmp_path / "pairs.jsonl", "--eval", tmp_path / "held.jsonl", "--utility", "none",
        "--neutral", tmp_path / "n.txt", "--max-new-tokens", 4, "--grid", "rho_attn=0.3", "--grid", "rho_mlp=0.4",
        "--grid", "alpha=0.2", "--strength", 0.02, "--allow-broken", "--no-report", "-o", tmp_path / "study",
    ]  # fmt: skip


def test_plans_are_computed_from_weights_and_the_knee_stands_beside_the_quantised_model(
    arguments: list[object], quantised: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    result = run(*arguments, "--weights", tiny_llama, "--to", "lora", "--json")
    assert result.exit_code == 0, result.output
    running, unquantised = open_checkpoint(quantised), open_checkpoint(tiny_llama)
    settings = json.loads(result.stdout)["settings"]
    assert settings["weights"] == {"name": tiny_llama.name, "fingerprint": unquantised.fingerprint}
    knee = EditPlan.load(tmp_path / "study" / "knee.plan.safetensors")
    assert knee.base.fingerprint == running.fingerprint
    assert knee.data["quantised"]["weights"]["fingerprint"] == unquantised.fingerprint
    found = verify(tmp_path / "study" / "lora", quantised, numbers=False)
    assert found.ok, found.problems
    # the search goes on with these weights alone
    assert run(*arguments, "--weights", tiny_llama).exit_code == 0
    other = run(*arguments)
    assert other.exit_code == 2 and "other settings: weights was" in other.stderr


def test_what_cannot_be_is_refused_before_the_model_runs(
    arguments: list[object], quantised: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelFlags, "load", lambda *_: pytest.fail("the model was loaded"))
    for flags, words in (
        (("--weights", quantised), "is quantised itself"),
        (("--to", "checkpoint"), "of quantised formats checkpoint writes only fp8"),
        (("--to", "ckeckpoint"), "there is no target"),
    ):
        refused = run(*arguments, *flags)
        assert refused.exit_code == 2 and words in refused.stderr, refused.output
    arguments[1] = tiny_llama
    refused = run(*arguments, "--weights", tiny_llama)
    assert refused.exit_code == 2 and "is not quantised" in refused.stderr
    refused = run(*arguments, "--to", "ckeckpoint")
    assert refused.exit_code == 2 and "there is no target" in refused.stderr
    assert not (tmp_path / "study").exists()


def test_control_edits_are_computed_from_weights_too(
    arguments: list[object], quantised: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*arguments, "--weights", tiny_llama).exit_code == 0
    knee = tmp_path / "study" / "knee.plan.safetensors"
    flags = ["--data", *arguments[3:10], "--max-new-tokens", 4]
    read: list[Any] = []
    shuffled = baselines.shuffled_labels

    def noted(scoring: Scoring, *given: Any, **more: Any) -> Any:
        assert scoring.checkpoint.quantisation is not None
        read.append(scoring.checkpoint.quantisation.weights)
        return shuffled(scoring, *given, **more)

    monkeypatch.setattr(baselines, "shuffled_labels", noted)
    for weights in ([], ["--weights", tiny_llama]):
        found = run("eval", quantised, knee, *flags, "--baselines", "--draws", 1, *weights)
        assert found.exit_code == 0, found.output
    assert read[0] is None and read[1]["fingerprint"] == open_checkpoint(tiny_llama).fingerprint
    alone = run("eval", quantised, knee, *flags, "--weights", tiny_llama)
    assert alone.exit_code == 2 and "give --baselines too" in alone.stderr
