"""A citizen is added in one place: a method is one file, and the command line and the search know its options."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROWS, run

from steer2edit import methods
from steer2edit.plan import EditPlan

DOCS = Path(__file__).parents[1] / "docs"
FILE = "steer2edit/methods/whole.py"


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The method of docs/extending.md, as the only file of a folder that methods are looked for in."""
    blocks = runpy.run_path(str(DOCS / "run.py"))["read_page"](DOCS / "extending.md")
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "whole.py").write_text(next(block.text for block in blocks if block.directives.get("file") == FILE))
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "steer2edit.methods.whole", raising=False)
    return "whole"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    rows = [{**row, "prompt": f"{row['prompt']} {word}"} for row in ROWS for word in ("red", "green", "old")]
    texts = {
        "data": "".join(json.dumps(row) + "\n" for row in ROWS),
        "eval": "".join(json.dumps(row) + "\n" for row in rows),
        "neutral": "the old cat sees a small bird and the river runs . " * 8,
    }
    paths = {name: tmp_path / f"{name}.{'txt' if name == 'neutral' else 'jsonl'}" for name in texts}
    for name, path in paths.items():
        path.write_text(texts[name])
    return paths


def test_its_options_are_flags_of_plan_and_compile(
    whole: str, tiny_llama: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    stats, plan = tmp_path / "x.stats.safetensors", tmp_path / "x.plan.safetensors"
    assert run("capture", tiny_llama, "--data", files["data"], "-o", stats).exit_code == 0
    norms = []
    for part in ("1", "0.5"):
        planned = run("plan", tiny_llama, "--stats", stats, "--method", whole, "--part", part, "-o", plan, "--force")
        assert planned.exit_code == 0, planned.output
        norms.append(EditPlan.load(plan).norm)
    assert norms[1] == pytest.approx(norms[0] / 2)
    assert "whole with --part 0.5" in planned.stdout
    out = tmp_path / "out"
    compiled = run(
        "compile", tiny_llama, "--data", files["data"], "--neutral", files["neutral"], "--method", whole, "--part", "2",
        "--layers", "0-1", "--to", "lora", "--out", out,
    )  # fmt: skip
    assert compiled.exit_code == 0, compiled.output
    assert EditPlan.load(out / "steer2edit" / "plan.safetensors").method["part"] == 2
    assert run("verify", out, "--base", tiny_llama).exit_code == 0
    refused = run("plan", tiny_llama, "--stats", stats, "--method", "steering", "--part", "1", "-o", plan)
    assert refused.exit_code == 2 and "has no option --part" in refused.stderr
    assert "--part" in run("compile", "--help").stdout and "Whole matrices" in run("compile", "--help").stdout


def test_tune_searches_its_range(whole: str, tiny_llama: Path, files: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    result = run(
        "tune", tiny_llama, "--data", files["data"], "--eval", files["eval"], "--neutral", files["neutral"], "--utility", "none",
        "--method", whole, "--trials", "3", "--max-new-tokens", "4", "--no-report", "-o", tmp_path / "study", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    parts = [trial["params"]["part"] for trial in json.loads(result.stdout)["trials"]]
    assert len(set(parts)) == 3 and all(0.25 <= part <= 4 for part in parts)


def test_two_methods_must_agree_on_an_options_type(whole: str, tmp_path: Path) -> None:
    text = (tmp_path / "methods" / "whole.py").read_text()
    (tmp_path / "methods" / "whole.py").write_text(text.replace("    part: float", "    alpha: int"))
    refused = run("compile", "--help")
    assert refused.exit_code == 2
    assert "declare --alpha with different types" in refused.stderr


@pytest.mark.parametrize("command", ["compile", "eval", "tune", "plan", "import"])
def test_help_of_a_command_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\nfrom steer2edit.cli.app import main\n"
        f"main(['{command}', '--help'], standalone_mode=False)\nprint(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "numpy"} & set(out.split())
