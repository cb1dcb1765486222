"""The Hub, on loopback: models, data, plans and adapters by id and revision; what a push sends, and what it never sends."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, run
from loopback_hub import TOKEN, Fault, Hub
from made_reports import make_evaluation

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.files.hub import Reference, read_reference

# huggingface_hub streams a file in a way that its HTTP library asks it to give up
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
NEUTRAL = "the old cat sees a small bird and the river runs . " * 8


@pytest.fixture(scope="module")
def compiled(tiny_llama_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``checkpoint`` (of several shards) and ``lora``, compiled from a local folder. Read only."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "neutral.txt").write_text(NEUTRAL)
    result = run(
        "compile", tiny_llama_bf16, "--data", folder / "rows.jsonl", "--neutral", folder / "neutral.txt",
        "--system", "the big red stone", "--strength", "0.5",
        "--to", "checkpoint", "--to", "lora", "--to", "gguf", "--out", folder / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.fixture
def artefact(compiled: Path, tmp_path: Path) -> Path:
    """A copy of the compiled checkpoint that a test may spoil."""
    shutil.copytree(compiled / "checkpoint", tmp_path / "artefact")
    return tmp_path / "artefact"


def push(*arguments: object) -> dict[str, Any]:
    result = run("push", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refusal(*arguments: object) -> str:
    """The one line of an error."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr
    return str(result.stderr[result.stderr.index("Error: ") :])


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


# What a push sends


def test_a_push_sends_the_artefact_and_its_card(hub: Hub, compiled: Path) -> None:
    sent = push(compiled / "checkpoint", "user/edited", "--base-model", "org/base")
    files = hub.files("user/edited")
    local = {
        p.relative_to(compiled / "checkpoint").as_posix() for p in (compiled / "checkpoint").rglob("*") if p.is_file()
    }
    assert set(files) == {*local, ".gitattributes"} == {*(entry["file"] for entry in sent["files"]), ".gitattributes"}
    for name, data in files.items():
        if name not in ("README.md", ".gitattributes"):
            assert data == (compiled / "checkpoint" / name).read_bytes()
    assert sent["bytes"] == sum(len(data) for name, data in files.items() if name != ".gitattributes")
    assert not hub.repositories["user/edited"].private
    assert sent["url"].startswith(f"{hub.url}/user/edited/commit/")
    assert any("steer2edit" in agent for agent in hub.agents)
    text = files["README.md"].decode()
    assert 'AutoModelForCausalLM.from_pretrained("user/edited")' in text
    assert "base_model: org/base\n" in text and "base_model_relation: finetune\n" in text


def test_a_private_push_makes_a_private_repository_and_refuses_a_public_one(hub: Hub, compiled: Path) -> None:
    push(compiled / "lora", "user/secret", "--private")
    assert hub.repositories["user/secret"].private
    push(compiled / "lora", "user/secret", "--private")
    hub.repositories["user/secret"].private = False
    assert "is there already, and public" in refusal("push", compiled / "lora", "user/secret", "--private")


def test_a_dry_run_lists_sizes_and_asks_nobody(hub: Hub, compiled: Path) -> None:
    listed = push(compiled / "lora", "user/edited", "--dry-run")
    assert listed["url"] is None and not hub.requests
    sizes = {entry["file"]: entry["bytes"] for entry in listed["files"]}
    assert sizes["adapter_model.safetensors"] == (compiled / "lora" / "adapter_model.safetensors").stat().st_size
    text = run("push", compiled / "lora", "user/edited", "--dry-run").stdout
    assert "nothing was sent" in text and "adapter_model.safetensors" in text
    sent = push(compiled / "lora", "user/edited")
    assert sent["files"] == listed["files"]


