"""One file, one target: an EditPlan becomes files.

A target module has ``lower(plan, checkpoint, spec, folder, progress) -> Lowering``, found by its file's name. It answers
*exact* or *approximate* in the Lowering, or refuses by a TargetError that says why; it never skips an edit.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from steer2edit.errors import TargetError


def names() -> list[str]:
    """The targets there are."""
    found = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return sorted(name.replace("_", "-") for name in found)


def load(name: str) -> ModuleType:
    """The target called ``name``. Raises TargetError naming the known ones."""
    if name not in names():
        raise TargetError(f"there is no target {name!r}; known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
