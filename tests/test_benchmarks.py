"""Every benchmark and example can be started, and calls the package as it is: the type checker reads the benchmarks too."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path for folder in ("benchmarks", "benchmarks/engines", "examples") for path in (ROOT / folder).glob("*.py")
)
# what the scripts share
PARTS = {
    *(
        "control_vector.py",
        "greedy.py",
        "one_kl.py",
        "paper_data.py",
        "paper_experts.py",
        "paper_journal.py",
        "power_cells.py",
    ),
    *("power_table.py", "records.py", "right_choice.py", "solver_experiments.py", "synthetic.py", "timing.py"),
    *("torchvision_operators.py", "weight_formats.py"),
}


def start(script: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_prints_its_help(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if script.name in PARTS:
        start(script, monkeypatch)
        return
    with pytest.raises(SystemExit) as end:
        start(script, monkeypatch, "--help")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {script.name}")


def test_the_stages_of_emit_speed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import llama_config, save_tiny

    from steer2edit.architecture import MatrixRole, read_spec
    from steer2edit.checkpoint import open_checkpoint

    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import emit_speed
    from synthetic import random_plan, random_statistics

    model = save_tiny(tmp_path / "base", llama_config())
    checkpoint = open_checkpoint(model)
    spec = read_spec(checkpoint)
    plan, statistics, out = (str(tmp_path / name) for name in ("x.plan.safetensors", "x.stats.safetensors", "out"))
    random_plan(checkpoint, spec, {MatrixRole.ATTN_OUT, MatrixRole.MLP_OUT}).save(plan)
    random_statistics(checkpoint, spec).save(statistics)
    for stage in emit_speed.STAGES.values():
        stage(str(model), plan, statistics, out)
    assert (Path(out) / "model.safetensors").is_file()


def test_the_type_checker_reads_the_benchmarks() -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '\nfiles = ["steer2edit", "benchmarks"]\n' in settings
