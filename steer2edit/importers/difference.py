"""The difference of two sets of edits, as in contrastive weight steering (arXiv 2511.05408): ``θ + k (θ₊ - θ₋)``.

Two adapters that were trained towards and away from a behaviour share what both learnt beside it. Their difference keeps the
behaviour. Of adapters of rank r it has at most the rank 2r; it is stored at its numerical rank.
"""

from __future__ import annotations

from dataclasses import replace

from steer2edit.errors import DataError
from steer2edit.notices import notice
from steer2edit.plan import EditPlan, LowRank, Measured, merge


def difference(plus: EditPlan, minus: EditPlan) -> EditPlan:
    """``plus`` minus ``minus``, each at its strength, of edits of the same base.

    Raises DataError for edits that cannot be subtracted, and where nothing is left; PlanError where the bases differ.
    """
    strange = [edit.tensor for plan in (plus, minus) for edit in plan.edits if not isinstance(edit, LowRank)]
    if strange or plus.structure or minus.structure:
        raise DataError(
            "a difference is one of low-rank edits: "
            + (f"{strange[0]} is edited otherwise" if strange else "experts go")
        )
    bases = {str(one) for one in (plan.method.get("adapter_of") for plan in (plus, minus)) if one}
    if len(bases) > 1:
        notice(
            f"the adapters name different bases, {' and '.join(sorted(bases))}; their difference means little if that is so"
        )
    merged = merge([plus, minus], [1.0, -1.0])
    edits = [edit.compressed() for edit in merged.edits if isinstance(edit, LowRank)]
    kept = tuple(edit for edit in edits if edit is not None)
    if not kept:
        raise DataError("both are the same edits: their difference is nothing")
    method = {
        "name": "imported",
        "format": "difference of two sets of edits",
        "plus": dict(plus.method),
        "minus": dict(minus.method),
        "ranks": sorted({edit.A.shape[0] for edit in kept}),
    }
    names = [str(plan.data.get("name") or "unnamed") for plan in (plus, minus)]
    prompts = sorted({*plus.seen, *minus.seen})
    data = {"name": " - ".join(names), **({"prompts": prompts} if prompts else {})}
    return replace(merged, edits=kept, method=method, data=data, measured=Measured())
