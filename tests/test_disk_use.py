"""A dry run foretells what a run does, and a run that has no room does not begin."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS, run
from fp8_models import quantise
from hypothesis import given
from hypothesis import strategies as st
from kill_points import digest
from mixture_models import EXPERTS, TOP_K, mixture_config, save_mixture
from test_faults import random_plan

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.artefact.request import CompileRequest
from steer2edit.checkpoint import open_checkpoint
from steer2edit.compiler import compile
from steer2edit.data.behavior import Behavior
from steer2edit.dry_run import _active, widest_plan
from steer2edit.errors import TargetError
from steer2edit.files.workplace import process_mark
from steer2edit.lowering import Writing, resolve
from steer2edit.lowering.disk_use import check_room, disk_use
from steer2edit.lowering.rewrite import copies
from steer2edit.plan import EditPlan
from steer2edit.targets import load


def foretold(base: Path, out: Path, plan: EditPlan, to: str = "checkpoint", **how: Any) -> Any:
    checkpoint = open_checkpoint(base)
    resolved = resolve(plan, checkpoint, read_spec(checkpoint))
    return disk_use(resolved, to, out, Writing(**how), whole_model=load(to).WHOLE_MODEL)


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_the_bytes_of_a_run_are_those_foretold(tiny_llama_bf16: Path, tmp_path: Path, kind: str, link: bool) -> None:
    base = tiny_llama_bf16 if kind == "bf16" else quantise(tiny_llama_bf16, tmp_path / "fp8")
    checkpoint, plan, out = open_checkpoint(base), random_plan(base), tmp_path / "out"
    found = foretold(base, out, plan, link=link)
    assert list(tmp_path.iterdir()) == ([tmp_path / "fp8"] if kind == "fp8" else [])
    lowering = emit(plan, checkpoint, read_spec(checkpoint), "checkpoint", out, writing=Writing(link=link))
    sizes = {path: path.stat().st_size for path in out.rglob("*") if path.is_file()}
    linked = sum(size for path, size in sizes.items() if path.name in lowering.details["linked"])
    assert found.edited + found.copied + found.shared == sum(sizes[out / shard] for shard in checkpoint.shards)
    assert found.shared == linked and (linked > 0) == (link and kind == "bf16")
    assert found.tensors == len(plan.edits) and found.fits
    # plan, receipt and card are an upper bound
    assert 0 <= found.written - (sum(sizes.values()) - linked) < 2e6
    assert found.seconds is not None and found.seconds > 0 and set(found.rates) == {"copy", "edit"}


def test_an_adapter_needs_room_for_its_factors(tiny_llama_bf16: Path, tmp_path: Path) -> None:
    plan = random_plan(tiny_llama_bf16)
    found = foretold(tiny_llama_bf16, tmp_path / "out", plan, "lora")
    assert (found.edited, found.copied) != (0, 1) and found.written < 2e6 and found.seconds is None


Usage = namedtuple("Usage", "total used free")


def full(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(1 << 40, 0, free))


def test_a_run_without_room_does_not_begin(
    tiny_llama_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, plan = open_checkpoint(tiny_llama_bf16), random_plan(tiny_llama_bf16)
    full(monkeypatch, 12_345)
    with pytest.raises(TargetError, match=r"would take 0\.00 GB as checkpoint, and the disk there has 0\.00 GB free"):
        emit(plan, checkpoint, read_spec(checkpoint), "checkpoint", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_compile_looks_for_room_before_it_runs_the_model(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer2edit import compiler

    full(monkeypatch, 12_345)
    monkeypatch.setattr(compiler, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(TargetError, match="too few"):
        compile(CompileRequest(tiny_llama, tmp_path / "out", Behavior("rows", [])))


def test_leftovers_of_a_killed_run_are_removed_before_room_is_looked_for(
    tiny_llama_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".out.partial-dead"
    (left / "content").mkdir(parents=True)
    (left / "content" / "x").write_bytes(b"0" * 1000)
    (left / "steer2edit-process.json").write_bytes(process_mark())
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(1 << 40, 0, 0 if left.exists() else 1 << 30))
    checkpoint = open_checkpoint(tiny_llama_bf16)
    emit(random_plan(tiny_llama_bf16), checkpoint, read_spec(checkpoint), "checkpoint", tmp_path / "out")
    assert not left.exists()


def test_the_message_says_what_helps(tiny_llama_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, 0)
    found = foretold(tiny_llama_bf16, tmp_path / "out", random_plan(tiny_llama_bf16))
    with pytest.raises(TargetError, match="--link writes only the shards"):
        check_room(found, tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"layers": (1, 1)}, {"sites": "attn"}])
def test_the_widest_plan_follows_the_options(tiny_llama: Path, options: dict[str, Any]) -> None:
    from steer2edit.methods.steering import Options

    checkpoint = open_checkpoint(tiny_llama)
    spec = read_spec(checkpoint)
    plan = widest_plan(checkpoint, spec, "steering", Options(**{"sites": "both", **options}))
    assert len(plan.edits) == {(): 6, ("layers",): 2, ("sites",): 3}[tuple(options)]


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe", "dbrx"])
def test_only_the_chosen_experts_are_counted(tmp_path: Path, kind: str) -> None:
    checkpoint = open_checkpoint(save_mixture(tmp_path / "base", mixture_config(kind)))
    spec = read_spec(checkpoint)
    sizes = {name: math.prod(info.shape) for name, info in checkpoint.tensors.items() if len(info.shape) > 1}
    experts = sum(size for name, size in sizes.items() if "expert" in name or "linear" in name)
    others = sum(size for name, size in sizes.items() if "attn" in name or "rout" in name or "gate.weight" in name)
    active = _active(checkpoint, spec)
    assert active == pytest.approx(others + experts * TOP_K / EXPERTS)


@given(start=st.integers(0, 50_000), size=st.integers(0, 50_000))
def test_pieces_of_a_copy_are_the_range_once(start: int, size: int) -> None:
    import steer2edit.lowering.rewrite as module

    asked: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "COPY_BYTES", 8192)
        patch.setattr(module, "copy_range", lambda _s, at, _t, to, count: asked.append((at, count)) or at - to)
        for job in copies(Path("a"), Path("b"), start, start + size):
            job()
    assert [at for at, _ in asked] == [start, *[at + count for at, count in asked]][: len(asked)]
    assert sum(count for _, count in asked) == size
    # all but the ends are whole blocks of the file system
    assert all(at % 4096 == 0 for at, _ in asked[1:])


def test_dry_runs_on_the_command_line(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, plan = tmp_path / "rows.jsonl", tmp_path / "x.plan.safetensors"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    random_plan(tiny_llama).save(plan)
    before = digest(tmp_path)
    arguments = ["compile", tiny_llama, "--data", data, "--out", tmp_path / "out", "--to", "checkpoint", "--to", "lora"]
    shown = run(*arguments, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "Nothing was run or written" in shown.stdout and "16 examples" in shown.stdout
    told = json.loads(run(*arguments, "--dry-run", "--json").stdout)
    assert [one["target"] for one in told["targets"]] == ["checkpoint", "lora"] and not told["problems"]
    emitting = ["emit", plan, tiny_llama, "--to", "checkpoint", "-o", tmp_path / "out", "--dry-run"]
    assert "at most 2 matrices" in run(*emitting).stdout
    assert digest(tmp_path) == before
    full(monkeypatch, 10)
    for command in (emitting, [*arguments, "--dry-run"]):
        shown = run(*command)
        assert shown.exit_code == 1 and "Problem: " in shown.stdout
