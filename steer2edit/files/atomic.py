"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from steer2edit.errors import PlanError, Steer2EditError, TargetError, brief
from steer2edit.files.locks import exclusive
from steer2edit.files.outputs import KINDS, check_new, check_replaceable
from steer2edit.files.untrusted import open_regular
from steer2edit.files.workplace import CONTENT, make_workplace, remove_workplace, sync_file, sync_folder, sync_tree


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, whole or not at all.

    ``metadata`` names the kind of file (a key of :data:`steer2edit.files.outputs.KINDS`). Raises TargetError where the path
    is taken by another kind of file, and Steer2EditError where writing fails, as on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    kind = next((key for key in metadata if key in KINDS), None)
    try:
        with _replacing(path, kind) as temporary:
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, dict(metadata))
    except SafetensorError as error:
        raise Steer2EditError(f"cannot write {path}: {error}") from None


def write_text(path: Path, text: str, kind: str) -> None:
    """Write one text file of ``kind``, whole or not at all.

    Raises TargetError where the path is taken by another kind of file, and Steer2EditError where writing fails.
    """
    write_bytes(path, text.encode("utf-8"), kind)


def write_bytes(path: Path, data: bytes, kind: str) -> None:
    """Write one file of ``kind``, whole or not at all. Raises what :func:`write_text` raises."""
    with _replacing(path, kind) as temporary:
        temporary.write_bytes(data)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file that this project wrote. Raises PlanError if it is damaged."""
    with _open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def load_metadata(path: Path) -> dict[str, str]:
    """The metadata alone of a safetensors file. Raises PlanError if it is damaged."""
    with _open_tensors(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _open_tensors(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path) as raw:
            # a header of JSON stands after the number of its bytes
            other = raw.read(9)[8:] != b"{"
        if other:
            raise PlanError(
                f"{path} is not a safetensors file; expected a plan, statistics or vectors that steer2edit wrote"
            )
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise PlanError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise PlanError(f"{path} is not a readable safetensors file: {error}") from None


@contextmanager
def new_folder(path: Path, force: bool = False, carried: Collection[str] = ()) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and vanishes when it does not.

    Everything in it is forced to the disk first. ``carried`` are names of files of the old folder that the new one holds
    too. Raises TargetError where ``path`` exists and ``force`` is not set (with it,
    the old folder is replaced at the end), where another run is writing it, and where writing fails.
    """
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path):
            check_new(path, force, carried)
            workplace = make_workplace(path)
            try:
                temporary = workplace / CONTENT
                temporary.mkdir()
                yield temporary
                sync_tree(temporary)
                _put_in_place(temporary, path)
            finally:
                with suppress(OSError):
                    remove_workplace(workplace)
    except OSError as error:
        raise TargetError(f"cannot write {brief(path)}: {_reason(error)}") from None


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.replace(path)
        sync_folder(path.parent)
        return
    aside = make_workplace(path, "old")
    path.replace(aside / CONTENT)
    try:
        temporary.replace(path)
    except OSError:
        (aside / CONTENT).replace(path)
        remove_workplace(aside)
        raise
    sync_folder(path.parent)
    remove_workplace(aside)


@contextmanager
def _replacing(path: Path, kind: str | None) -> Iterator[Path]:
    """A temporary path whose file replaces ``path`` when the block ends well. Of several writers, the last one wins."""
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path, wait=True):
            if kind is not None:
                check_replaceable(path, kind)
            workplace = make_workplace(path)
            try:
                temporary = workplace / CONTENT
                temporary.touch()
                mode = temporary.stat().st_mode
                yield temporary
                # safetensors gives its files a mode of its own; the umask is the user's wish
                temporary.chmod(mode)
                sync_file(temporary)
                temporary.replace(path)
                sync_folder(path.parent)
            finally:
                with suppress(OSError):
                    remove_workplace(workplace)
    except OSError as error:
        raise Steer2EditError(f"cannot write {brief(path)}: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    name = f" ({brief(Path(error.filename).name)})" if isinstance(error.filename, str) else ""
    return f"{error.strerror or error}{name}"
