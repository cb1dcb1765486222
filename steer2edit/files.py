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

RECEIPT = "steer2edit.json"


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file by way of a temporary one beside it. Raises Steer2EditError on a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise Steer2EditError(f"cannot write {path}: {error.strerror or error}") from None
    temporary = Path(name)
    try:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, dict(metadata))
        temporary.chmod(0o644)
        temporary.replace(path)
    except (SafetensorError, OSError) as error:
        raise Steer2EditError(f"cannot write {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write one text file by way of a temporary one beside it. Raises Steer2EditError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise Steer2EditError(f"cannot write {path}: {error.strerror or error}") from None


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file that this project wrote. Raises PlanError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
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

    Raises TargetError where ``path`` exists and ``force`` is not set; with it, the old folder is replaced at the end.
    """
    path = path.expanduser()
    check_new(path, force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
        temporary.chmod(0o755)
    except OSError as error:
        raise TargetError(f"cannot create {path}: {error.strerror or error}") from None
    try:
        yield temporary
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
            path.replace(old)
            try:
                temporary.replace(path)
            except OSError:
                old.replace(path)
                raise
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    except OSError as error:
        raise TargetError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
