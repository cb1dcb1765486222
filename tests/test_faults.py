"""Whatever goes wrong while an artefact is written: it is there whole or not at all, and the base keeps its bytes."""

from __future__ import annotations

import builtins
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_points import digest

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.artefact.request import CompileRequest
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.errors import CheckpointError, Steer2EditError, TargetError
from steer2edit.files.atomic import new_folder, write_text
from steer2edit.files.locks import claimed, exclusive
from steer2edit.lowering import Lowering, Writing
from steer2edit.plan import Base, EditPlan, LowRank

HTML = "<!DOCTYPE html>{}Made by steer2edit"


def random_plan(folder: Path, sites: int = 2) -> EditPlan:
    checkpoint = open_checkpoint(folder)
    generator = torch.Generator().manual_seed(0)
    edits = [
        LowRank(
            site.matrix,
            torch.randn(site.out_features, 1, generator=generator),
            torch.randn(1, site.in_features, generator=generator) * 0.1,
        )
        for site in read_spec(checkpoint).sites[:sites]
    ]
    return EditPlan(Base(checkpoint.name, None, checkpoint.fingerprint), tuple(edits))


class Case:
    """A base of several shards, some of which the plan does not touch."""

    def __init__(self, base: Path, work: Path) -> None:
        self.base, self.work, self.out, self.plan = base, work, work / "out", random_plan(base)
        work.mkdir(exist_ok=True)

    def emit(self, to: str = "checkpoint", writing: Writing = Writing(), **settings: Any) -> Lowering:  # noqa: B008
        checkpoint = open_checkpoint(self.base)
        return emit(self.plan, checkpoint, read_spec(checkpoint), to, self.out, writing=writing, **settings)


@pytest.fixture
def case(tiny_llama_bf16: Path, tmp_path: Path) -> Iterator[Case]:
    before = digest(tiny_llama_bf16)
    yield Case(tiny_llama_bf16, tmp_path / "work")
    assert digest(tiny_llama_bf16) == before


@pytest.mark.parametrize("mode", ["new", "force"])
def test_a_run_killed_before_any_call_leaves_all_or_nothing(case: Case, tmp_path: Path, mode: str) -> None:
    case.plan.save(tmp_path / "x.plan.safetensors")
    script = Path(__file__).parent / "kill_points.py"
    command = [sys.executable, script, case.base, tmp_path / "x.plan.safetensors", case.work, "9", mode]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    allowed = {"new": {"nothing", "new"}, "force": {"old", "nothing", "new"}}[mode]
    assert len(runs) >= 10 and sum(run["killed"] for run in runs) == len(runs) - 1
    for run in runs:
        assert run["visible"] in allowed and run["base"] and run["again"], run
        # a lock that nobody holds, and an empty workplace, may stay where the artefact is complete: no further run came
        left = {re.sub(r"(partial)-\w+", r"\1", name) for name in run["left"]}
        assert left <= {"out", ".out.lock", *([".out.partial"] if run["visible"] == "new" else [])}, run


def fails(code: int) -> Callable[..., Any]:
    def call(*_args: object, **_kwargs: object) -> Any:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("name", ["pwrite", "copy_file_range", "preadv", "fsync", "replace", "mkdir"])
