"""Every benchmark that needs no other engine runs through on a model of a few kilobytes, and prints its table."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_chat_model
from test_benchmarks import PARTS, ROOT, start

from steer2edit.capture import background
from steer2edit.demo import invented_world
from steer2edit.evaluation import assess

BENCHMARKS = ROOT / "benchmarks"
RUNS = {
    "attributes.py": "MODEL --behavior formal --limit 3 --max-new-tokens 3 --kl-budget 0.05 --dtype float32 --random",
    "capture_speed.py": "MODEL --runs 1 --limit 4 --behavior formal",
    "chat_cost.py": "MODEL --behavior formal --dtype float32",
    "compile_speed.py": "MODEL --behavior formal --share 0.2 --samples 1 --kl-budget 0.001 --dtype float32",
    "data_verdict.py": "MODEL --behavior formal --pairs 20 --draws 1",
    "fp8_rounding.py": "--rows 256 --columns 256",
    "fuzz.py": "--target show --seconds 0.5",
    "gpu.py": "MODEL --runs 1 --limit 4 --behavior formal --answers 2 --max-new-tokens 3 --dtype float32",
    "generation_speed.py": "MODEL --runs 1 --answers 2 --max-new-tokens 3",
    "grid.py": "MODEL --runs 1 --choices 2 --behavior formal --dtype float32",
    "judge.py": "MODEL --dtype float32",
    "made_data.py": "MODEL --behavior formal --data other=PAIRS@response --out WORK --kl 0.001 --method steering --questions 2 "
    "--knowledge 2 --tokens 3 --kl-rows 4 --dtype float32",
    "methods_at_kl.py": "MODEL --behavior formal --out WORK --kl 0.001 --method steering --method constant --questions 2 "
    "--written 2 --knowledge 2 --tokens 3 --kl-rows 4 --dtype float32",
    "operators.py": "MODEL --behavior formal --limit 12 --only CAA --to checkpoint",
    "plan_content.py": "MODEL",
    "plan_speed.py": "MODEL --runs 1",
    "solver_options.py": "MODEL --behavior formal --kl 0.001 --questions 2 --rows 4 --knowledge 2 --written 2 --dtype "
    "float32 --out WORK --only default --experiments",
    "scale_units.py": "MODEL --behavior formal --tokens 200 --dtype float32",
    "written.py": "MODEL --behavior formal --out WORK --kl 0.001 --questions 2 --tokens 6 --kl-rows 4 --dtype float32",
}
IN_PROCESSES = {
    "experts_mask.py": "--work WORK --size 0.002 --experts 2 --runs 1 --remove",
    "layerwise.py": "--work WORK --sizes 0.001 --runs 1 --rows 2",
    "streaming.py": "--work WORK --size 0.002 --shard 0.001 --runs 1 --warm 0",
}
"""They start a process for each run, which takes half a minute."""
SLOW = [
    pytest.mark.real,
    pytest.mark.skipif("STEER2EDIT_MODELS" not in os.environ, reason="half a minute: with the real model's tests"),
]
ELSEWHERE = {
    "behaviors.py": "starts a whole compile, whose laws are in test_cli.py",
    "emit_speed.py": "its stages: test_benchmarks.py",
    "power.py": "test_power.py",
    "train_lora.py": "test_power.py",
    "paper.py": "test_paper.py",
    "interference.py": "below, with two behaviours",
    "fronts.py": "below, with two budgets",
    "quantised.py": "below, with what its first row must be",
    "quantised_bases.py": "needs bitsandbytes",
    "experts_families.py": "the demo's mixture of each family takes minutes",
    "experts_vllm.py": "needs vLLM",
    "vllm_greedy.py": "needs vLLM",
    "peers.py": "needs other tools",
    "faults.py": "kills processes for minutes: test_faults.py has its laws",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts of backgrounds and costs are short, the answers few, and the threads stay as they are."""
    from steer2edit.strength import neutral_texts

    every = background.everyday_prompts
    for module in (background, neutral_texts):
        monkeypatch.setattr(module, "everyday_prompts", lambda use: every(use)[:4])
    monkeypatch.setattr(background, "BACKGROUND_TOKENS", 512)
    monkeypatch.setattr(neutral_texts, "MAX_TOKENS", 512)
    monkeypatch.setattr(neutral_texts, "PROMPTS", 4)
    monkeypatch.setattr(assess, "PROOF", 4)
    monkeypatch.setattr(assess, "GENERAL", 4)
    monkeypatch.setattr(assess, "GENERAL_TOKENS", 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda _count: None)


def test_every_benchmark_runs_here_or_says_why_not() -> None:
    scripts = {path.name for path in BENCHMARKS.glob("*.py")} - PARTS
    parts = [*RUNS, *IN_PROCESSES, *ELSEWHERE]
    assert sorted(scripts) == sorted(parts)


@pytest.mark.parametrize("script", [*RUNS, *(pytest.param(one, marks=SLOW) for one in IN_PROCESSES)])
def test_it_runs_through(
    script: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEER2EDIT_CACHE", str(tmp_path / "cache"))  # a script may name another
    pairs = [{"prompt": f"Prompt {i}", "positive": "Yes, Sir.", "negative": "Yep."} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = (RUNS | IN_PROCESSES)[script]
    for name, place in {"MODEL": model, "WORK": tmp_path / "work", "PAIRS": tmp_path / "pairs.jsonl"}.items():
        words = words.replace(name, str(place))
    start(BENCHMARKS / script, monkeypatch, *words.split())
    assert len(capsys.readouterr().out.splitlines()) >= 1


@pytest.mark.parametrize("script", ["interference.py", pytest.param("fronts.py", marks=SLOW)])
def test_it_runs_through_on_the_demos_model(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With two of the demo's behaviours, and few of their tasks."""
    every = invented_world.tasks
    monkeypatch.setattr(invented_world, "BEHAVIORS", invented_world.BEHAVIORS[:2])
    monkeypatch.setattr(invented_world, "tasks", lambda name: every(name)[::18])
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    module = importlib.import_module(script.removesuffix(".py"))
    if script == "fronts.py":
        monkeypatch.setattr(module, "BUDGETS", (0.002, 0.01))
        monkeypatch.setattr(module, "SEEDS", range(2))
        monkeypatch.setattr(module, "DRAWS", 20)
    monkeypatch.setattr(sys, "argv", [script])
    module.main()
    assert len(capsys.readouterr().out.splitlines()) >= 4


def test_the_unquantised_model_keeps_the_whole_edit(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--behavior formal --kl 0.001 --questions 2 --rows 4 --dtype float32"
    start(BENCHMARKS / "quantised.py", monkeypatch, str(model), *options.split())
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = {cells[0]: cells[1:] for cells in table if cells}
    change, merged, beside, *numbers = rows["unquantised"]
    assert (change, merged) == ("0 [0, 0]", beside)
    assert numbers == ["0.0000", "0.0000", "0.0000", "1.000", "1.000", "1.00"]
    change, _, _, of_base, of_merged, *_ = rows["int4, symmetric"]
    assert change != "0 [0, 0]"
    assert float(of_base) > 0
    assert float(of_merged) > 0
