"""The mean effect of a plan: what its edits add, on average, to the residual stream.

An edit ``B A`` adds ``B (A x)``. On the typical input x_bar of the data that the plan was made from, that is the vector
``B (A x_bar)``; run-time steering, which adds one vector at every token, can carry that much of an edit and no more.
"""

from __future__ import annotations

import math
from dataclasses import replace

from steer2edit.architecture import ModelSpec, Site
from steer2edit.architecture.stream import CONDITIONAL
from steer2edit.capture.statistics import Statistics
from steer2edit.data.answers import LABELS
from steer2edit.plan import Edit, EditPlan, LowRank


def record_mean_effect(plan: EditPlan, spec: ModelSpec, statistics: Statistics) -> EditPlan:
    """The plan with every low-rank edit's ``mean_effect`` filled in where its typical input was captured.

    Behind a norm the mean effect is what reaches its gain: ``A x_bar`` over the root mean square of the site's output.
    """

    def recorded(edit: Edit) -> Edit:
        site = spec.owners.get(edit.tensor)
        if site is None or site.role in CONDITIONAL or not isinstance(edit, LowRank):
            return edit
        if (site.key, "input", "positive") not in statistics.moments:
            return edit
        effect = edit.A.double() @ statistics.x_bar(site.key).double()
        if site.norm is not None:
            effect = effect / output_size(statistics, site)
        return replace(edit, mean_effect=effect.float())

    return replace(plan, edits=tuple(recorded(edit) for edit in plan.edits))


def output_size(statistics: Statistics, site: Site) -> float:
    """The root mean square over features of what a site writes, before its norm."""
    squares = [float(statistics.moments[site.key, "output", label].m2.mean()) for label in LABELS]
    return math.sqrt(max(sum(squares) / len(squares), 1e-24))
