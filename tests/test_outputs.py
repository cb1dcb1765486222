"""What an output may replace, and how it must lie to its inputs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from kill_points import digest
from made_reports import make_evaluation
from safetensors.torch import save_file
from test_faults import random_plan

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import artefact_folders, emit
from steer2edit.artefact.revert import revert
from steer2edit.capture.vectors import Vectors
from steer2edit.checkpoint import open_checkpoint
from steer2edit.errors import TargetError
from steer2edit.files.outputs import KINDS, check_new, check_new_file
from steer2edit.plan import Base, EditPlan

WRITERS: dict[str, Callable[[Path], Any]] = {
    "plan": lambda path: EditPlan(Base("x", None, "0" * 64), ()).save(path),
    "vectors": lambda path: Vectors({"residual.1": torch.ones(2)}).save(path),
    "evaluation": lambda path: make_evaluation().save(path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_replaces_its_own_kind_with_force_and_nothing_else(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    check_new_file(path, kind)
    WRITERS[kind](path)
    with pytest.raises(TargetError, match="--force"):
        check_new_file(path, kind)
    check_new_file(path, kind, force=True)
    for other in KINDS:
        if other != kind:
            with pytest.raises(TargetError, match="exists and is not"):
                check_new_file(path, other, force=True)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("held", ["shard", "text", "json", "folder", "link", "empty", "broken header"])
def test_the_writer_itself_refuses_another_kind(tmp_path: Path, kind: str, held: str) -> None:
    path = tmp_path / "out"
    if held == "shard":
        save_file({"a": torch.ones(3)}, path, {"format": "pt"})
    elif held == "folder":
        path.mkdir()
    elif held == "link":
        (tmp_path / "mine").write_text("mine")
        path.symlink_to("mine")
    else:
        content = {"text": b"my notes", "json": b'{"format": 3}', "empty": b"", "broken header": b"\xff" * 40}
        path.write_bytes(content[held])
    before = digest(tmp_path)
    with pytest.raises(TargetError):
        WRITERS[kind](path)
    assert digest(tmp_path) == before


@pytest.mark.parametrize("command", ["scale", "import", "diff", "report", "show"])
def test_no_command_writes_over_a_shard(tiny_llama: Path, tmp_path: Path, command: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    plan, vectors = tmp_path / "x.plan.safetensors", tmp_path / "x.pt"
    random_plan(base).save(plan)
    torch.save({1: torch.ones(32)}, vectors)
    target = base / "model.safetensors"
    before = digest(base)
    arguments: dict[str, list[object]] = {
        "scale": ["scale", plan, "--by", "2", "-o", target],
        "import": ["import", vectors, "-o", target],
        "diff": ["diff", base, tiny_llama, "-o", target],
        "report": ["report", plan, "-o", target],
        "show": ["show", plan, "--plot", base / "config.json"],
    }
    result = run(*arguments[command])
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert digest(base) == before


def names_too_long(folder: Path) -> list[Path]:
    return [folder / ("x" * 5000), folder / "/".join(["y" * 200] * 30)]


def test_names_that_no_file_system_takes_are_refused(tmp_path: Path) -> None:
    plan = tmp_path / "x.plan.safetensors"
    WRITERS["plan"](plan)
    for path in names_too_long(tmp_path):
        with pytest.raises(TargetError, match="File name too long"):
            check_new(path)
        with pytest.raises(TargetError, match="File name too long"):
            check_new_file(path, "plan")
        result = run("scale", plan, "--by", "2", "-o", path)
        assert result.exit_code == 2 and "File name too long" in result.stderr and len(result.stderr) < 1000


class Place:
    """An artefact, and a base that lies wherever a test puts it."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.folder, self.art = folder, folder / "art"
        self.source = base
        self.plan = random_plan(base)
        self.emit(base)

    def emit(self, base: Path, out: Path | None = None, to: str = "lora") -> None:
        checkpoint = open_checkpoint(base)
        emit(self.plan, checkpoint, read_spec(checkpoint), to, out or self.art, force=True)

    def base_at(self, path: Path) -> Path:
        shutil.copytree(self.source, path)
        return path


@pytest.fixture
def place(tiny_llama: Path, tmp_path: Path) -> Place:
    return Place(tiny_llama, tmp_path)


def test_a_base_inside_the_artefact_is_not_deleted(place: Place) -> None:
    base = place.base_at(place.art / "base")
    before = digest(base)
    with pytest.raises(TargetError, match="contains"):
        place.emit(base)
    # and not by another base's run either
    with pytest.raises(TargetError, match=r"did not write(.|\n)*base/config\.json"):
        place.emit(place.source)
    with pytest.raises(TargetError, match="contains"):
        artefact_folders(place.art, ["checkpoint"], True, [base])
    assert digest(base) == before


@pytest.mark.parametrize("through", ["name", "link"])
def test_an_output_inside_the_base_is_refused(place: Place, through: str) -> None:
    base = place.base_at(place.folder / "base")
    before = digest(base)
    door = base
    if through == "link":
        door = place.folder / "door"
        door.symlink_to(base)
    with pytest.raises(TargetError, match="lies in"):
        place.emit(base, door / "out")
    with pytest.raises(TargetError, match="is the input"):
        place.emit(door, base)
    assert digest(base) == before


def test_shards_that_are_links_into_the_output_are_not_lost(place: Place) -> None:
    base = place.base_at(place.folder / "base")
    (base / "model.safetensors").rename(place.art / "model.safetensors")
    (base / "model.safetensors").symlink_to(place.art / "model.safetensors")
    with pytest.raises(TargetError, match="contains"):
        place.emit(base)
    assert (base / "model.safetensors").exists()


def test_revert_keeps_its_inputs_apart(place: Place) -> None:
    out = place.folder / "checkpoint"
    place.emit(place.source, out, "checkpoint")
    base = place.base_at(out / "base")
    before = digest(place.folder)
    for target in (None, out / "inside", place.folder):
        with pytest.raises(TargetError):
            revert(out, base, target, force=True)
    assert digest(place.folder) == before


@pytest.mark.parametrize("receipt", [None, "{}", "[1]", "not JSON"])
def test_files_of_the_user_are_not_replaced_with_an_artefact(place: Place, receipt: str | None) -> None:
    if receipt is None:
        (place.art / "notes").mkdir()
        (place.art / "notes" / "mine.txt").write_text("mine")
    else:
        (place.art / "steer2edit.json").write_text(receipt)
    before = digest(place.art)
    with pytest.raises(TargetError, match="did not write"):
        place.emit(place.source)
    assert digest(place.art) == before


def test_what_later_commands_wrote_is_replaced_with_its_artefact(place: Place) -> None:
    (place.art / "steer2edit" / "evaluation.json").write_text("{}")
    (place.art / "README.md").write_text("my words")
    (place.art / ".DS_Store").write_text("")
    place.emit(place.source)
    assert not (place.art / "steer2edit" / "evaluation.json").exists()
