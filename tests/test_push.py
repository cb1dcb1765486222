"""What a push sends, what it never sends, and pushes that fail."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS, run
from loopback_hub import TOKEN, Fault, Hub
from pushing import push, refusal

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit

# huggingface_hub streams a file in a way that its HTTP library asks it to give up
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


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
    assert "nothing was uploaded" in text and "adapter_model.safetensors" in text
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


# Pushes that fail: one clear line, exit code 2

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
