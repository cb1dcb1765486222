"""What importers share: the file that is read, how its entries become layers, and the description of a source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from steer2edit.errors import DataError
from steer2edit.files.untrusted import open_regular
from steer2edit.options import option

if TYPE_CHECKING:
    from steer2edit.architecture import ModelSpec
    from steer2edit.capture.vectors import Vectors
    from steer2edit.checkpoint import Checkpoint
    from steer2edit.plan import EditPlan


@dataclass(frozen=True)
class Reading:
    """How a file's entries become layers; the fields are flags of ``steer2edit import``.

    Entry i of ``hidden_states`` in transformers is the stream before block i, hence the offset of -1. ``edited`` are the
    layers that an edit is limited to: a single vector goes there, where ``layers`` is not given.
    """

    layers: tuple[int, int] | None = option(
        None, "First and last layer that a file's single vector goes to, such as 4-20, or one layer, such as 12."
    )
    offset: int = option(
        0, "Number to add to every layer of the file; -1 for files numbered as transformers' hidden_states."
    )
    features: tuple[int, ...] = option((), "SAE feature to read; several add up. Repeatable.", "--feature")
    edited: tuple[int, int] | None = None


class Edits(Protocol):
    """Low-rank edits that are not yet tied to a base."""

    def plan(self, checkpoint: Checkpoint, spec: ModelSpec) -> EditPlan:
        """The same as a plan for ``checkpoint``. Raises DataError where they do not fit it."""
        ...


@dataclass(frozen=True)
class Source:
    """A file or folder to be read. It is parsed once, in a child process."""

    path: Path

    @cached_property
    def format(self) -> str:
        """``folder``, ``gguf``, ``safetensors``, ``numpy`` or ``torch``, by the first bytes, or else the suffix; or empty."""
        if self.path.is_dir():
            return "folder"
        with open_regular(self.path) as file:
            head = file.read(9)
        suffix = self.path.suffix.lower()
        if head[:4] == b"GGUF" or suffix == ".gguf":
            return "gguf"
        if head[8:] == b"{" or suffix == ".safetensors":
            return "safetensors"
        if head[:6] == b"\x93NUMPY" or suffix in (".npz", ".npy"):
            return "numpy"
        # a torch file is a ZIP archive, and was a pickle
        return "torch" if head[:4] == b"PK\x03\x04" or suffix in (".pt", ".pth", ".bin") else ""

    @cached_property
    def content(self) -> Any:
        """What the parser of this format makes of the file. Raises DataError."""
        from steer2edit.importers import parse

        function = {
            "gguf": parse.gguf_file,
            "safetensors": parse.safetensors_file,
            "numpy": parse.numpy_file,
            "torch": parse.torch_file,
        }[self.format]
        return parse.parsed(function, self.path)

    def described(self, kind: str, **more: Any) -> dict[str, Any]:
        """The source of vectors or edits: format, name, and the file's SHA-256."""
        return described(self.path, kind, **more)


@dataclass(frozen=True)
class Importer:
    """One kind of source: what it is called, how it is recognised, and how it is read.

    ``description`` completes "supported: …". ``recognises`` looks at the format and content, never at the name alone.
    ``read`` raises DataError for what is recognised and cannot be used.
    """

    description: str
    recognises: Callable[[Source], bool]
    read: Callable[[Source, Reading], Vectors | Edits]


def described(path: Path, kind: str, **more: Any) -> dict[str, Any]:
    """The source of what was read: format, name, and the file's SHA-256. Raises DataError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while data := file.read(1 << 20):
                digest.update(data)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    return {"format": kind, "name": path.stem, "file": path.name, "sha256": digest.hexdigest(), **more}