def test_a_call_that_fails_leaves_nothing(case: Case, monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    if name == "preadv" and code != errno.EIO:
        pytest.skip("reading fails in no other way")
    checkpoint, spec = open_checkpoint(case.base), read_spec(open_checkpoint(case.base))
    checkpoint.fingerprint  # noqa: B018 - read while reading works
    monkeypatch.setattr(os, name, fails(code))
    # Python 3.10's paths hold the calls of os under names of their own
    paths = getattr(pathlib, "_NormalAccessor", None)
    if hasattr(paths, name):
        monkeypatch.setattr(paths, name, staticmethod(fails(code)))
    with pytest.raises(Steer2EditError, match=os.strerror(code)):
        emit(case.plan, checkpoint, spec, "checkpoint", case.out)
    monkeypatch.undo()
    assert list(case.work.iterdir()) == []


def test_a_read_that_fails_names_the_tensor(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(case.base)
    monkeypatch.setattr(os, "preadv", fails(errno.EIO))
    with pytest.raises(CheckpointError, match=r"cannot read 'model\.norm\.weight' in model-.*Input/output error"):
        checkpoint.read("model.norm.weight")


def test_a_file_size_limit_leaves_nothing(case: Case, tmp_path: Path) -> None:
    case.plan.save(tmp_path / "x.plan.safetensors")
    code = (
        "import resource, signal, sys; from steer2edit.cli.app import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); main()"
    )
    command = [code, "emit", tmp_path / "x.plan.safetensors", case.base, "--to", "checkpoint", "-o", case.out]
    done = subprocess.run([sys.executable, "-c", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert list(case.work.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_removes_what_it_began(case: Case, tmp_path: Path, number: signal.Signals) -> None:
    case.plan.save(tmp_path / "x.plan.safetensors")
    # where the tests run in the background, children are started with SIGINT ignored
    code = (
        "import glob, os, signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"begun = lambda: bool(glob.glob({str(case.work / '.out.partial-*/*/*.safetensors')!r})); "
        "os.fsync = lambda _: time.sleep(60 * begun()); from steer2edit.cli.app import main; main()"
    )
    command = [code, "emit", tmp_path / "x.plan.safetensors", case.base, "--to", "checkpoint", "-o", case.out]
    process = subprocess.Popen([sys.executable, "-c", *map(str, command)], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(case.work.glob(".out.partial-*/*/*.safetensors")):
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) in (1, 128 + number)
    assert list(case.work.iterdir()) == []


@pytest.mark.parametrize("how", ["touched", "rewritten", "replaced", "removed"])
def test_a_base_that_changes_meanwhile_is_noticed(case: Case, tmp_path: Path, how: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(case.base, base)
    checkpoint, spec = open_checkpoint(base), read_spec(open_checkpoint(base))
    shard = base / checkpoint.shards[-1]

    def change() -> None:
        told = shard.stat()
        if how == "touched":
            os.utime(shard, ns=(told.st_atime_ns, told.st_mtime_ns + 1))
        elif how == "rewritten":
            shard.write_bytes(shard.read_bytes()[::-1])
        elif how == "replaced":
            shutil.copyfile(shard, tmp_path / "copy")
            os.utime(tmp_path / "copy", ns=(told.st_atime_ns, told.st_mtime_ns))
            (tmp_path / "copy").replace(shard)
        else:
            shard.unlink()

    @contextmanager
    def progress(stage: str, total: float) -> Iterator[Callable[[float], None]]:
        done = []

        def advance(amount: float) -> None:
            if not done:
                change()
            done.append(amount)

        yield advance

    with pytest.raises(Steer2EditError, match=r"was changed while it was read|No such file") as caught:
        emit(case.plan, checkpoint, spec, "checkpoint", case.out, writing=Writing(1), progress=progress)
    assert checkpoint.shards[-1] in str(caught.value) and list(case.work.iterdir()) == []
    if how != "removed":
        with pytest.raises(CheckpointError, match="was changed"):
            emit(case.plan, checkpoint, spec, "lora", case.out)


def test_two_runs_do_not_write_one_folder(case: Case) -> None:
    with new_folder(case.out) as folder:
        (folder / "mine").write_text("x")
        with pytest.raises(TargetError, match=rf"another run \(process {os.getpid()} on .*\) is writing"):
            case.emit()
    assert [path.name for path in case.out.iterdir()] == ["mine"]
    assert [path.name for path in case.work.iterdir()] == ["out"]


def test_a_compile_has_its_folder_from_the_start(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer2edit import compiler

    def second(*_args: object) -> None:
        # another thread stands for another process: it knows nothing of this one's claims
        with ThreadPoolExecutor(1) as pool, pytest.raises(TargetError, match="another run"):
            pool.submit(compiler.compile, request).result()
        raise CheckpointError("enough")

    monkeypatch.setattr(compiler, "load_model", second)
    request = CompileRequest(tiny_llama, tmp_path / "out", Behavior("rows", []))
    for to in (["checkpoint"], ["checkpoint", "lora"]):
        request = CompileRequest(tiny_llama, tmp_path / "out", Behavior("rows", []), to=to)
        with pytest.raises(CheckpointError, match="enough"):
            compiler.compile(request)
        assert list(tmp_path.iterdir()) == []


def test_what_is_claimed_can_be_written_by_the_claimer(case: Case) -> None:
    with claimed([case.out]):
        case.emit()
    assert [path.name for path in case.work.iterdir()] == ["out"]


def test_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    threads = [
        threading.Thread(target=write_text, args=(path, HTML.format(str(n) * 10_000), "report")) for n in range(6)
    ]
    with exclusive(path):
        for thread in threads:
            thread.start()
        assert not path.exists()
    for thread in threads:
        thread.join()
    assert path.read_text() in {HTML.format(str(n) * 10_000) for n in range(6)} and [
        p.name for p in tmp_path.iterdir()
    ] == ["x.json"]


def test_everything_is_on_the_disk_before_it_is_renamed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def note_replace(source: Any, target: Any) -> None:
        if str(target) == str(case.out):
            names = {str(path) for path in [Path(source), *Path(source).rglob("*")]}
            assert names <= set(synced)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    case.emit()
    assert synced[-1] == str(case.work)


def test_linked_shards_are_the_bases_and_edited_ones_are_not(case: Case) -> None:
    lowering = case.emit(writing=Writing(link=True))
    edited = {open_checkpoint(case.base).tensors[edit.tensor].shard for edit in case.plan.edits}
    linked = {path.name for path in case.out.glob("*.safetensors") if path.samefile(case.base / path.name)}
    assert linked == {path.name for path in case.base.glob("*.safetensors")} - edited == set(lowering.details["linked"])
    assert edited and "hard links" in lowering.notes[-1]


def test_nothing_is_opened_for_writing_but_what_was_made_here(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = builtins.open

    def watched(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not isinstance(file, int) and set(mode) & set("wxa+"):
            assert not Path(file).exists() or Path(file).stat().st_nlink == 1, f"{file} is a link"
        return opened(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", watched)
    case.emit(writing=Writing(link=True))
    case.emit(writing=Writing(link=True), force=True)


def test_a_link_that_cannot_be_made_is_a_copy(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.emit()
    copied = digest(case.out)
    monkeypatch.setattr(os, "link", fails(errno.EXDEV))
    assert case.emit(writing=Writing(link=True), force=True).details["linked"] == []
    assert digest(case.out) == copied


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_bytes_do_not_depend_on_the_number_of_jobs(case: Case, jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case.emit()
    whole = digest(case.out)
    monkeypatch.setattr("steer2edit.lowering.rewrite.COPY_BYTES", 1000)
    case.emit(writing=Writing(jobs), force=True)
    assert digest(case.out) == whole
