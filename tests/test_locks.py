"""Lock files and workplaces: only what this program made is opened, used or removed, whatever its name is."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from steer2edit.errors import TargetError
from steer2edit.files.atomic import new_folder, save_tensors
from steer2edit.files.locks import exclusive
from steer2edit.files.workplace import CONTENT, MARKER, make_workplace, process_mark


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "folder", "pipe", "other content", "JSON"])
def test_a_lock_s_name_that_is_taken_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    precious, lock = tmp_path / "precious", tmp_path / ".x.lock"
    precious.write_text("years of work")
    if kind == "link":
        lock.symlink_to(precious)
    elif kind == "dangling link":
        lock.symlink_to(tmp_path / "nothing")
    elif kind == "hard link":
        os.link(precious, lock)
    elif kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.write_text("years of work" if kind == "other content" else '{"pid": 1, "host": "here"}')
    before, names = contents(tmp_path) if kind != "pipe" else {}, sorted(tmp_path.iterdir())
    with pytest.raises(TargetError, match=r"\.x\.lock should be a lock file of steer2edit, but is"):
        save_tensors(tmp_path / "x", {"a": torch.ones(1)}, {"plan": "{}"})
    with pytest.raises(TargetError, match=r"\.x\.lock should be a lock file"), new_folder(tmp_path / "x"):
        pass
    assert sorted(tmp_path.iterdir()) == names
    assert kind == "pipe" or contents(tmp_path) == before


@pytest.mark.parametrize(
    "left", [b"", process_mark(), process_mark() + b"\0" * 4], ids=["empty", "a mark", "a mark and zeros"]
)
def test_a_lock_file_that_a_killed_run_left_is_used(tmp_path: Path, left: bytes) -> None:
    (tmp_path / ".x.lock").write_bytes(left)
    with exclusive(tmp_path / "x"):
        assert (tmp_path / ".x.lock").read_bytes() == process_mark()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["partial", "old"])
@pytest.mark.parametrize("what", ["folder", "file", "link", "marker of another", "marker beside more"])
def test_hidden_folders_of_the_user_stay(tmp_path: Path, kind: str, what: str) -> None:
    place = tmp_path / f".x.{kind}-notes"
    if what == "file":
        place.write_text("notes")
    else:
        folder = tmp_path / "elsewhere" if what == "link" else place
        folder.mkdir()
        (folder / CONTENT).mkdir()
        (folder / CONTENT / "notes.txt").write_text("notes")
        if what == "link":
            (folder / MARKER).write_bytes(process_mark())
            place.symlink_to(folder)
        elif what == "marker of another":
            (folder / MARKER).write_text('{"program": "another", "pid": 1, "host": "here"}')
        elif what == "marker beside more":
            (folder / MARKER).write_bytes(process_mark())
            (folder / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    with new_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("a")
    save_tensors(tmp_path / "y", {"a": torch.ones(1)}, {"plan": "{}"})
    found = contents(tmp_path)
    assert {**before, "x/a": b"a", "y": found["y"]} == found and os.path.lexists(place)


def test_what_a_killed_run_left_is_named_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine, other = make_workplace(tmp_path / "x"), make_workplace(tmp_path / "x.partial-1")
    for left in (mine, other):
        (left / CONTENT).mkdir()
        (left / CONTENT / "model.safetensors").write_bytes(b"half" * 250_000)
    (tmp_path / ".x.partial-empty").mkdir()  # killed before it wrote its marker
    with caplog.at_level(logging.WARNING, "steer2edit"), new_folder(tmp_path / "x"):
        pass
    assert f"removed {mine.name} (1.0 MB), left unfinished by a killed run" in caplog.messages
    # the other is what a run that writes "x.partial-1" would have
    assert sorted(tmp_path.iterdir()) == sorted([other, tmp_path / "x"])


def test_a_file_that_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    left = make_workplace(tmp_path / "x.plan.safetensors")
    (left / CONTENT).write_bytes(b"half")
    save_tensors(tmp_path / "x.plan.safetensors", {"a": torch.ones(1)}, {"plan": "{}"})
    assert [path.name for path in tmp_path.iterdir()] == ["x.plan.safetensors"]


def test_the_folder_set_aside_by_a_killed_run_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "model").write_text("whole")
    aside = make_workplace(tmp_path / "x", "old")
    (tmp_path / "x").rename(aside / CONTENT)
    refused = pytest.raises(TargetError, match="exists")
    with caplog.at_level(logging.WARNING, "steer2edit"), refused, new_folder(tmp_path / "x"):
        pass
    assert contents(tmp_path) == {"x/model": b"whole"} and "put" in caplog.messages[0]
    with exclusive(tmp_path / "x"):
        pass
    aside = make_workplace(tmp_path / "x", "old")
    (aside / CONTENT).mkdir()
    with exclusive(tmp_path / "x"):
        assert not aside.exists()
    assert contents(tmp_path) == {"x/model": b"whole"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_and_folders_respect_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "x", {"a": torch.ones(1)}, {"plan": "{}"})
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("a")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
