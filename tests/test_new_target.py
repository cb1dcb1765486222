"""A target is added by one file: the command line, verify, the card, the report and push find it by its name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROWS, run

from steer2edit import targets
from steer2edit.errors import TargetError
from steer2edit.methods import make_plan

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def example() -> str:
    """The target that docs/extending.md shows."""
    text = PAGE.read_text(encoding="utf-8")
    block = re.search(r"<!-- file: steer2edit/targets/arrays.py -->\n```python\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return block[1]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A further folder of targets."""
    folder = tmp_path / "targets"
    folder.mkdir()
    monkeypatch.setattr(targets, "__path__", [*targets.__path__, str(folder)])
    for name in ("arrays", "half"):
        monkeypatch.delitem(sys.modules, f"steer2edit.targets.{name}", raising=False)
    return folder


def succeed(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_one_file_is_a_target_everywhere(home: Path, tiny_llama: Path, scoring: Any, tmp_path: Path) -> None:
    (home / "arrays.py").write_text(example(), encoding="utf-8")
    assert "arrays" in targets.names()
    assert targets.summary("arrays").startswith("NumPy arrays")
    make_plan(scoring).scaled(0.5).save(tmp_path / "x.plan.safetensors")
    out = tmp_path / "out"
    succeed("emit", tmp_path / "x.plan.safetensors", tiny_llama, "--to", "arrays", "-o", out)
    found = succeed("verify", out, "--base", tiny_llama)
    assert found["ok"] and found["numbers"]["unexplained"] <= 1e-4 < found["numbers"]["effect"]
    sent = succeed("push", out, "user/arrays", "--dry-run")
    assert {one["file"] for one in sent["files"]} == {
        "README.md",
        "steer2edit.json",
        "steer2edit/plan.safetensors",
        "update.npz",
    }
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "library_name: numpy" in card and "np.load(" in card and "as NumPy arrays." in card
    page = run("report", out, "--out", tmp_path / "report.html")
    assert page.exit_code == 0, page.output
    assert "np.load(" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_changed_file_of_a_new_target_is_found(home: Path, tiny_llama: Path, scoring: Any, tmp_path: Path) -> None:
    (home / "arrays.py").write_text(example(), encoding="utf-8")
    make_plan(scoring).scaled(0.5).save(tmp_path / "x.plan.safetensors")
    out = tmp_path / "out"
    succeed("emit", tmp_path / "x.plan.safetensors", tiny_llama, "--to", "arrays", "-o", out)
    with np.load(out / "update.npz") as arrays:
        changed = {name: arrays[name] * 1.01 for name in arrays.files}
    np.savez(out / "update.npz", **changed)
    result = run("verify", out, "--base", tiny_llama)
    assert result.exit_code == 1 and "update.npz differs" in result.output


def test_compile_writes_a_new_target_beside_a_known_one(home: Path, tiny_llama: Path, tmp_path: Path) -> None:
    (home / "arrays.py").write_text(example(), encoding="utf-8")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    out = tmp_path / "out"
    result = run(
        *("compile", tiny_llama, "--data", data, "--strength", "0.5", "--all-components", "--no-report"),
        *("--to", "lora", "--to", "arrays", "--out", out),
    )
    assert result.exit_code == 0, result.output
    assert (out / "arrays/update.npz").is_file() and (out / "lora/adapter_model.safetensors").is_file()
    assert run("compile", tiny_llama, "--data", data, "--to", "nothing", "--out", tmp_path / "no").exit_code == 2


def test_a_module_that_does_not_state_everything_is_refused(home: Path) -> None:
    (home / "half.py").write_text('SUMMARY = "Half of a target."\n', encoding="utf-8")
    assert targets.summary("half") == "Half of a target."
    with pytest.raises(TargetError, match="lacks HUB, WHOLE_MODEL"):
        targets.load("half")


def test_naming_the_targets_imports_no_torch() -> None:
    code = (
        "import sys\nfrom steer2edit import targets\n"
        "assert all(targets.summary(name) for name in targets.names())\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
