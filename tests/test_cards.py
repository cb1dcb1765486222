"""Model cards: base and licence, how to load, numbers without answers, hostile names."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from loopback_hub import Hub
from made_reports import make_evaluation
from pushing import push

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit

# huggingface_hub streams a file in a way that its HTTP library asks it to give up
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


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
