"""One file, one method: scores in, an EditPlan out.

A method module has a frozen dataclass ``Options`` and a function ``plan(scoring, options, progress) ->
EditPlan``. It is found by its file's name; methods never import each other.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from steer2edit.errors import Steer2EditError


def names() -> list[str]:
    """The methods there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The method called ``name``. Raises Steer2EditError naming the known ones."""
    if name not in names():
        raise Steer2EditError(f"there is no method {name!r}; known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")
