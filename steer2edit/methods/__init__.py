"""One file, one method: scores in, an EditPlan out.

A method module has a frozen dataclass ``Options`` and a function ``plan(scoring, options, progress) ->
EditPlan``. It is found by its file's name; methods never import each other. The fields of ``Options`` that
``steer2edit.options.option`` makes are flags of the command line, and those with a ``search`` are tried by ``tune``. The command
line imports every method for its ``--help``: what is heavy, such as torch, is imported inside functions.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from steer2edit.errors import PlanError, Steer2EditError, listing
from steer2edit.notices import notice
from steer2edit.options import DISCRIMINATIVE
from steer2edit.progress import Progress, silent

if TYPE_CHECKING:
    from steer2edit.architecture import ModelSpec
    from steer2edit.capture.statistics import Statistics
    from steer2edit.plan import EditPlan
    from steer2edit.scoring.scores import Scoring


def names() -> list[str]:
    """The methods there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> ModuleType:
    """The method called ``name``. Raises Steer2EditError naming the known ones."""
    if name not in names():
        raise Steer2EditError(f"there is no method {name!r}; known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


METHOD = "steering"


def make_plan(
    scoring: Scoring,
    *,
    method: str = METHOD,
    options: Any = None,
    progress: Progress = silent,
) -> EditPlan:
    """Score every component and lay down the edits; reads each writer once, and runs no model but for ``Scoring.runs``.

    Raises PlanError where the statistics are of another model, or show no difference of the classes, or too few prompts
    to tell which components are stable.
    """
    from steer2edit.scoring.discriminative import discriminative_layers, within
    from steer2edit.scoring.mean_effect import record_mean_effect

    checkpoint, statistics = scoring.checkpoint, scoring.statistics
    statistics.check_model(checkpoint)
    module = load(method)
    if not needs_no_statistics(options):
        statistics.check_contrast()
    if statistics.examples["keep"] and not hasattr(module.Options, "keep_as"):
        notice(f"the method {method} does not know the texts of --keep: its edit may push on them")
    options = module.Options() if options is None else options
    chosen = None
    if getattr(options, "layers", None) == DISCRIMINATIVE:
        chosen = discriminative_layers(statistics, scoring.spec)
        options = replace(options, layers=(chosen[0], chosen[-1]))
    limited = scoring if chosen is None else replace(scoring, spec=within(scoring.spec, chosen))
    plan: EditPlan = module.plan(limited, options, progress)
    if wrong := [
        edit.tensor for edit in plan.edits if not all(bool(t.isfinite().all()) for t in edit.parts().values())
    ]:
        raise PlanError(f"the edits of the method {method} with these options are not finite:\n{listing(wrong)}")
    if chosen is not None:
        plan = replace(plan, method={**plan.method, "discriminative_layers": chosen})
    if scoring.untested is not None:
        if not plan.edits:
            raise PlanError(f"{scoring.untested}; give more rows, or --all-components, which edits without that test")
        notice(f"{scoring.untested}: this plan may carry what is particular to these prompts")
    plan = record_mean_effect(plan, scoring.spec, statistics)
    plan = plan.computed_from(checkpoint, scoring.spec)
    checkpoint.check_unchanged()
    data = describe_data(statistics)
    if (quantisation := checkpoint.quantisation) is not None:
        data["quantised"] = quantisation.described()
        origin = quantisation.weights
        source = (
            "the numbers that its matrices stand for"
            if origin is None
            else f"the unquantised {origin['name']}, from which its own differ by {origin['largest_difference']:.2f} of the norm "
            "at most"
        )
        notice(f"{checkpoint.name} is quantised ({quantisation.text}): the plan is computed from {source}")
    return replace(plan, data=data)


def edited_layers(options: Any) -> tuple[int, int] | None:
    """The first and last layer that a method's options name; None for all, or for those that the statistics decide."""
    layers = getattr(options, "layers", None)
    return None if layers == DISCRIMINATIVE else layers


def needs_no_statistics(options: Any) -> bool:
    """Whether a method's options ask for nothing that is captured."""
    return bool(getattr(options, "without_statistics", False))


def covariance_layers(name: str, options: Any, spec: ModelSpec) -> tuple[int, ...]:
    """The layers after which a method with these options needs the whole covariance of the stream."""
    asked = getattr(load(name), "covariance_layers", None)
    return () if asked is None or options is None else tuple(asked(spec, options))


def runs_the_model(name: str) -> bool:
    """Whether a method makes use of the loaded model and the contrast data, where ``Scoring.runs`` has them."""
    return bool(getattr(load(name), "RUNS_THE_MODEL", False))


def own_strength(options: Any) -> float | None:
    """The strength that a method's options ask for where neither strength nor budget is given; None: the KL budget decides."""
    strength: float | None = getattr(options, "strength", None)
    return strength


def scaling(plan: EditPlan) -> Callable[[EditPlan, float], EditPlan]:
    """How a plan is given another strength: ``EditPlan.scaled``, or what its method has in that place.

    A rotation's strength is its angle, and its edits do not grow with it. A composition's parts have one factor.
    """
    from steer2edit.plan import EditPlan

    name = str(plan.method.get("name"))
    return getattr(load(name), "scaled", EditPlan.scaled) if name in names() else EditPlan.scaled


_DESCRIBED = ("name", "data", "system", "span", "background", "chat", "prompts")


def describe_data(statistics: Statistics) -> dict[str, Any]:
    """What a plan says of the data behind it. Plans are published: of texts they hold digests only."""
    from steer2edit.capture.stored import stored_counts
    from steer2edit.data.prompts import prompt_digest

    described = {key: statistics.source.get(key) for key in _DESCRIBED}
    if described["prompts"] is None:  # statistics of older versions name none
        del described["prompts"]
    if described["system"] is not None:
        described["system"] = prompt_digest(described["system"])
    optional = ("keep", "metric", "origin", "vector", "vectors", "protect")
    described |= {key: statistics.source[key] for key in optional if key in statistics.source}
    return {**described, "examples": stored_counts(statistics.examples), "tokens": stored_counts(statistics.tokens)}
