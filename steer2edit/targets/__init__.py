"""One file, one target: an EditPlan becomes files.

A target's module is found by its file's name. ``lowering.target.Target`` lists what it states.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
from functools import cache
from types import ModuleType

from steer2edit.errors import TargetError


def names() -> list[str]:
    """The names of all targets. Imports none of them."""
    modules = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return sorted(name.replace("_", "-") for name in modules)


def summary(name: str) -> str:
    """The target's ``SUMMARY``, one line, for help texts. Reads the source alone, so that torch is not imported.

    Empty where the file assigns no text to SUMMARY. Raises TargetError for an unknown target.
    """
    _check(name)
    return _summary(name, tuple(__path__))


@cache
def _summary(name: str, _path: tuple[str, ...]) -> str:
    spec = importlib.util.find_spec(_module(name))
    source = getattr(spec.loader, "get_source", lambda _name: None)(_module(name)) if spec else None
    for node in ast.parse(source or "").body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["SUMMARY"]:
            text = ast.literal_eval(node.value)
            if isinstance(text, str):
                return text
    return ""


def load(name: str) -> ModuleType:
    """The target called ``name``. Raises TargetError naming the known ones."""
    _check(name)
    return importlib.import_module(_module(name))


def _check(name: str) -> None:
    if name not in names():
        raise TargetError(f"there is no target {name!r}; known: {', '.join(names())}")


def _module(name: str) -> str:
    return f"{__name__}.{name.replace('-', '_')}"
