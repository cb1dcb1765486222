"""Where a plan's data came from, in words, and the section of the page that shows some of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steer2edit.data.contrast import Example, data_hash
from steer2edit.data.prompts import Prompt
from steer2edit.errors import DataError
from steer2edit.formatting import cut
from steer2edit.plan import EditPlan
from steer2edit.report.markup import Html, tag

SHOWN = 8
"""Rows that the page shows."""


def origin_line(plan: EditPlan) -> str:
    """Where the data came from, part by part; an empty text where the plan does not say."""
    return "; ".join(_origin(one) for one in plan.data.get("origin") or ())


def shown_data(plan: EditPlan, examples: Sequence[Example]) -> list[Html]:
    """Where the data came from, and its first rows: pairs, where there are any."""
    origin = origin_line(plan)
    parts = [tag("p", f"The data: {origin}.")] if origin else []
    rows: dict[int, list[Example]] = {}
    for example in examples:
        rows.setdefault(example.row, []).append(example)
    pairs = [row for row in rows.values() if len(row) > 1]
    chosen = (pairs or list(rows.values()))[:SHOWN]
    if not chosen:
        return parts
    what = "pairs" if pairs else "rows"
    parts.append(
        tag("p", f"The first {len(chosen)} of {len(pairs or rows)} {what}, in their order. They were not selected.")
    )
    return [*parts, *map(_article, chosen)]


def check_data(plan: EditPlan, examples: Sequence[Example]) -> None:
    """Raise DataError unless the examples are those that the plan was made of."""
    if plan.data.get("data") != data_hash(examples):
        raise DataError("the plan was made of other data: their SHA-256 differ; give the data that it was captured on")


def _article(row: Sequence[Example]) -> Html:
    columns = [
        tag("div", tag("h4", one.label), tag("p", cut(one.response, 700) or "(empty)", class_="said")) for one in row
    ]
    return tag(
        "article", tag("h3", cut(_text(row[0].prompt), 300), class_="said"), tag("div", *columns, class_="sides")
    )


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1].content


def _origin(one: Mapping[str, Any]) -> str:
    match one.get("kind"):
        case "folder":
            kept, offered = one.get("kept"), one.get("offered")
            rows = f", {kept} of {offered} rows kept" if kept is not None and offered is not None else ""
            way = f" (way: {one['way']})" if one.get("way") else ""
            judged = f", verdict: {one['verdict']}" if one.get("verdict") else ""
            return f"made by steer2edit data{way}{rows}{judged}, receipt {str(one.get('receipt'))[:12]}"
        case "built-in behaviour":
            return "the pairs of a built-in behaviour"
        case "behaviour file":
            return f"the pairs of a behaviour's file, SHA-256 {str(one.get('file'))[:12]}"
        case _:
            return "a file of contrast data"
