"""The section of a model card that shows the measurements."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from steer2edit.artefact.model_card import inline, table
from steer2edit.evaluation.comparison import compared_rows, comparisons
from steer2edit.evaluation.steerability import steerability
from steer2edit.formatting import interval
from steer2edit.report.differences import cell, change_cell, losses

if TYPE_CHECKING:
    from steer2edit.evaluation.evaluate import Evaluation


def tradeoff(evaluation: Evaluation, plot: str | None = None) -> list[str]:
    """The paragraphs of an evaluation: its table, and the picture at ``plot`` in the repository.

    They show numbers only, never a prompt or an answer.
    """
    metrics = evaluation.metrics
    edits, lost, judged, broken = compared_rows(evaluation), [], [], []
    rows: list[Sequence[object]] = [["", *(f"{m.name}{f' ({m.unit})' if m.unit else ''}" for m in metrics)]]
    for row in evaluation.rows:
        cells = [interval(evaluation.estimate(row, m.name)) if m.name in row.samples else "–" for m in metrics]
        # a candidate may be called after the file it came from
        shown = re.split(r"[/\\]", row.name)[-1] if row.kind == "edit" else row.name
        rows.append([shown, *cells])
        if damages := evaluation.damages(row):
            told = inline("; ".join(map(str, damages)))
            broken.append(f"{inline(shown)} breaks {told}, beyond the tolerance that docs/measuring.md states.")
        if row in edits:
            rows.append(["change", *(change_cell(evaluation, row, m) for m in metrics)])
            beside = comparisons(evaluation, replace(row, name="The edit"))
            for one in beside:
                name = f"beyond {one.against}" if one.row.name == "The edit" else f"{one.row.name} beyond {one.against}"
                rows.append([name, *(cell(one, m) for m in metrics)])
            lost += losses(evaluation, beside)
            found = steerability(evaluation, row)
            judged += [] if found is None else [str(found) if found.steerable else f"**{found}**"]
    counts = (
        f"{m.name} over {evaluation.estimate(evaluation.rows[0], m.name).count}"
        for m in metrics
        if m.name in evaluation.rows[0].samples
    )
    remark = (
        f"Measured on held-out questions (split {inline(evaluation.context.get('split'))}): {inline(', '.join(counts))}. "
        f"Brackets are bootstrap 95 % intervals; changes and differences are paired by question. {evaluation.decoding}"
    ).rstrip()
    picture = [f"![The attribute against its cost]({plot})"] if plot else []
    lines = [*judged, *([" ".join(lost)] if lost else []), *broken]
    return ["## The trade-off", *lines, *picture, table(rows), remark]
