"""The Hub, on loopback: names, what is read by id and revision, clear failures, and the whole way there and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROWS, run
from loopback_hub import TOKEN, Fault, Hub
from pushing import NEUTRAL, refusal

from steer2edit.architecture import read_spec
from steer2edit.files.hub import Reference, read_reference

# huggingface_hub streams a file in a way that its HTTP library asks it to give up
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


# Names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user/name", Reference("user/name")),
        ("user/name@v1.0", Reference("user/name", "v1.0")),
        ("gpt2", Reference("gpt2")),
        ("user/name@refs/pr/1", Reference("user/name", "refs/pr/1")),
        ("user/name.plan.safetensors", None),
        ("user/name@", None),
        ("../name", None),
        ("/user/name", None),
        ("a b/c", None),
        ("user/na/me", None),
    ],
)
def test_names_of_repositories(text: str, expected: Reference | None) -> None:
    assert read_reference(text) == expected


def test_two_revisions_must_agree() -> None:
    assert read_reference("user/name@v1", "v1") == Reference("user/name", "v1")
    assert "two revisions" in refusal(
        "compile", "user/name@v1", "--revision", "v2", "--behavior", "concise", "--out", "x"
    )


# What is read from the Hub


def test_an_adapter_by_its_id_is_measured_and_imported(
    hub: Hub, compiled: Path, tiny_llama_bf16: Path, tmp_path: Path
) -> None:
    from steer2edit.checkpoint import open_checkpoint
    from steer2edit.evaluation.candidates import open_candidate
    from steer2edit.plan import EditPlan
    from steer2edit.runtime.model import load_model

    commit = hub.publish("org/adapter", compiled / "lora")
    checkpoint = open_checkpoint(tiny_llama_bf16)
    loaded = load_model(checkpoint, read_spec(checkpoint))
    ids = torch.tensor([[1, 5, 9, 44, 7, 20]])
    before = loaded.model(input_ids=ids).logits
    with open_candidate(loaded, checkpoint, f"org/adapter@{commit}").enter() as changed:
        assert (changed.model(input_ids=ids).logits - before).abs().max() > 1e-3
    out = tmp_path / "x.plan.safetensors"
    imported = run("import", "org/adapter", "--model", tiny_llama_bf16, "-o", out)
    assert imported.exit_code == 0, imported.output
    plan = EditPlan.load(compiled / "lora" / "steer2edit" / "plan.safetensors")
    assert EditPlan.load(out).norm == pytest.approx(plan.norm, rel=1e-5)


def test_data_by_id_revision_and_file(hub: Hub, tmp_path: Path) -> None:
    from steer2edit.data.contrast import read_contrast

    (tmp_path / "data").mkdir()
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines[:2]))
    first = hub.publish("org/pairs", tmp_path / "data")
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    hub.publish("org/pairs", tmp_path / "data")
    assert len(read_contrast("org/pairs")) == 2 * len(ROWS)
    assert len(read_contrast(f"org/pairs@{first}")) == len(read_contrast(f"org/pairs@{first}:train.jsonl")) == 4


def test_offline_reads_the_cache_and_says_what_is_not_there(
    hub: Hub, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from steer2edit.checkpoint import open_checkpoint

    commit = hub.publish("org/base", tiny_llama)
    assert open_checkpoint("org/base").revision == commit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert open_checkpoint(f"org/base@{commit}").path == open_checkpoint("org/base").path
    message = refusal("compile", "org/other", "--behavior", "concise", "--out", "x")
    assert "unset HF_HUB_OFFLINE" in message and "org/other" in message
    message = refusal("compile", "org/base", "--data", "org/pairs", "--out", "x")
    assert "unset HF_HUB_OFFLINE" in message and "org/pairs" in message
    assert not hub.requests


# Failures: one clear line, exit code 2


FAILURES = {
    "no such model": (Fault("nothing", 0), "does not exist"),
    "private": (Fault("GET /api/models/org/base", 401), "hf auth login"),
    "out of order": (Fault("GET /api/models/org/base", 503), "out of order"),
    "too many requests": (Fault("GET /api/models/org/base", 429), "wait"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_model_that_cannot_be_fetched(hub: Hub, kind: str) -> None:
    fault, message = FAILURES[kind]
    hub.faults.append(fault)
    found = refusal("compile", "org/base", "--behavior", "concise", "--out", "x")
    assert message in found and found.count("\n") == 1


def test_a_gated_model_and_an_unknown_revision(hub: Hub, tiny_llama: Path) -> None:
    hub.publish("org/base", tiny_llama)
    assert "no-such" in refusal("compile", "org/base@no-such", "--behavior", "concise", "--out", "x")
    hub.repositories["org/base"].gated = True
    message = refusal("compile", "org/base", "--behavior", "concise", "--out", "x")
    assert "is gated: accept its terms at" in message and "org/base" in message


# The whole way, with the environment variables alone


def test_from_the_hub_and_back(hub_server: Hub, tiny_llama: Path, tmp_path: Path) -> None:
    hub_server.repositories.clear()
    hub_server.faults.clear()
    hub_server.publish("org/base", tiny_llama)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "neutral.txt").write_text(NEUTRAL)
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub_server.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_TOKEN": TOKEN,
    }
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    script = tmp_path / "whole.py"
    script.write_text(WHOLE)
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["effect"] > 1e-3
    assert found["checkpoint"] <= 1e-4 and found["lora"] <= 1e-4 and found["imported"] <= 1e-4
    assert found["verified"] == [0, 0]
    assert hub_server.repositories["user/lora"].private
    text = hub_server.files("user/checkpoint")["README.md"].decode()
    assert "base_model: org/base\n" in text and str(tmp_path) not in text


WHOLE = """
import json, sys
import torch
from click.testing import CliRunner
from steer2edit.cli.app import main
torch.set_num_threads(1)

