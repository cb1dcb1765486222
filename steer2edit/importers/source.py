"""What importers share: how a file's entries become layers, and the description of a source."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from steer2edit.options import option

if TYPE_CHECKING:
    from steer2edit.architecture import ModelSpec
    from steer2edit.checkpoint import Checkpoint
    from steer2edit.plan import EditPlan

SUPPORTED = (
    "control-vector GGUF (repeng, llama.cpp), SteeringVector files of the steering-vectors library, per-layer .pt, .npz, .npy "
    "and .safetensors, Steer2Edit's direction files and edit packs, SAELens folders, PEFT and GGUF LoRA adapters"
)


@dataclass(frozen=True)
class Reading:
    """How a file's entries become layers; the fields are flags of ``steer2edit import``.

    Entry i of ``hidden_states`` in transformers is the stream before block i, hence the offset of -1.
    """

    layers: tuple[int, int] | None = option(
        None, "First and last layer that a file's single vector goes to, such as 4-20, or one layer, such as 12."
    )
    offset: int = option(
        0, "Number to add to every layer of the file; -1 for files numbered as transformers' hidden_states."
    )
    features: tuple[int, ...] = option((), "SAE feature to read; several add up. Repeatable.", "--feature")


class Edits(Protocol):
    """Low-rank edits that are not yet tied to a base."""

    def plan(self, checkpoint: Checkpoint, spec: ModelSpec) -> EditPlan:
        """The same as a plan for ``checkpoint``. Raises DataError where they do not fit it."""
        ...


def described(path: Path, kind: str, **more: Any) -> dict[str, Any]:
    """The source of what was read: format, name, and the file's SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return {"format": kind, "name": path.stem, "file": path.name, "sha256": digest.hexdigest(), **more}
