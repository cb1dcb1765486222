"""The section of a model card that shows the measurements."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from steer2edit.artefact.model_card import inline, table
from steer2edit.formatting import interval

if TYPE_CHECKING:
    from steer2edit.evaluation.evaluate import Evaluation


def tradeoff(evaluation: Evaluation, plot: str | None = None) -> list[str]:
    """The paragraphs of an evaluation: its table, and the picture at ``plot`` in the repository.

    They show numbers only, never a prompt or an answer.
    """
    metrics = evaluation.metrics
    rows: list[Sequence[object]] = [["", *(f"{m.name}{f' ({m.unit})' if m.unit else ''}" for m in metrics)]]
    for row in evaluation.rows:
        cells = [interval(evaluation.estimate(row, m.name)) if m.name in row.samples else "–" for m in metrics]
        # a candidate may be called after the file it came from
        rows.append([re.split(r"[/\\]", row.name)[-1] if row.kind == "edit" else row.name, *cells])
    counts = (
        f"{m.name} over {evaluation.estimate(evaluation.rows[0], m.name).count}"
        for m in metrics
        if m.name in evaluation.rows[0].samples
    )
    remark = (
        f"Measured on held-out questions (split {inline(evaluation.context.get('split'))}): {inline(', '.join(counts))}. "
        "Brackets are bootstrap 95 % intervals."
    )
    picture = [f"![The attribute against its cost]({plot})"] if plot else []
    return ["## The trade-off", *picture, table(rows), remark]
