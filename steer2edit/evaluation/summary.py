"""An evaluation in plain values, with its paired differences and its judgement."""

from __future__ import annotations

from typing import Any

from steer2edit.evaluation.comparison import compared_rows, comparisons
from steer2edit.evaluation.evaluate import Evaluation
from steer2edit.evaluation.steerability import steerability


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation's numbers without single questions; then what each edit does beyond each baseline, losses first.

    ``steerable`` holds one judgement for each edit that can be judged.
    """
    rows = compared_rows(evaluation)
    differences = [one.described(evaluation.metrics) for row in rows for one in comparisons(evaluation, row)]
    judged = [{"row": row.name, **found.described()} for row in rows if (found := steerability(evaluation, row))]
    return {**evaluation.described(), "differences": differences, "steerable": judged}
