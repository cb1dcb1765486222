"""Whether an artefact, loaded as its users load it, computes what base and plan compute: a comparison of logits.

A checkpoint's stored dtype rounds the edit. How much of a difference the rounding explains is measured in each run: the base
is run a third time with the updates that the stored tensors really hold. What remains must be the noise of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.experts.checking import check_masks
from steer2edit.lowering import AppliedPlan, Loadable, PeftAdapter, Resolved, StreamShift, WholeModel
from steer2edit.lowering.new_biases import dtype_of
from steer2edit.lowering.stored import stored_plan
from steer2edit.progress import Progress, silent
from steer2edit.runtime.adapters import adapted
from steer2edit.runtime.hooks import edited, stream_shifted
from steer2edit.runtime.mean_effects import mean_effects_added
from steer2edit.runtime.model import LoadedModel, Runtime, load_model, load_weights

TOLERANCE = 1e-4
"""The largest difference of a logit that two ways of computing the same in float32 may have."""
_NOISE = 32
"""In a coarser dtype: as many units in the last place of the largest logit."""
LEAST_COSINE = 0.2
"""The least cosine between the change by a control vector and that by the plan's mean effect, where its writers write.

A vector acts at the end of a block, and what block 0 writes joins block 1. On random models of three layers the cosine was .42
to .96.
"""
LARGEST_RATIO = 4.0
"""How many times as much, or as little, a control vector may change the logits as the plan's mean effect."""
PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Water boils at a lower temperature on a mountain because",
    "List three uses of a paper clip:",
    "Once upon a time, in a village by the sea, there lived",
)


