"""Which files an artefact's folder may hold beside those that its target proved."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from pathlib import Path, PurePosixPath

from steer2edit.files.layout import CARD, EVALUATION, INTERFERENCE, PLAN, RECEIPT, REPORT, TRADEOFF

_PROVED = frozenset({RECEIPT, PLAN})
_MEASURED = frozenset({EVALUATION, REPORT, INTERFERENCE, TRADEOFF})
# version control, and the notes of huggingface_hub on what it fetched
_TOOLS = (".git", ".gitattributes", ".gitignore", ".gitkeep", ".gitmodules", ".cache/huggingface")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".pkl")
_CODE = (".py", ".so", ".pyc")
_SETTINGS = (".json", ".jinja", ".model", ".txt", ".yaml", ".yml")


def check_folder(folder: Path, files: Set[str]) -> tuple[list[str], list[str]]:
    """What is wrong with the names in ``folder``, and remarks. ``files`` are those that the target compared.

    Allowed besides: the receipt and the plan (checked elsewhere), a card, an evaluation with its pages, and what git and
    huggingface_hub leave in a folder.
    """
    problems: list[str] = []
    notes: list[str] = []
    for name in _names(folder):
        if name in files or name in _PROVED or name == CARD or _is_tool(name):
            continue
        if name in _MEASURED:
            notes.append(f"{name} holds measurements, which are not repeated here")
        else:
            problems.append(f"{name} is neither the base's nor steer2edit's{_danger(folder / name)}; take it out")
    return problems, notes


def _names(folder: Path) -> Iterator[str]:
    """Every file, link and special file under ``folder``, hidden ones too; links to folders are not followed."""
    for place, folders, files in os.walk(folder):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in sorted(folders) if name not in links]
        yield from ((here / name).relative_to(folder).as_posix() for name in sorted([*files, *links]))


def _is_tool(name: str) -> bool:
    return any(name == tool or name.startswith(f"{tool}/") for tool in _TOOLS)


def _danger(path: Path) -> str:
    """What an unknown file may do to a loader."""
    suffix = PurePosixPath(path.name).suffix.lower()
    if path.is_symlink() and path.is_dir():
        return " (a link to a folder)"
    if suffix in _WEIGHTS:
        return ": weights that a loader may take in place of the proven ones"
    if suffix in _CODE:
        return ": code that a loader may run"
    if suffix in _SETTINGS:
        return ": a loader may read it"
    return ""
