"""GGUF files: control vectors (repeng's and llama.cpp's own), and LoRA adapters.

``direction.N`` is added to the output of block N by llama.cpp, and is what repeng trains there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steer2edit.architecture import ModelSpec
from steer2edit.capture.vectors import Vectors
from steer2edit.checkpoint import Checkpoint
from steer2edit.checkpoint.gguf import CONTROL_VECTOR
from steer2edit.errors import DataError, PlanError, shown
from steer2edit.importers.per_layer import at_layers
from steer2edit.importers.source import Importer, Reading, Source, described
from steer2edit.plan import Base, EditPlan

if TYPE_CHECKING:
    from steer2edit.importers.source import Edits


def _read(source: Source, reading: Reading) -> Vectors | Edits:
    """A control vector, or an adapter. Raises DataError for a GGUF of anything else."""
    fields, hint, directions = source.content
    if fields.get("general.architecture") == CONTROL_VECTOR:
        return at_layers(directions, source.described("control-vector GGUF", model=hint), reading)
    if fields.get("general.type") == "adapter" and fields.get("adapter.type") == "lora":
        return GgufAdapter(source.path)
    raise DataError(
        f"{source.path} is a GGUF of {shown(fields.get('general.architecture'))} ({fields.get('general.type', 'model')}); "
        "expected a control vector or a LoRA adapter"
    )


@dataclass(frozen=True)
class GgufAdapter:
    """A LoRA adapter's file, to be read once the base is known: its names depend on the architecture."""

    path: Path

    def plan(self, checkpoint: Checkpoint, spec: ModelSpec) -> EditPlan:
        """The adapter at scale 1 as a plan. Raises DataError where it is another architecture's."""
        from steer2edit.targets.gguf import read_back

        base = Base.of(checkpoint)
        source = described(self.path, "GGUF LoRA adapter")
        try:
            plan = read_back(self.path, base, spec)
        except PlanError as error:
            raise DataError(str(error)) from None
        return EditPlan(base, plan.edits, method={"name": "imported", **source}, data={"name": source["name"]})


IMPORTERS = (
    Importer(
        "control-vector GGUF (repeng, llama.cpp) and GGUF LoRA adapters", lambda source: source.format == "gguf", _read
    ),
)
