"""Refusals that are foreseen: a dry run says what emit or compile would refuse, with the same words and exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, llama_config, run, save_tiny
from family_configs import family_config
from mixture_models import mixture_config, save_mixture
from test_faults import random_plan

from steer2edit import targets
from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import check_carried, emit
from steer2edit.artefact.foresee import foreseen_refusals
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.cli.options import ModelFlags
from steer2edit.dry_run import check_targets, widest_plan
from steer2edit.errors import TargetError
from steer2edit.methods import constant, rotation, silence, steering, transport
from steer2edit.plan import Base, EditPlan, LowRank, Scale, Structure


def plans(folder: Path) -> dict[str, EditPlan]:
    """Plans of which every target refuses some."""
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    site = spec.sites[0]
    rows = Scale(site.matrix, torch.full((site.out_features,), 2.0).double(), "rows")
    return {
        "empty": EditPlan(Base.of(checkpoint), ()),
        "rows": EditPlan(Base.of(checkpoint), (rows,)),
        "layers": EditPlan(Base.of(checkpoint), (), structure=Structure(layers=(0,))),
        "new biases": widest_plan(checkpoint, spec, "constant", constant.Options()),
        "low rank": random_plan(folder),
        "all layers": EditPlan(Base.of(checkpoint), (), structure=Structure(layers=(0, 1, 2))),
    }


@pytest.mark.parametrize("target", targets.names())
def test_the_dry_run_of_emit_refuses_what_emit_refuses(tiny_llama: Path, target: str, tmp_path: Path) -> None:
    if target.startswith("gguf"):
        pytest.importorskip("gguf")
    refused = 0
    for name, plan in plans(tiny_llama).items():
        file, out = tmp_path / f"{name}.plan.safetensors", tmp_path / f"{name} out"
        plan.save(file)
        dry = run("emit", file, tiny_llama, "--to", target, "-o", out, "--dry-run")
        assert not out.exists()
        real = run("emit", file, tiny_llama, "--to", target, "-o", out)
        assert (dry.exit_code, real.exit_code) in ((0, 0), (2, 2)), (name, dry.output, real.output)
        if real.exit_code:
            assert dry.stderr.splitlines()[-3:] == real.stderr.splitlines()[-3:] and not out.exists()
            refused += 1
    assert refused == {"checkpoint": 1, "lora": 4}.get(target, 5)


def opened(folder: Path) -> tuple[Checkpoint, Any]:
    checkpoint = open_checkpoint(folder)
    return checkpoint, read_spec(checkpoint)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> tuple[Checkpoint, Any]:
    return opened(tiny_llama)


@pytest.mark.parametrize(
    ("method", "options", "target", "words"),
    [
        ("constant", constant.Options(), "mlx", "a bias"),
        ("rotation", rotation.Options(), "gguf-vector", "changes what a block reads"),
        ("silence", silence.Options(components="layer.1", prune=True), "lora", "cannot remove layers"),
        ("silence", silence.Options(components="attn.1.h2"), "gguf-vector", "scaled rows or columns add no vector"),
        ("transport", transport.Options(), "gguf-vector", "scaled rows or columns add no vector"),
        ("steering", steering.Options(), "gguf-vector", ""),
        ("silence", silence.Options(components="layer.1", prune=True), "checkpoint", ""),
        ("constant", constant.Options(), "lora", ""),
        ("constant", constant.Options(stand_in=True), "mlx", ""),
        ("silence", silence.Options(strongest=1), "lora", ""),
    ],
)
def test_what_a_target_refuses_of_a_method_is_known_before_there_is_a_plan(
    llama: tuple[Checkpoint, Any], method: str, options: Any, target: str, words: str
) -> None:
    checkpoint, spec = llama
    widest = widest_plan(checkpoint, spec, method, options)
    if not words:
        assert foreseen_refusals(widest, checkpoint, spec, [target]) == ()
        return
    with pytest.raises(TargetError, match=words):
        foreseen_refusals(widest, checkpoint, spec, [target])


def test_what_depends_on_the_plan_is_a_doubt(llama: tuple[Checkpoint, Any], tmp_path: Path) -> None:
    checkpoint, spec = llama
    # factors of all rows are of full rank, and those of some are not
    widest = widest_plan(checkpoint, spec, "transport", transport.Options())
    (doubt,) = foreseen_refusals(widest, checkpoint, spec, ["checkpoint", "lora"])
    assert doubt.startswith("lora, by what the plan edits:") and "full rank" in doubt
    few = Scale(spec.sites[0].matrix, torch.tensor([2.0] + [1.0] * (spec.sites[0].out_features - 1)).double(), "rows")
    check_carried(EditPlan(Base.of(checkpoint), (few,)), checkpoint, spec, ["lora"])
    # an adapter may carry attention's writers, and not the experts
    mixed, mixed_spec = opened(save_mixture(tmp_path / "mixture", mixture_config("dbrx")))
    widest = widest_plan(mixed, mixed_spec, "steering", steering.Options(sites="both"))
    (doubt,) = foreseen_refusals(widest, mixed, mixed_spec, ["lora"])
    assert "an expert among several" in doubt
    attention = next(site for site in mixed_spec.sites if site.expert is None)
    edit = LowRank(attention.matrix, torch.ones(attention.out_features, 1), torch.ones(1, attention.in_features))
    emit(EditPlan(Base.of(mixed), (edit,)), mixed, mixed_spec, "lora", tmp_path / "lora")


def test_compile_and_its_dry_run_refuse_before_the_model_is_loaded(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.setattr("steer2edit.compiler.load_model", lambda *_: pytest.fail("the model was loaded"))
    told = []
    for dry in (["--dry-run"], []):
        arguments = [
            "compile",
            tiny_llama,
            "--data",
            data,
            "--method",
            "constant",
            "--to",
            "mlx",
            "-o",
            tmp_path / "out",
        ]
        result = run(*arguments, *dry)
        assert result.exit_code == 2 and "a bias" in result.stderr, result.output
        told.append(result.stderr.splitlines()[-1])
    assert told[0] == told[1] and not (tmp_path / "out").exists()
    dry_run = ["compile", tiny_llama, "--data", data, "--method", "transport", "--to", "lora", "--dry-run"]
    shown = run(*dry_run, "-o", tmp_path / "out")
    assert shown.exit_code == 0 and "May be refused: lora" in shown.stdout, shown.output
    assert len(json.loads(run(*dry_run, "-o", tmp_path / "out", "--json").stdout)["may_be_refused"]) == 1


def test_a_family_without_a_name_in_llama_cpp_is_refused_by_the_dry_run(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "gptj", family_config("gptj"))
    file = tmp_path / "x.plan.safetensors"
    random_plan(folder).save(file)
    refused = run("emit", file, folder, "--to", "gguf", "-o", tmp_path / "out", "--dry-run")
    assert (
        refused.exit_code == 2 and "llama.cpp's architecture for the model type 'gptj' is not known" in refused.stderr
    )
    one_layer = save_tiny(tmp_path / "one", llama_config(num_hidden_layers=1))
    checkpoint, spec = opened(one_layer)
    with pytest.raises(TargetError, match="this model has one"):
        foreseen_refusals(
            widest_plan(checkpoint, spec, "steering", steering.Options()), checkpoint, spec, ["gguf-vector"]
        )


def test_tune_refuses_a_target_that_carries_no_plan_of_its_methods(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, spec = opened(tiny_llama)
    check_targets(checkpoint, spec, ["constant", "steering"], ["mlx", "lora"])
    monkeypatch.setattr(ModelFlags, "load", lambda *_: pytest.fail("the model was loaded"))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    refused = run(
        "tune",
        tiny_llama,
        "--data",
        data,
        "--eval",
        data,
        "--method",
        "constant",
        "--to",
        "mlx",
        "-o",
        tmp_path / "study",
    )
    assert refused.exit_code == 2 and "a bias" in refused.stderr, refused.output
