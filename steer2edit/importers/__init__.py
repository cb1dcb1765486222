"""Reading what others made: steering vectors to compile, and finished low-rank edits to show, rescale and compose.

One file, one kind of source: it ends in ``IMPORTERS``, which say what they recognise and read it. What was not established
about a format is refused rather than guessed. Foreign files are parsed in a child process; pickles are read with
``weights_only=True`` only.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from steer2edit.errors import DataError, brief
from steer2edit.files.layout import ADAPTER_CONFIG
from steer2edit.importers.source import Edits, Importer, Reading, Source

if TYPE_CHECKING:
    from steer2edit.capture.vectors import Vectors

# tried in this order: the first that recognises a source reads it
ORDER = ("adapters", "saelens", "gguf", "steer2edit_paper", "llm_abliteration", "per_layer")


def importers() -> list[Importer]:
    """Every importer, in the order in which they are tried."""
    return [one for name in ORDER for one in importlib.import_module(f"steer2edit.importers.{name}").IMPORTERS]


def supported() -> str:
    """All kinds of sources, for a message."""
    return "; ".join(importer.description for importer in importers())


def read(path: str | Path, reading: Reading = Reading()) -> Vectors | Edits:  # noqa: B008
    """What is in a file or folder. Raises DataError for what is not supported, with what is."""
    path = Path(path).expanduser()
    source = Source(path)
    within = None
    try:
        path.stat()
        for importer in importers():
            if importer.recognises(source):
                return importer.read(source, reading)
        if source.format == "folder":
            within = next((one for one in sorted(path.iterdir()) if (one / ADAPTER_CONFIG).is_file()), None)
    except FileNotFoundError:
        raise DataError(f"{brief(path)} does not exist") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {brief(path)}: {getattr(error, 'strerror', None) or error}") from None
    if source.format == "folder":
        hint = f"; {within} is an adapter's folder" if within else ""
        raise DataError(
            f"{path} holds nothing that can be imported (no {ADAPTER_CONFIG}, no SAE){hint}; supported: {supported()}"
        )
    suffix = path.suffix.lower()
    raise DataError(f"{path}: files that end in {suffix or 'nothing'} are not supported; supported: {supported()}")


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
