"""Masks from request to plan: rows are fitted and certified where a family needs them, and the cost is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from steer2edit.architecture import ModelSpec
from steer2edit.checkpoint import Checkpoint
from steer2edit.data import contrast
from steer2edit.data.neutral import NeutralChats, OwnNeutral
from steer2edit.data.tokens import windows
from steer2edit.experts.edits import How, Request, RowFit, check_request, lower_experts, strongest
from steer2edit.experts.router_rows import fit_rows
from steer2edit.plan import EditPlan
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import LoadedModel, Runtime, load_model
from steer2edit.strength.neutral_texts import neutral_texts
from steer2edit.strength.settle import settle_strength

CALIBRATION_TOKENS = 8192
HELD_OUT_TOKENS = 8192


@dataclass(frozen=True)
class Certification:
    """How masks are certified, and whether the KL is measured where no model has to run.

    ``bound`` is the share of held-out tokens that may still choose an expert masked by its row. Rows are fitted on
    ``calibration``, and certified on ``neutral`` where that is prose; the KL is measured on ``neutral`` too. None means the
    packaged texts.
    """

    runtime: Runtime = field(default_factory=Runtime)
    bound: float = 1e-3
    calibration: str | None = None
    neutral: OwnNeutral | None = None
    measure: bool = True


def mask_experts(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    request: Request,
    *,
    how: How = "auto",
    certification: Certification = Certification(),
    data: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> EditPlan:
    """The plan of a request, with the KL that it costs. Raises PlanError for what cannot be done, with every reason."""
    fits: dict[tuple[int, int], RowFit] = {}
    loaded: LoadedModel | None = None
    wanted = {} if check_request(spec, request) else _rows_wanted(spec, request, how)
    if wanted or certification.measure:
        loaded = load_model(checkpoint, spec, certification.runtime)
    if wanted and loaded is not None:
        size = min(128, loaded.context)
        text = contrast.background_text() if certification.calibration is None else certification.calibration
        own = certification.neutral
        held = contrast.neutral_text() if own is None or isinstance(own, NeutralChats) else own
        fits = fit_rows(
            loaded,
            wanted,
            windows(loaded.tokenizer, [text], CALIBRATION_TOKENS, size),
            windows(loaded.tokenizer, [held] if isinstance(held, str) else held, HELD_OUT_TOKENS, size),
            progress=progress,
        )
    plan = lower_experts(checkpoint, spec, request, how=how, rows=fits, bound=certification.bound, data=data)
    if loaded is None or not certification.measure:
        return plan
    texts = neutral_texts(loaded, certification.neutral, progress)
    measured = settle_strength(loaded, plan, strength=1.0, neutral=texts).measured
    # nothing was searched
    return replace(plan, measured=replace(measured, steps=None))


def _rows_wanted(spec: ModelSpec, request: Request, how: How) -> dict[int, tuple[int, ...]]:
    return {
        layer: experts
        for layer, experts in request.off.items()
        if how == "row" or (how == "auto" and strongest(spec.router(layer)) == "row")
    }
