"""The section of a model card that shows what was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from steer2edit.artefact.model_card import inline, table
from steer2edit.formatting import interval

if TYPE_CHECKING:
    from steer2edit.evaluation.evaluate import Evaluation


def tradeoff(found: Evaluation, plot: str | None = None) -> list[str]:
    """The paragraphs that show an evaluation: its table, and the picture at ``plot`` in the repository.

    Of an evaluation only numbers are shown, never a prompt or an answer.
    """
    metrics = found.metrics
    rows: list[Sequence[object]] = [["", *(f"{m.name}{f' ({m.unit})' if m.unit else ''}" for m in metrics)]]
    for row in found.rows:
        cells = [interval(found.estimate(row, m.name)) if m.name in row.samples else "–" for m in metrics]
        # a candidate may be called after the file it came from
        rows.append([re.split(r"[/\\]", row.name)[-1] if row.kind == "edit" else row.name, *cells])
    counts = (
        f"{m.name} over {found.estimate(found.rows[0], m.name).count}"
        for m in metrics
        if m.name in found.rows[0].samples
    )
    said = (
        f"Measured on held-out questions (split {inline(found.context.get('split'))}): {inline(', '.join(counts))}. "
        "Brackets are bootstrap 95 % intervals."
    )
    picture = [f"![The attribute against its cost]({plot})"] if plot else []
    return ["## The trade-off", *picture, table(rows), said]
