"""Reading what others made: steering vectors to compile, and finished low-rank edits to show, rescale and compose.

One file, one kind of source. What a file holds is found by looking into it, never by its name alone; what was not
established about a format is refused rather than guessed. Pickles are read with ``weights_only=True`` and no otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from steer2edit.errors import DataError
from steer2edit.files.layout import ADAPTER_CONFIG
from steer2edit.importers.source import SUPPORTED, Edits, Reading, described

if TYPE_CHECKING:
    from steer2edit.capture.vectors import Vectors


def read(path: str | Path, reading: Reading = Reading()) -> Vectors | Edits:  # noqa: B008
    """What is in a file or folder. Raises DataError for what is not supported, with what is."""
    from steer2edit.importers import adapters, gguf, per_layer, saelens, steer2edit_paper

    path = Path(path).expanduser()
    if path.is_dir():
        if (path / ADAPTER_CONFIG).is_file():
            return adapters.read_peft(path)
        if (path / saelens.CONFIG).is_file():
            return saelens.read_sae(path, reading)
        raise DataError(f"{path} holds no {ADAPTER_CONFIG} and no {saelens.CONFIG}; supported: {SUPPORTED}")
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return gguf.read(path, reading)
    if suffix == ".safetensors":
        return per_layer.read_safetensors(path, reading)
    if suffix in (".npz", ".npy"):
        return per_layer.read_numpy(path, reading)
    if suffix in (".pt", ".pth", ".bin"):
        held = per_layer.load_pickle(path)
        if steer2edit_paper.is_directions(held):
            return steer2edit_paper.read_directions(held, described(path, "Steer2Edit directions"))
        if steer2edit_paper.is_edit_pack(held):
            return steer2edit_paper.EditPack(held, described(path, "Steer2Edit edit pack"))
        return per_layer.read_held(held, path, reading)
    raise DataError(f"{path}: files that end in {suffix or 'nothing'} are not supported; supported: {SUPPORTED}")


def read_vectors(path: str | Path, reading: Reading = Reading()) -> Vectors:  # noqa: B008
    """Steering vectors from any supported source. Raises DataError for a source of finished edits."""
    from steer2edit.capture.vectors import Vectors

    found = read(path, reading)
    if isinstance(found, Vectors):
        return found
    raise DataError(
        f"{path} holds finished edits, not steering vectors: make a plan of it with steer2edit import {path} --model MODEL -o "
        "x.plan.safetensors, and compile with --plan"
    )
