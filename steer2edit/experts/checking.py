"""Whether masked experts are masked: over probe text none is chosen, and the logits are those of a masked reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from steer2edit.data.contrast import neutral_text
from steer2edit.data.tokens import windows
from steer2edit.experts.router_rows import selection_shares
from steer2edit.plan import Assign, Edit, EditPlan, Structure
from steer2edit.runtime.expert_modules import without
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel

PROBE_TOKENS = 512


def check_masks(
    base: LoadedModel, artefact: LoadedModel, plan: EditPlan, tolerance: float
) -> tuple[dict[str, Any], list[str]]:
    """What was measured of a plan's experts, and what is wrong.

    ``reference_difference`` is the largest difference between the logits of the artefact and those of the base whose routers
    cannot see the experts; ``selected`` the largest share of tokens that still choose a masked one, ``forced`` the least that
    choose one that was forced on.
    """
    marks = plan.method.get("experts", ())
    probe = windows(base.tokenizer, [neutral_text()], PROBE_TOKENS, min(128, base.context))
    found: dict[str, Any] = {"probe_tokens": sum(map(len, probe))}
    problems = []
    off = [one for one in marks if one["wish"] == "off"]
    masked = [one for one in off if one.get("reference")]
    if masked:
        difference = _difference(_logits(base, probe, plan, masked), _logits(artefact, probe))
        found["reference_difference"] = difference
        if all(one["grade"] == "exact" for one in off) and not difference <= tolerance:
            problems.append(
                f"logits differ by {difference:.3g} from those of the base that cannot see the masked experts"
            )
    cut = bool(plan.structure.remove)
    layers = sorted({one["layer"] for one in marks})
    if layers and not cut:  # experts that were cut are not there to be chosen
        shares, _ = selection_shares(artefact, [artefact.spec.router(layer) for layer in layers], probe)
        by_wish = {
            wish: [(one, float(shares[one["layer"]][one["expert"]])) for one in marks if one["wish"] == wish]
            for wish in ("off", "on")
        }
        if by_wish["off"]:
            found["selected"] = max(share for _, share in by_wish["off"])
        if by_wish["on"]:
            found["forced"] = min(share for _, share in by_wish["on"])
        problems += [
            f"expert {one['layer']}:{one['expert']} is switched off, and {share:.2%} of the tokens choose it"
            for one, share in by_wish["off"]
            if one["grade"] == "exact" and share > 0
        ]
        problems += [
            f"expert {one['layer']}:{one['expert']} is forced on, and {share:.2%} of the tokens choose it"
            for one, share in by_wish["on"]
            if share < 1
        ]
    return found, problems


def _logits(
    loaded: LoadedModel,
    probe: Sequence[Sequence[int]],
    plan: EditPlan | None = None,
    masked: Sequence[Mapping[str, Any]] = (),
) -> list[torch.Tensor]:
    """Logits of each window of the model with the plan.

    With ``masked``: of the model under the rest of the plan, whose routers cannot see those experts.
    """
    with ExitStack() as stack:
        if plan is not None:
            stack.enter_context(edited(loaded, _without_masks(loaded, plan, masked)))
        by_layer: dict[tuple[int, bool], list[int]] = {}
        for one in masked:
            by_layer.setdefault((one["layer"], one["reference"] == "absent"), []).append(one["expert"])
        for (layer, absent), experts in by_layer.items():
            stack.enter_context(without(loaded.model, loaded.spec.router(layer), experts, absent=absent))
        with torch.inference_mode():
            ids = [torch.tensor([list(window)], device=loaded.device) for window in probe]
            return [loaded.model(input_ids=one, use_cache=False).logits.float().cpu() for one in ids]


def _without_masks(loaded: LoadedModel, plan: EditPlan, masked: Sequence[Mapping[str, Any]]) -> EditPlan:
    """The plan's gains, forced experts and other edits alone, and its number of experts per token."""
    off = {(one["layer"], one["expert"]) for one in masked}
    edits: list[Edit] = []
    for edit in plan.edits:
        site = loaded.spec.owners[edit.tensor]
        if isinstance(edit, Assign):
            kept = [i for i, row in enumerate(edit.rows) if (site.layer, row) not in off]
            if kept:
                edits.append(Assign(edit.tensor, tuple(edit.rows[i] for i in kept), edit.values[kept]))
        elif site.expert is None or (site.layer, site.expert) not in off:
            edits.append(edit)
    return replace(plan, edits=tuple(edits), structure=Structure(top_k=plan.structure.top_k))


def _difference(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
