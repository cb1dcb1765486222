"""steer2edit: compile a steering vector into a model's weights.

``compile`` is the whole pipeline; the stages are ``open_checkpoint``, ``read_spec``, ``capture_statistics``,
``make_plan``, ``emit`` and ``verify``. Names are imported on first use, so importing this package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from steer2edit.architecture import ModelSpec, Site, read_spec
    from steer2edit.artefact.emit import emit
    from steer2edit.artefact.request import CompileRequest
    from steer2edit.artefact.verify import verify
    from steer2edit.capture.run import capture_statistics
    from steer2edit.capture.statistics import Statistics
    from steer2edit.capture.vectors import Vectors
    from steer2edit.checkpoint import Checkpoint, open_checkpoint
    from steer2edit.compiler import compile
    from steer2edit.errors import Steer2EditError
    from steer2edit.importers import read_vectors
    from steer2edit.methods import make_plan
    from steer2edit.plan import EditPlan, merge

_HOME = {
    "Checkpoint": "checkpoint",
    "CompileRequest": "artefact.request",
    "EditPlan": "plan",
    "ModelSpec": "architecture",
    "Site": "architecture",
    "Statistics": "capture.statistics",
    "Steer2EditError": "errors",
    "Vectors": "capture.vectors",
    "capture_statistics": "capture.run",
    "compile": "compiler",
    "emit": "artefact.emit",
    "make_plan": "methods",
    "merge": "plan",
    "open_checkpoint": "checkpoint",
    "read_spec": "architecture",
    "read_vectors": "importers",
    "verify": "artefact.verify",
}

__all__ = [
    "Checkpoint", "CompileRequest", "EditPlan", "ModelSpec", "Site", "Statistics", "Steer2EditError", "Vectors",
    "capture_statistics", "compile", "emit", "make_plan", "merge", "open_checkpoint", "read_spec", "read_vectors", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
