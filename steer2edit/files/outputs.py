"""Where an output may be written: what it may replace, and how it must lie to the inputs.

A folder replaces an artefact of this program and nothing else. A file replaces a file of its own kind, which is known by its
content. An output and an input may not contain each other.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from steer2edit.errors import TargetError, brief, listing
from steer2edit.files.layout import CARD, RECEIPT
from steer2edit.files.untrusted import JSON_BYTES, open_regular, parse_json, read_bytes

# kinds of files, each with the words for a message; they are recognised by _recognised
KINDS = {
    "plan": "a plan file",
    "statistics": "a statistics file",
    "vectors": "a vectors file",
    "partial": "the sums of an interrupted capture",
    "evaluation": "an evaluation file",
    "study": "a study's result file",
    "interference": "an interference file",
    "data": "the receipt of a folder of data",
    "rows": "rows of contrast data (JSON lines)",
    "report": "a report page",
    "picture": "a picture (PNG, SVG or PDF)",
}
_IN_METADATA = ("plan", "statistics", "vectors", "partial")
_IN_FORMAT = ("evaluation", "study", "interference", "data")
_HEADER_BYTES = 100 << 20
_PICTURES = (b"\x89PNG", b"%PDF")
# what the system and Python leave in any folder
_LITTER = frozenset(["__pycache__", ".DS_Store", "Thumbs.db", "desktop.ini"])


def check_new(path: Path, force: bool = False, carried: Collection[str] = ()) -> None:
    """Raise TargetError unless an artefact's folder may be made at ``path``.

    The path is absent, or an empty folder, or, with ``force``, an artefact that holds nothing but its own files and those
    named in ``carried``, which the new folder will hold too.
    """
    try:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise TargetError(f"{path} exists and is not a folder")
        if not path.exists() or not any(path.iterdir()):
            return
        if not force:
            raise TargetError(f"{path} exists; give another folder, or --force to replace it")
        if not (path / RECEIPT).is_file():
            raise TargetError(
                f"{path} holds files and is not an artefact of steer2edit (no {RECEIPT}); it is not replaced"
            )
        if foreign := [name for name in foreign_files(path) if name not in carried]:
            raise TargetError(
                f"{path} holds files that steer2edit did not write, and they would be lost with it:\n{listing(foreign)}\n"
                "Move them away, or give another folder."
            )
    except OSError as error:
        raise TargetError(f"cannot write {brief(path)}: {error.strerror or error}") from None


def foreign_files(folder: Path) -> list[str]:
    """Names in an artefact's folder that are neither on its receipt nor written later by this program. Raises OSError."""
    try:
        receipt = parse_json(read_bytes(folder / RECEIPT, JSON_BYTES))
    except ValueError:
        receipt = None
    files = receipt.get("files") if isinstance(receipt, dict) else None
    known = {RECEIPT, CARD, *(name for name in (files if isinstance(files, list) else ()) if isinstance(name, str))}
    found = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in [*names, *links]:
            place = (Path(root) / name).relative_to(folder).as_posix()
            parts = PurePosixPath(place).parts
            # steer2edit/ is this program's own folder: the plan, and the pages and numbers of later commands
            if place not in known and parts[0] != "steer2edit" and not _LITTER & set(parts):
                found.append(place)
    return sorted(found)


def check_new_file(path: str | Path, kind: str, force: bool = False) -> None:
    """Raise TargetError unless a file of ``kind`` (a key of :data:`KINDS`) may be written at ``path``.

    The path is absent, or, with ``force``, a file of the same kind; the kind is read from the file's content.
    """
    path = Path(path).expanduser()
    check_replaceable(path, kind)
    if os.path.lexists(path) and not force:
        raise TargetError(f"{path} exists; give another file, or --force to replace it")


def check_replaceable(path: Path, kind: str) -> None:
    """Raise TargetError where ``path`` exists and is not a file of ``kind``."""
    try:
        os.lstat(path)  # also says which names no file system takes
        if path.is_dir():
            raise TargetError(f"{path} is a folder; give a file, for {KINDS[kind]}")
        if not _recognised(path, kind):
            raise TargetError(f"{path} exists and is not {KINDS[kind]}; it is not replaced, give another file")
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise TargetError(f"cannot write {brief(path)}: {getattr(error, 'strerror', None) or error}") from None


def check_apart(out: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raise TargetError where an output is one of the inputs, lies in one, or contains one; links are resolved.

    ``inputs`` are files and folders that are read: a base's folder and its shards, a plan, an adapter.
    """
    try:
        place = Path(out).expanduser().resolve()
        for given in inputs:
            source = Path(given).expanduser().resolve()
            if not source.exists():
                continue  # a name on the Hub
            if place == source:
                raise TargetError(f"{out} is the input {given} itself; give another place for the output")
            if source.is_dir() and source in place.parents:
                raise TargetError(f"{out} lies in {given}, which is read; give a place for the output outside it")
            if place in source.parents:
                raise TargetError(
                    f"{out} contains {given}, which is read and would be lost; give another place for the output"
                )
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise TargetError(f"cannot write {brief(out)}: {getattr(error, 'strerror', None) or error}") from None


def _recognised(path: Path, kind: str) -> bool:
    try:
        if kind in _IN_METADATA:
            return kind in _metadata(path)
        if kind in _IN_FORMAT:
            content = parse_json(read_bytes(path, JSON_BYTES))
            return isinstance(content, dict) and str(content.get("format", "")).startswith(f"steer2edit.{kind}.")
        with open_regular(path) as file:
            head = file.read(1000)
            file.seek(-min(os.fstat(file.fileno()).st_size, 4000), os.SEEK_END)
            tail = file.read()
    except (OSError, ValueError):
        return False
    if kind == "rows":
        return not head or head.startswith(b'{"prompt": ')
    if kind == "report":
        return head.startswith(b"<!DOCTYPE html>") and b"Made by steer2edit" in tail
    return head.startswith(_PICTURES) or b"<svg" in head


def is_own_file(path: Path) -> bool:
    """Whether a safetensors file is a plan, statistics, vectors or a capture's sums, and not weights."""
    try:
        return not set(_IN_METADATA).isdisjoint(_metadata(path))
    except (OSError, ValueError):
        return False


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file. Raises OSError and ValueError."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_HEADER_BYTES, os.fstat(file.fileno()).st_size):
            raise ValueError("not a safetensors file")
        header = parse_json(file.read(length))
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else {}