def run(*arguments):
    result = CliRunner().invoke(main, list(arguments))
    if result.exit_code:
        print(arguments, result.output, file=sys.stderr)
        raise result.exception or SystemExit(1)
    return result

run("compile", "org/base@main", "--data", "rows.jsonl", "--neutral", "neutral.txt", "--strength", "1",
    "--to", "checkpoint", "--to", "lora", "--out", "out")
commits = {}
for target in ("checkpoint", "lora"):
    flags = ["--private", "--json"] if target == "lora" else ["--json"]
    sent = json.loads(run("push", f"out/{target}", f"user/{target}", *flags).stdout)
    commits[target] = sent["url"].rsplit("/", 1)[1]

from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import load_model
from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.plan import EditPlan
from steer2edit.files.hub import fetch

checkpoint = open_checkpoint("org/base")
loaded = load_model(checkpoint, read_spec(checkpoint))
ids = torch.tensor([[1, 5, 9, 44, 7, 20]])
logits = lambda model: model(input_ids=ids, use_cache=False).logits.detach()
base = logits(loaded.model)
with edited(loaded, EditPlan.load("out/lora/steer2edit/plan.safetensors")):
    expected = logits(loaded.model)
published = AutoModelForCausalLM.from_pretrained("user/checkpoint", revision=commits["checkpoint"])
adapter = AutoPeftModelForCausalLM.from_pretrained("user/lora", revision=commits["lora"])
verified = [run("verify", f"user/{target}@{commits[target]}").exit_code for target in commits]
imported = run("import", f"user/lora@{commits['lora']}", "--model", "org/base", "-o", "back.plan.safetensors")
with edited(loaded, EditPlan.load("back.plan.safetensors")):
    back = logits(loaded.model)
print(json.dumps({
    "effect": float((expected - base).abs().max()),
    "checkpoint": float((expected - logits(published)).abs().max()),
    "imported": float((expected - back).abs().max()),
    "lora": float((expected - logits(adapter)).abs().max()),
    "verified": verified,
}))
"""
