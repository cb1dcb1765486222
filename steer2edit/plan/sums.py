"""Two edits of one tensor as one: what adds up, and what does not."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from math import prod

import torch

from steer2edit.errors import PlanError
from steer2edit.plan.operations import Assign, Bias, Edit, LowRank, Scale, ScaleAdd, addition_of, scales_of


def added(first: Edit, second: Edit) -> Edit:
    """Both edits of one tensor as one, each as its plan means it for the base. Raises PlanError where they do not add up.

    Updates add, and factors of one axis multiply. A scale and an update give ``R W C + B A``, in either order: the update is
    that of its own plan, and no part of it is scaled.
    """
    if isinstance(first, Assign) and isinstance(second, Assign):
        return _both_assigned(first, second)
    if isinstance(first, Assign) or isinstance(second, Assign):
        raise PlanError(f"the plans edit {first.tensor} by different operations ({first.op}, {second.op})")
    scales = _multiplied((*scales_of(first), *scales_of(second)))
    additions = [one for one in (addition_of(first), addition_of(second)) if one is not None]
    total = _sum(*additions) if len(additions) == 2 else additions[0] if additions else None
    if total is None and len(scales) == 1:
        return scales[0]
    if total is not None and not scales:
        return total
    return ScaleAdd(first.tensor, scales, total)


def _sum(first: LowRank | Bias, second: LowRank | Bias) -> LowRank | Bias:
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        known = first.mean_effect is not None and second.mean_effect is not None
        mean_effect = torch.cat((first.mean_effect, second.mean_effect)) if known else None  # type: ignore[arg-type]
        return LowRank(first.tensor, torch.cat((first.B, second.B), dim=1), torch.cat((first.A, second.A)), mean_effect)
    if isinstance(first, Bias) and isinstance(second, Bias) and first.op == second.op:
        return replace(first, delta=first.delta + second.delta)
    raise PlanError(f"the plans edit {first.tensor} by different operations ({first.op}, {second.op})")


def _multiplied(scales: tuple[Scale, ...]) -> tuple[Scale, ...]:
    ordered = sorted(scales, key=lambda one: one.axis)
    result = []
    for axis, group in groupby(ordered, key=lambda one: one.axis):
        alike = list(group)
        if len({len(one.factors) for one in alike}) > 1:
            raise PlanError(f"the plans scale different numbers of {axis} of {alike[0].tensor}")
        result.append(Scale(alike[0].tensor, prod((one.factors for one in alike[1:]), start=alike[0].factors), axis))
    return tuple(result)


def _both_assigned(first: Assign, second: Assign) -> Assign:
    values = dict(zip(first.rows, first.values, strict=True))
    for row, value in zip(second.rows, second.values, strict=True):
        if row in values and not torch.equal(values[row], value):
            raise PlanError(f"the plans set row {row} of {first.tensor} to different values")
        values[row] = value
    return Assign(first.tensor, tuple(values), torch.stack(list(values.values())))