def compare_numbers(
    resolved: Resolved, loadable: Loadable, runtime: Runtime, progress: Progress = silent
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Largest differences between the logits of base + plan and those of the artefact, on probe prompts; and problems.

    ``effect`` is how far the plan moves the base's logits, ``difference`` how far the artefact is from base + plan. Of it
    ``rounding`` is what the stored dtype explains and ``unexplained`` what it does not, which ``tolerance`` bounds; both are
    None for an approximation. That has ``mean_effect``: the artefact beside the mean effect of each edit, added where its writer
    writes, and ``from_plan``: the artefact beside the plan (:func:`_compared`).
    """
    plan, checkpoint, spec = resolved.plan, resolved.checkpoint, resolved.spec
    with progress("compare logits", total=4) as advance:
        loaded = load_model(checkpoint, spec, runtime)
        base = _logits(loaded)
        advance(1)
        planned = _logits(loaded, lambda: edited(loaded, plan))
        advance(1)
        expected = planned
        if isinstance(loadable, WholeModel):
            stored = stored_plan(resolved)
            expected = _logits(loaded, lambda: edited(loaded, stored))
            del stored
        advance(1)
        model = load_weights(loadable.folder, runtime) if isinstance(loadable, WholeModel) else None
        artefact = _artefact_logits(loaded, loadable, model)
        advance(1)
    largest = max(float(logits.abs().max()) for logits in planned)
    computed = _coarsest(loaded)
    tolerance = max(TOLERANCE, _NOISE * torch.finfo(computed).eps * largest)
    exact = not isinstance(loadable, StreamShift) or loadable.exact
    numbers: dict[str, Any] = {
        "effect": _difference(base, planned),
        "difference": _difference(planned, artefact),
        "rounding": _difference(planned, expected) if exact else None,
        "unexplained": _difference(expected, artefact) if exact else None,
        "tolerance": tolerance if exact else None,
        "largest_logit": largest,
        "stored": sorted({dtype_of(resolved, name) for name in resolved.edits}),
        "computed": str(computed).removeprefix("torch."),
        "from_base": _difference(base, artefact),
    }
    if not exact:
        numbers["mean_effect"] = _compared(base, _logits(loaded, lambda: mean_effects_added(loaded, plan)), artefact)
        numbers["from_plan"] = _compared(base, planned, artefact)
    problems = _problems(numbers, bool(plan.edits))
    if isinstance(loadable, WholeModel) and plan.method.get("name") == "experts":
        masked = replace(loaded, model=model, spec=read_spec(open_checkpoint(loadable.folder)))
        numbers["experts"], wrong = check_masks(loaded, masked, plan, TOLERANCE)
        problems += wrong
    return numbers, tuple(problems)


def in_words(numbers: Mapping[str, Any]) -> str:
    """How good the artefact is, in one sentence."""
    difference, effect = numbers["difference"], numbers["effect"]
    head = f"the logits differ from base + plan by {difference:.3g}"
    if numbers["unexplained"] is None:
        return f"{head}; the plan moves them by {effect:.3g}: {_approximation_in_words(numbers)}"
    if numbers["tolerance"] >= max(effect / 2, 2 * TOLERANCE):
        return f"{head}; {numbers['computed']} is too coarse to tell that from noise: verify with --dtype float32"
    if not effect:
        return f"{head}, and the plan moves none"
    part = f"{difference / effect:.2g} times the edit's own effect of {effect:.3g}"
    if numbers["unexplained"] > numbers["tolerance"]:
        return f"{head}, {part}; {numbers['unexplained']:.3g} of it has no explanation"
    if numbers["rounding"] <= numbers["tolerance"]:
        return f"{head}, the noise of the arithmetic; the edit moves them by {effect:.3g}"
    why = f"which rounding to {', '.join(numbers['stored'])} explains ({numbers['rounding']:.3g} expected)"
    return f"{head}, {why}: {part}, {_grade(difference / effect)}"


def _approximation_in_words(numbers: Mapping[str, Any]) -> str:
    """How near an approximation comes to the plan's mean effect, and to the plan itself."""
    mean, whole = numbers["mean_effect"], numbers["from_plan"]
    told = (
        "the artefact carries the plan's mean effect only, an approximation. Its change has a cosine of "
        f"{mean['cosine']:.2f} with that of the mean effect at each writer, and of {whole['cosine']:.2f} with the plan's"
    )
    if whole["distance"] < 1:
        return told
    return f"{told}: on these prompts it is further from base + plan than the base is. Measure its effect before you use it"


def _grade(share: float) -> str:
    if share <= 0.02:
        return "a faithful copy of the plan"
    if share <= 0.1:
        return "close to the plan"
    if share <= 0.5:
        return "a coarse copy: an adapter, or a wider dtype, keeps the edit whole"
    return "rounding changes most of what the edit does: use an adapter, a wider dtype or a greater strength"


def _problems(numbers: Mapping[str, Any], edits: bool) -> list[str]:
    problems = []
    difference, effect, tolerance = numbers["difference"], numbers["effect"], numbers["tolerance"]
    if tolerance is None:
        # a constant vector may well miss the plan by more than the plan moves: the plan acts on some tokens alone. But it has to
        # do what the mean effect of each edit does
        mean = numbers["mean_effect"]
        if edits and not numbers["from_base"] > TOLERANCE:
            problems.append("the logits under the control vector are the base's: it does not act")
        elif edits and not (mean["cosine"] >= LEAST_COSINE and 1 / LARGEST_RATIO <= mean["ratio"] <= LARGEST_RATIO):
            problems.append(
                f"the control vector changes the logits {mean['ratio']:.2g} times as much as the plan's mean effect does, with a "
                f"cosine of {mean['cosine']:.2f} (expected at least {LEAST_COSINE}, and {1 / LARGEST_RATIO:g} to "
                f"{LARGEST_RATIO:g} times): {_failing(mean)}"
            )
        return problems
    if not numbers["unexplained"] <= tolerance:
        explained = f", of which rounding explains {numbers['rounding']:.3g}" if numbers["rounding"] > tolerance else ""
        problems.append(
            f"logits differ from base + plan by {difference:.3g}{explained}; "
            f"{numbers['unexplained']:.3g} is unexplained, more than {tolerance:.2g}"
        )
    if edits and difference >= max(effect, tolerance):
        problems.append(
            f"the artefact is as far from base + plan ({difference:.3g}) as the base itself ({effect:.3g}): it does not act"
        )
    return problems


def _failing(mean: Mapping[str, float]) -> str:
    """What is wrong with a control vector, beside the plan's mean effect."""
    if mean["cosine"] <= -LEAST_COSINE:
        return "it goes the wrong way"
    if mean["cosine"] < LEAST_COSINE:
        return "it does something else"
    return "it does too much" if mean["ratio"] > 1 else "it does next to nothing"


def _coarsest(loaded: LoadedModel) -> torch.dtype:
    dtypes: set[torch.dtype] = {
        parameter.dtype for parameter in loaded.model.parameters() if parameter.is_floating_point()
    }
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _artefact_logits(loaded: LoadedModel, loadable: Loadable, model: Any) -> list[torch.Tensor]:
    if isinstance(loadable, AppliedPlan):
        return _logits(loaded, lambda: edited(loaded, loadable.plan))
    if isinstance(loadable, StreamShift):
        return _logits(loaded, lambda: stream_shifted(loaded, loadable.vectors))
    if isinstance(loadable, PeftAdapter):
        with adapted(loaded.model, loadable.folder):
            return _logits(loaded)
    return _logits(replace(loaded, model=model))


def _logits(
    loaded: LoadedModel, around: Callable[[], AbstractContextManager[None]] = nullcontext
) -> list[torch.Tensor]:
    with around(), torch.inference_mode():
        return [
            loaded.model(**loaded.tokenizer(prompt, return_tensors="pt").to(loaded.device), use_cache=False)
            .logits.float()
            .cpu()
            for prompt in PROMPTS
        ]


def _compared(base: list[torch.Tensor], wanted: list[torch.Tensor], artefact: list[torch.Tensor]) -> dict[str, float]:
    """The artefact's change of the base's logits beside a wanted one: their cosine, ``ratio`` and ``distance``.

    ``ratio`` is that of their norms, and ``distance`` the norm of their difference as a part of the wanted one's, 1 for the base
    itself. Logits count up to a constant for each token, as probabilities do.
    """

    def change(logits: list[torch.Tensor]) -> torch.Tensor:
        moved = [(one - old).double() for one, old in zip(logits, base, strict=True)]
        return torch.cat([(one - one.mean(dim=-1, keepdim=True)).flatten() for one in moved])

    a, b = change(wanted), change(artefact)
    wanted_size, size = (max(float(one.norm()), 1e-300) for one in (a, b))
    return {
        "cosine": float(a @ b) / wanted_size / size,
        "ratio": size / wanted_size,
        "distance": float((a - b).norm()) / wanted_size,
    }


def _difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
