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
from steer2edit.runtime.model import LoadedModel, Runtime, load_model, load_weights

TOLERANCE = 1e-4
"""The largest difference of a logit that two ways of computing the same in float32 may have."""
_NOISE = 32
"""In a coarser dtype: as many units in the last place of the largest logit."""
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
    None for an approximation.
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
        return f"{head}; the plan moves them by {effect:.3g}: the artefact carries the plan's mean effect only, an approximation"
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
        # a constant vector may well miss the plan by more than the plan moves; it has to move the model at all
        if edits and not numbers["from_base"] > TOLERANCE:
            problems.append("the logits under the control vector are the base's: it does not act")
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


def _difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
