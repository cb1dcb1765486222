"""The control-vector target: the plan's mean effect as run-time steering for llama.cpp.

A control vector adds one direction to the stream after each block, at every token. Of an edit ``B A`` it can carry the
constant part alone: ``B (A x_bar)``, the edit's mean effect on its own data (``lowering.constant_part``).
An edit also acts more on some tokens than on others. That part is lost, so this target is *approximate*; ``verify`` measures the
error. A plan whose edits are biases of writers that end their blocks is a control vector already, and carried exactly.
llama.cpp has no direction for block 0. Block 0's part joins block 1's: every later block reads it as before, and only
block 1 itself reads the stream without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steer2edit.architecture.constants import ends_block
from steer2edit.architecture.stream import block_scale
from steer2edit.checkpoint.gguf import CONTROL_VECTOR, Fields, read_control_vector, write_gguf
from steer2edit.errors import TargetError
from steer2edit.lowering import (
    Change,
    Comparison,
    HubEntry,
    Lowering,
    Place,
    Resolved,
    Snippet,
    StreamShift,
    Writing,
    compare_with_lowered,
)
from steer2edit.lowering.constant_part import check_constant_parts, constant_parts
from steer2edit.plan import Bias, LowRank
from steer2edit.progress import Progress

SUMMARY = "A control vector for llama.cpp: the plan's mean effect, added at run time."
HUB = HubEntry(
    "A control vector for llama.cpp, made by steer2edit: run-time steering with the mean effect of a compiled edit.",
    "adapter",
    "gguf",
    ("control-vector", "gguf"),
)
WHOLE_MODEL = False
STRUCTURE = False
FILE = "control-vector.gguf"


def check(resolved: Resolved) -> None:
    """Raise TargetError for plans whose mean effect is not known."""
    if not resolved.edits:
        raise TargetError("the plan is empty; there is nothing for a control vector to carry")
    if resolved.spec.layers < 2:
        raise TargetError("llama.cpp adds control vectors from the second block on, and this model has one")
    check_constant_parts(resolved.plan, resolved.spec)


def lower(resolved: Resolved, folder: Path, writing: Writing, progress: Progress) -> Lowering:
    """Write ``control-vector.gguf`` into ``folder``. Raises TargetError for plans whose mean effect is not known."""
    check(resolved)
    spec = resolved.spec
    vectors = constant_parts(resolved.plan, resolved.checkpoint, spec)
    moved = 0 in vectors
    if moved:
        # block 1 multiplies what block 0 has written, too, by its factor
        vectors[1] = vectors.pop(0) * block_scale(resolved.checkpoint, spec, 1) + vectors.get(1, 0)
    tensors = {f"direction.{layer}": vectors[layer] for layer in sorted(vectors)}
    fields: Fields = {f"{CONTROL_VECTOR}.model_hint": spec.model_type, f"{CONTROL_VECTOR}.layer_count": len(tensors)}
    write_gguf(folder / FILE, CONTROL_VECTOR, tensors, fields)
    changes = tuple(Change(name, "ControlVector", float(vector.double().norm())) for name, vector in tensors.items())
    notes: tuple[str, ...] = ()
    if any(isinstance(edit, LowRank) for edit in resolved.plan.edits):
        notes += (
            "Carries each edit's mean effect on its own data, at every token alike. "
            "The weights act more on some tokens than on others.",
        )
    elif not _exact(resolved):
        notes += ("A constant in the middle of a block is added at its end.",)
    if moved:
        notes += ("Block 0's part is added after block 1: llama.cpp has no direction for block 0.",)
    exactness = "exact" if _exact(resolved) else "approximate"
    return Lowering(exactness, changes, notes, {"files": [FILE], "layers": sorted(vectors)})


def verify(resolved: Resolved, folder: Path, progress: Progress) -> Comparison:
    """Compare the control vector with the one that the plan gives."""
    return compare_with_lowered(lower, resolved, folder, progress)


def loadable(resolved: Resolved, folder: Path) -> StreamShift:
    """The file's directions, by block."""
    _, vectors = read_control_vector(folder / FILE)
    return StreamShift(vectors, exact=_exact(resolved))


def _exact(resolved: Resolved) -> bool:
    """Whether a plan is constants alone, each where its block ends; block 0 has no direction."""
    return all(
        isinstance(edit, Bias) and site.layer > 0 and ends_block(resolved.spec, site)
        for edit, site in resolved.edits.values()
    )


def load_snippet(place: Place) -> Snippet:
    """By llama.cpp."""
    fetch = (f"hf download {place.repository} {FILE} --local-dir .",) if place.repository else ()
    remark = f"base.gguf is any GGUF of {place.base.name}."
    return Snippet("console", (*fetch, f"llama-server -m base.gguf --control-vector {place.file(FILE)}"), remark)


def loading_files(folder: Path, names: Sequence[str]) -> set[str]:
    """All files: the target wrote each of them for loading."""
    return set(names)
