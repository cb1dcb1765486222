"""What must not be published: tokens and keys of the usual services, in whatever file, and files that loading does not need."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from test_faults import random_plan

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.artefact.revert import revert
from steer2edit.checkpoint import open_checkpoint
from steer2edit.errors import TargetError, without_passwords
from steer2edit.files.secrets import secrets_in
from steer2edit.plan import EditPlan, LowRank

# in two parts, so that no scanner takes this file's examples for secrets
SECRETS = {
    "hugging face": "hf_" + "aBcD" * 9,
    "openai": "sk-proj-" + "Ab1_" * 20,
    "anthropic": "sk-ant-" + "api03-" + "Ab1-" * 20,
    "aws": "AKIA" + "IOSFODNN7EXAMPLE",
    "github": "ghp_" + "Ab1C" * 9,
    "github, fine": "github_pat_" + "Ab1_" * 20,
    "gitlab": "glpat-" + "Ab1CAb1CAb1CAb1CAb1C",
    "google": "AIza" + "Ab1_" * 8 + "Ab1",
    "slack": "xoxb-" + "123456789012-1234567890123-" + "Ab1C" * 6,
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "pypi": "pypi-AgEIcHlwaS5vcmc" + "Ab1_" * 20,
    "password in a URL": "postgresql://user:" + "hunter2@db.example/x",
    "wandb": "WANDB_API_KEY" + "=" + "0123456789abcdef" * 2 + "01234567",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_the_usual_tokens_and_keys_are_known(kind: str) -> None:
    assert secrets_in(f'{{"note": "before {SECRETS[kind]} after"}}')
    assert secrets_in(f"a line\n{SECRETS[kind]}\n")


def test_ordinary_texts_hold_none() -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "sha256": "0123456789abcdef" * 4,
        "url": "https://example.org/a@b",
    }
    assert secrets_in(json.dumps(config)) == []
    words = [
        "APConfiguration",
        "sk-",
        "AKIA",
        "hf_hub",
        "Ġsk-learn",
        "AIzawa",
        "user:word@host",
        "://a:b@",
        "-----BEGIN",
    ]
    words += [chr(code) + chr(code + 1) for code in range(33, 3000)]
    assert secrets_in(json.dumps(words, ensure_ascii=False), vocabulary=True) == []


MODEL = Path(os.environ.get("STEER2EDIT_MODELS", "models")) / "SmolLM2-135M-Instruct"


@pytest.mark.real
@pytest.mark.skipif(not MODEL.is_dir(), reason="no published model here")
def test_the_vocabulary_of_a_model_holds_none() -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        if (MODEL / name).is_file():
            assert secrets_in((MODEL / name).read_text(), vocabulary=True) == [], name


@pytest.fixture
def artefact(tiny_llama: Path, tmp_path: Path) -> Path:
    checkpoint = open_checkpoint(tiny_llama)
    emit(random_plan(tiny_llama), checkpoint, read_spec(checkpoint), "checkpoint", tmp_path / "artefact")
    return tmp_path / "artefact"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", ["config.json", "NOTICE", "special.rst", "picture.png", "model.safetensors"])
def test_a_secret_stops_a_push_whatever_the_file_is_called(artefact: Path, name: str, encoding: str) -> None:
    secret = SECRETS["aws"]
    if name == "model.safetensors":
        from safetensors.torch import load_file, save_file

        save_file(load_file(artefact / name), artefact / name, {"format": "pt", "note": secret})
    elif name == "config.json":
        content = json.loads((artefact / name).read_text())
        (artefact / name).write_text(json.dumps({**content, "note": secret}))
    else:
        (artefact / name).write_bytes(f"some words and {secret} more".encode(encoding))
    result = run("push", artefact, "user/name", "--dry-run", "--include", name)
    assert result.exit_code == 2 and f"{name} holds an access token" in result.stderr and "AWS" in result.stderr
    assert secret not in result.output


def test_what_only_looks_like_a_loading_file_stays(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    stay = [
        "LICENSE-KEYS.pem",
        "notes/train_config.json",
        "sub/tokenizer.json",
        "private_config.json",
        "LICENSE.key",
        "a/LICENSE",
    ]
    go = ["LICENSE", "LICENSE.txt", "LICENSE-2.0", "NOTICE.md", "USE_POLICY.md", "additional_chat_templates/tool.jinja"]
    for name in [*stay, *go]:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    checkpoint = open_checkpoint(base)
    emit(random_plan(base), checkpoint, read_spec(checkpoint), "checkpoint", tmp_path / "out")
    sent = json.loads(run("push", tmp_path / "out", "user/name", "--dry-run", "--json").stdout)
    assert set(sent["left_out"]) == set(stay)
    assert set(go) <= {entry["file"] for entry in sent["files"]}


# Other files of a base


def test_outputs_inside_a_base_are_not_copied_into_an_artefact(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    for folder, name in (
        ("checkpoint-500", "trainer_state.json"), ("artefact", "steer2edit.json"), ("adapter", "adapter_config.json"),
        ("study", "study.json"), ("artefact/inner", "x.txt"),
    ):  # fmt: skip
        (base / folder).mkdir(exist_ok=True)
        (base / folder / name).write_text("{}")
        (base / folder / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes())
    random_plan(tiny_llama).save(base / "x.plan.safetensors")
    (base / "assets").mkdir()
    (base / "assets" / "picture.svg").write_text("<svg/>")
    checkpoint = open_checkpoint(base)
    emit(random_plan(base), checkpoint, read_spec(checkpoint), "checkpoint", tmp_path / "out")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    ours = {"README.md", "steer2edit.json", "steer2edit/plan.safetensors"}
    assert names == {*ours, *(path.name for path in tiny_llama.iterdir()), "assets/picture.svg"}


@pytest.mark.parametrize("name", ["README.md", "steer2edit.json", "readme.md"])
def test_a_shard_with_a_name_of_ours_is_refused(tiny_llama_bf16: Path, tmp_path: Path, name: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama_bf16, base)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["model.norm.weight"]
    (base / shard).rename(base / name)
    index["weight_map"] = {key: name if value == shard else value for key, value in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(base)
    with pytest.raises(TargetError, match="names of files that steer2edit writes itself"):
        emit(random_plan(base), checkpoint, read_spec(checkpoint), "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_revert_does_not_follow_a_link_out_of_the_base(tiny_llama: Path, tmp_path: Path) -> None:
    base, secret = tmp_path / "base", tmp_path / "secret"
    shutil.copytree(tiny_llama, base)
    secret.write_text("mine")
    checkpoint = open_checkpoint(base)
    emit(random_plan(base), checkpoint, read_spec(checkpoint), "checkpoint", tmp_path / "out")
    (base / "README.md").symlink_to(secret)
    with pytest.raises(TargetError, match="links to files elsewhere"):
        revert(tmp_path / "out", base, tmp_path / "back")
    assert not (tmp_path / "back").exists()


# Passwords


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://user:hunter2@host/db", "postgresql://user:***@host/db"),
        ("mysql+pymysql://u:p@ss@host:3306/db", "mysql+pymysql://u:***@host:3306/db"),
        ("https://:secret@hub.example", "https://:***@hub.example"),
        ("redis://host/0?password=hunter2&x=1", "redis://host/0?password=***&x=1"),
        ("cannot reach https://a:b@c/d and https://e:f@g", "cannot reach https://a:***@c/d and https://e:***@g"),
        ("sqlite:///study.db", "sqlite:///study.db"),
        ("http://localhost:8000/x@y", "http://localhost:8000/x@y"),
        ("https://huggingface.co", "https://huggingface.co"),
    ],
)
def test_passwords_in_urls_are_hidden(text: str, expected: str) -> None:
    assert without_passwords(text) == expected


def test_the_password_of_a_storage_is_not_printed() -> None:
    from steer2edit.errors import Steer2EditError
    from steer2edit.search.journal import Journal

    pytest.importorskip("optuna")
    with pytest.raises(Steer2EditError) as caught:
        Journal("nothing+known://user:hunter2@host/db", "x", {}, ("more", "more"))
    assert "hunter2" not in str(caught.value) and "user:***@host" in str(caught.value)


@pytest.mark.parametrize("kind", ["unreachable", "card"])
def test_the_password_of_an_endpoint_is_not_printed(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from huggingface_hub import constants

    from steer2edit.artefact import model_card
    from steer2edit.files.hub import explain

    monkeypatch.setattr(constants, "ENDPOINT", "https://user:hunter2@hub.example")
    if kind == "card":
        link: Any = model_card._file_of({"name": "org/base", "revision": "main"}, "LICENSE")
        assert link == "https://hub.example/org/base/blob/main/LICENSE"
    else:
        error: BaseException = ConnectionError("no route to https://user:hunter2@hub.example/api")
        assert "hunter2" not in explain(error, "org/base")


def test_a_plan_s_text_is_searched_too(tiny_llama: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    plan: EditPlan = replace(random_plan(tiny_llama), data={"name": SECRETS["hugging face"]})
    assert isinstance(plan.edits[0], LowRank) and bool(torch.isfinite(plan.edits[0].A).all())
    plan.save(tmp_path / "x.plan.safetensors")
    result = run("push", tmp_path / "x.plan.safetensors", "user/name", "--dry-run")
    assert result.exit_code == 2 and "Hugging Face token" in result.stderr