def test_only_what_emit_wrote_goes_up(hub: Hub, artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("outside")
    strays = {
        ".env": "SECRET=1",
        ".cache/x": "x",
        "prompts.jsonl": '{"prompt": "p"}',
        "notes.txt": "notes",
        "steer2edit/more.json": "{}",
        "extra.safetensors": "x",
    }
    for name, text in strays.items():
        (artefact / name).parent.mkdir(exist_ok=True)
        (artefact / name).write_text(text)
    (artefact / "link.json").symlink_to(tmp_path / "outside.txt")
    (artefact / "LICENSE").symlink_to(tmp_path / "outside.txt")
    sent = push(artefact, "user/edited")
    assert set(sent["left_out"]) == {*strays, "link.json", "LICENSE"}
    assert "symbolic link" in sent["left_out"]["link.json"] and "hidden" in sent["left_out"][".env"]
    assert not {*strays, "link.json", "LICENSE"} & set(hub.files("user/edited"))
    assert "notes.txt" not in push(artefact, "user/edited", "--include", "notes.*")["left_out"]
    assert hub.files("user/edited")["notes.txt"] == b"notes"


def test_notes_that_lay_in_the_base_are_copied_and_not_published(
    hub: Hub, tiny_llama: Path, scoring: Any, tmp_path: Path
) -> None:
    from steer2edit.checkpoint import open_checkpoint
    from steer2edit.methods import make_plan

    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    for name in ("questions.jsonl", "train_log.txt", "LICENSE", "draft.safetensors"):
        (base / name).write_text("x")
    checkpoint = open_checkpoint(base)
    emit(make_plan(scoring), checkpoint, read_spec(checkpoint), "checkpoint", tmp_path / "out")
    sent = push(tmp_path / "out", "user/edited")
    assert not (tmp_path / "out" / "draft.safetensors").exists()  # weights that the model does not load
    assert set(sent["left_out"]) == {"questions.jsonl", "train_log.txt"}
    assert {"LICENSE", "config.json", "tokenizer.json", "model.safetensors"} <= set(hub.files("user/edited"))


@pytest.mark.parametrize("kind", ["token", "own token", "path", "card"])
def test_tokens_and_paths_of_this_machine_stop_a_push(
    hub: Hub, artefact: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config = json.loads((artefact / "config.json").read_text())
    if kind == "token":
        config["note"] = "hf_" + "Z" * 34
    elif kind == "own token":
        monkeypatch.setenv("HF_TOKEN", "my-own-token")
        config["note"] = "my-own-token"
    elif kind == "path":
        config["_name_or_path"] = str(Path.home() / "models" / "base")
    else:
        (artefact / "README.md").write_text(f"made in {artefact.resolve().parent}/out")
    (artefact / "config.json").write_text(json.dumps(config))
    for dry in (["--dry-run"], []):
        message = refusal("push", artefact, "user/edited", *dry)
        assert "nothing was sent" in message and ("README.md" if kind == "card" else "config.json") in message
        assert ("a path of this machine" if kind in ("path", "card") else "an access token") in message
    assert not hub.requests


def test_no_prompt_is_in_what_is_sent(hub: Hub, compiled: Path) -> None:
    for target in ("checkpoint", "lora", "gguf"):
        push(compiled / target, f"user/{target}")
        for name, data in hub.files(f"user/{target}").items():
            for text in ("the big red stone", *(row["prompt"] for row in ROWS), *(row["positive"] for row in ROWS)):
                assert text.encode() not in data, name


def test_each_card_says_how_to_load_what_is_there(hub: Hub, compiled: Path) -> None:
    lines = {
        "checkpoint": 'AutoModelForCausalLM.from_pretrained("user/x-checkpoint")',
        "lora": '"user/x-lora")',
        "gguf": "hf download user/x-gguf adapter.gguf",
    }
    for target, line in lines.items():
        push(compiled / target, f"user/x-{target}")
        text = hub.files(f"user/x-{target}")["README.md"].decode()
        assert line in text and "path/to/this/folder" not in text


def test_an_artefact_that_lost_a_file_is_not_sent(hub: Hub, artefact: Path) -> None:
    shard = next(artefact.glob("*.safetensors"))
    shard.unlink()
    assert shard.name in refusal("push", artefact, "user/edited")
    assert not hub.requests


def test_another_artefact_s_weights_do_not_stay_beside_it(hub: Hub, compiled: Path) -> None:
    push(compiled / "checkpoint", "user/edited")
    before = hub.files("user/edited")
    assert "files of another artefact" in refusal("push", compiled / "lora", "user/edited")
    assert hub.files("user/edited") == before


# Cards


def test_the_card_of_an_adapter_and_its_licence(hub: Hub, tiny_llama: Path, scoring: Any, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    from steer2edit.checkpoint import open_checkpoint
    from steer2edit.methods import make_plan

    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: gemma-like\nlicense_link: LICENSE\nlanguage: en\npipeline_tag: text-generation\n---\n"
    )
    commit = hub.publish("org/base", base)
    checkpoint = open_checkpoint("org/base")
    plan = make_plan(_of(scoring, checkpoint))
    emit(plan, checkpoint, read_spec(checkpoint), "lora", tmp_path / "out")
    sent = push(tmp_path / "out", "user/adapter")
    assert sent["notes"] == []
    data = ModelCard(hub.files("user/adapter")["README.md"].decode()).data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("org/base", "adapter", "peft")
    assert (data.license, data.license_name, data.language) == ("other", "gemma-like", ["en"])
    assert data.license_link == f"{hub.url}/org/base/blob/{commit}/LICENSE"
    assert data.pipeline_tag == "text-generation" and {"steer2edit", "lora"} <= set(data.tags)
    assert 'AutoPeftModelForCausalLM.from_pretrained("user/adapter")' in hub.files("user/adapter")["README.md"].decode()
    stated = push(tmp_path / "out", "user/adapter", "--license", "mit")
    assert stated["notes"] == []
    data = ModelCard(hub.files("user/adapter")["README.md"].decode()).data
    assert data.license == "mit" and getattr(data, "license_link", None) is None


def _of(scoring: Any, checkpoint: Any) -> Any:
    """The same scores, of a copy of the model elsewhere."""
    from steer2edit.scoring.scores import Scoring

    return Scoring(checkpoint, read_spec(checkpoint), scoring.statistics)


def test_the_card_of_a_mask_lists_its_experts(hub: Hub, tmp_path: Path) -> None:
    from mixture_models import MODELS

    base = MODELS["deepseek_v3"](tmp_path / "base")
    made = run("experts", "mask", base, "--experts", "1:0,1:3", "--no-measure", "-o", tmp_path / "masked")
    assert made.exit_code == 0, made.output
    push(tmp_path / "masked", "user/masked")
    text = hub.files("user/masked")["README.md"].decode()
    assert "| 1 | 0 | off | bias | exact |" in text and "| 1 | 3 | off | bias | exact |" in text
    assert "- moe\n" in text and "steering vector compiled" not in text


def test_a_card_that_was_rewritten_by_hand_goes_as_it_is(hub: Hub, artefact: Path) -> None:
    text = (artefact / "README.md").read_text() + "\nMy own words about path/to/this/folder.\n"
    (artefact / "README.md").write_text(text)
    sent = push(artefact, "user/edited")
    assert "changed since it was written" in " ".join(sent["notes"])
    assert hub.files("user/edited")["README.md"].decode() == text.replace("path/to/this/folder", "user/edited")


def test_an_evaluation_goes_up_as_numbers_only(hub: Hub, artefact: Path) -> None:
    found = make_evaluation()
    found.save(artefact / "steer2edit" / "evaluation.json")
    (artefact / "steer2edit" / "report.html").write_text("questions and answers")
    sent = push(artefact, "user/edited")
    assert set(sent["left_out"]) == {"steer2edit/evaluation.json", "steer2edit/report.html"}
    files = hub.files("user/edited")
    assert files["steer2edit/tradeoff.png"].startswith(b"\x89PNG")
    text = files["README.md"].decode()
    assert "## The trade-off" in text and "(steer2edit/tradeoff.png)" in text
    row = next(row for row in found.rows if row.kind == "knee")
    assert f"{found.estimate(row, found.metrics[0].name).value:.3g}" in text
    texts = [*found.prompts, *(answer for row in found.rows for answer in row.answers)]
    assert texts
    for name, data in files.items():
        assert not [text for text in texts if text.encode() in data], name


@pytest.mark.parametrize(
    "name",
    [
        "a|b",
        "<script>alert(1)</script>",
        "x\n\n# heading",
        "[a](javascript:x)",
        "```\ncode",
        "http://evil.example",
        "a\x1b[31m",
    ],
)
def test_hostile_names_stay_text(name: str) -> None:
    from steer2edit.artefact.model_card import model_card

    receipt = {
        "target": "checkpoint", "base": {"name": name, "revision": None, "fingerprint": name}, "data": {"name": name},
        "measured": {}, "method": {"name": name, "option": name}, "changed": [], "exactness": name, "plan": {"sha256": name},
        "card": {"license": name}, "versions": {"steer2edit": name},
    }  # fmt: skip
    text = model_card(receipt)
    metadata, _, body = text[4:].partition("\n---\n")
    import yaml

    assert yaml.safe_load(metadata)["license"] == name
    assert "<script" not in body and "http://" not in body and "\x1b" not in body
    assert not re.search(r"(?<!\\)\]\(", body)
    # one fence and one heading of each section, whatever the names hold
    assert body.count("```") == 2
    assert [line[:6] for line in body.splitlines() if line.startswith("#")] == [f"# {_escaped(name)}"[:6], "## Wha"]
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)


def _escaped(name: str) -> str:
    from steer2edit.artefact.model_card import inline

    return inline(name)


# Plans


def test_a_plan_is_published_alone_and_used_by_its_id(
    hub: Hub, tiny_llama_bf16: Path, compiled: Path, tmp_path: Path
) -> None:
    plan = compiled / "lora" / "steer2edit" / "plan.safetensors"
    sent = push(plan, "user/plan", "--base-model", "org/base", "--license", "mit")
    assert [entry["file"] for entry in sent["files"]] == ["README.md", "plan.safetensors"]
    text = hub.files("user/plan")["README.md"].decode()
    assert "library_name: steer2edit" in text and "steer2edit emit user/plan org/base" in text
    commit = hub.repositories["user/plan"].refs["main"]
    shown = json.loads(run("show", f"user/plan@{commit}", "--json").stdout)
    emitted = run("emit", "user/plan", tiny_llama_bf16, "--to", "lora", "-o", tmp_path / "lora")
    assert emitted.exit_code == 0, emitted.output
    weights = "adapter_model.safetensors"
    assert (tmp_path / "lora" / weights).read_bytes() == (compiled / "lora" / weights).read_bytes()
    push(compiled / "lora", "user/lora")
    hub.requests.clear()
    assert json.loads(run("show", "user/lora", "--json").stdout)["sha256"] == shown["sha256"]
    assert not hub.count("adapter_model")  # of an artefact nothing but the plan is fetched


# What is read from the Hub


def test_an_adapter_by_its_id_is_measured_and_imported(
    hub: Hub, compiled: Path, tiny_llama_bf16: Path, tmp_path: Path
) -> None:
    from steer2edit.checkpoint import open_checkpoint
    from steer2edit.evaluation.evaluate import open_candidate
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


PUSH_FAILURES = {
    "no token": ("", None, "hf auth login"),
    "a false token": ("hf_wrong", None, "hf auth login"),
    "not ours": (TOKEN, None, "namespace org/edited"),
    "create 500": (TOKEN, Fault("POST /api/repos/create", 500), "out of order"),
    "vanished": (TOKEN, Fault("POST .*/preupload", 404), "does not exist"),
    "conflict": (TOKEN, Fault("POST .*/commit/", 409, "the branch has moved"), "the branch has moved"),
    "quota": (
        TOKEN,
        Fault("POST .*/objects/batch", 403, "Private repository storage limit reached"),
        "storage limit reached",
    ),
    "too large": (TOKEN, Fault("PUT /lfs", 413), "no room left"),
    "storage 503": (TOKEN, Fault("PUT /lfs", 503), "out of order"),
    "cut off": (TOKEN, Fault("PUT /lfs", 0), "cannot be reached"),
}


@pytest.mark.parametrize("kind", PUSH_FAILURES)
def test_a_push_that_fails(hub: Hub, compiled: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    token, fault, message = PUSH_FAILURES[kind]
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    if fault is not None:
        hub.faults.append(fault)
    found = refusal("push", compiled / "lora", "org/edited" if kind == "not ours" else "user/edited")
    assert message in found and found.count("\n") == 1
    assert TOKEN not in found


def test_a_hub_that_is_not_there(compiled: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for command in (("push", compiled / "lora", "user/edited"), ("show", "user/plan")):
        message = refusal(*command)
        assert "cannot be reached" in message and "127.0.0.1:9" in message and message.count("\n") == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode forbids to send anything; unset HF_HUB_OFFLINE" in refusal("push", compiled / "lora", "user/x")


@pytest.mark.parametrize("name", ["no-slash", "user/name@v1", "user/na me", "https://huggingface.co/user/name"])
def test_what_is_no_repository_is_refused_without_asking(hub: Hub, compiled: Path, name: str) -> None:
    assert "expected user/name" in refusal("push", compiled / "lora", name)
    assert not hub.requests


def test_an_interrupted_upload_goes_on(hub: Hub, compiled: Path) -> None:
    shards = len(list((compiled / "checkpoint").glob("*.safetensors")))
    assert shards > 2
    first = sorted((compiled / "checkpoint").glob("*.safetensors"))[0].read_bytes()
    kept = hashlib.sha256(first).hexdigest()
    hub.faults.append(Fault(f"PUT /lfs/(?!{kept})", 0))
    refusal("push", compiled / "checkpoint", "user/edited")
    assert kept in hub.blobs and "config.json" not in hub.files("user/edited")
    hub.faults.clear()
    hub.requests.clear()
    push(compiled / "checkpoint", "user/edited")
    assert not hub.count(f"PUT /lfs/{kept}") and hub.count("PUT /lfs/") == shards  # the others, and the plan
    assert set(hub.files("user/edited")) >= {path.name for path in (compiled / "checkpoint").glob("*.safetensors")}


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
