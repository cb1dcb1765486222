"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from steer2edit.errors import PlanError, Steer2EditError, TargetError
from steer2edit.files.layout import RECEIPT
from steer2edit.files.locks import exclusive, sync_file, sync_folder, sync_tree
from steer2edit.files.untrusted import open_regular


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, whole or not at all. Raises Steer2EditError where that fails, as on a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with _replacing(path) as temporary:
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, dict(metadata))
    except SafetensorError as error:
        raise Steer2EditError(f"cannot write {path}: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Write one text file, whole or not at all. Raises Steer2EditError where that fails."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file that this project wrote. Raises PlanError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise PlanError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise PlanError(f"{path} is not a readable safetensors file: {error}") from None


def check_new(path: Path, force: bool = False) -> None:
    """Raise TargetError unless a folder may be made at ``path``: it is absent, or empty, or may be replaced."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise TargetError(f"{path} exists and is no folder")
    if path.exists() and any(path.iterdir()):
        if not force:
            raise TargetError(f"{path} exists; give another folder, or --force to replace it")
        if not (path / RECEIPT).is_file():
            raise TargetError(f"{path} holds files and is no artefact of steer2edit (no {RECEIPT}); it is not replaced")


@contextmanager
def new_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and vanishes when it does not.

    Everything in it is forced to the disk first. Raises TargetError where ``path`` exists and ``force`` is not set (with it,
    the old folder is replaced at the end), where another run is writing it, and where writing fails.
    """
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path):
            check_new(path, force)
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
            try:
                temporary.chmod(0o755)
                yield temporary
                sync_tree(temporary)
                _put_in_place(temporary, path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise TargetError(f"cannot write {path}: {_reason(error)}") from None


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.replace(path)
        sync_folder(path.parent)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
    path.replace(old)
    try:
        temporary.replace(path)
    except OSError:
        old.replace(path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(old)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes ``path``'s place when the block ends well; the last of several writers wins."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path, wait=True):
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
            os.close(handle)
            temporary = Path(name)
            try:
                yield temporary
                temporary.chmod(0o644)
                sync_file(temporary)
                temporary.replace(path)
                sync_folder(path.parent)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise Steer2EditError(f"cannot write {path}: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    name = f" ({Path(error.filename).name})" if isinstance(error.filename, str) else ""
    return f"{error.strerror or error}{name}"
