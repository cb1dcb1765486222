"""One file, one target: an EditPlan becomes files.

A target's module is found by its file's name. ``lowering.target.Target`` lists what it states.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, cast

from steer2edit.errors import TargetError

if TYPE_CHECKING:
    from steer2edit.checkpoint import Checkpoint
    from steer2edit.lowering import Target
    from steer2edit.plan import EditPlan


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


def load(name: str) -> Target:
    """The target called ``name``. Raises TargetError for an unknown one, and where its module does not state everything."""
    from steer2edit.lowering.target import MEMBERS

    _check(name)
    module = importlib.import_module(_module(name))
    if missing := [member for member in MEMBERS if not hasattr(module, member)]:
        raise TargetError(f"the target {name!r} ({module.__file__}) lacks {', '.join(missing)}")
    return cast("Target", module)


def check_structure(name: str, plan: EditPlan) -> None:
    """Raise TargetError where a plan removes experts or layers and the target cannot carry that."""
    if plan.structure and not load(name).STRUCTURE:
        able = " or ".join(f"--to {one}" for one in names() if load(one).STRUCTURE)
        what = "layers" if plan.structure.layers else "experts, or change how many each token passes through"
        raise TargetError(f"{name} cannot remove {what}; use {able}")


def check_quantised(name: str, checkpoint: Checkpoint) -> None:
    """Raise TargetError where a target writes whole models and the base is in a quantised format that is not written."""
    if checkpoint.quantisation is None or not load(name).WHOLE_MODEL:
        return
    able = ", ".join(f"--to {one}" for one in names() if not load(one).WHOLE_MODEL)
    raise TargetError(
        f"{checkpoint.name} is quantised ({checkpoint.quantisation.text}), and of quantised formats {name} writes only fp8 with "
        f"block scales. An adapter is exact beside the quantised matrices, and is not rounded into them: {able}. Or write the "
        "edit into the unquantised model, and quantise the result: compile that model with --to checkpoint, or emit this "
        "model's plan into the model that --weights named"
    )


def _check(name: str) -> None:
    if name not in names():
        raise TargetError(f"there is no target {name!r}; known: {', '.join(names())}")


def _module(name: str) -> str:
    return f"{__name__}.{name.replace('-', '_')}"
