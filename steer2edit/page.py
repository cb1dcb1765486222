"""The report: one HTML file that says what an edit does, how well that is known, what it changed and how to get it again.

It loads nothing and runs nothing. Whatever comes from data is escaped where it enters a tag.
"""

from __future__ import annotations

import html
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steer2edit import __version__
from steer2edit.errors import Steer2EditError
from steer2edit.estimates import DRAWS, Estimate
from steer2edit.evaluate import Evaluation, Row
from steer2edit.figures import Drawing, chosen_row, objectives, of_plan, tradeoff
from steer2edit.files import write_text
from steer2edit.metrics import Metric
from steer2edit.plan import EditPlan, LowRank, Scores
from steer2edit.report import describe_plan

SHOWN = 6
"""Answers that are shown."""
_LONGEST = 700  # characters of one answer
_TOP = 10  # heads and neurons listed
_CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_CHANCE = {"random": "a random direction", "shuffled": "shuffled labels"}


@dataclass(frozen=True)
class Report:
    """What a report is made of: a plan; the rest where there is some.

    ``trials`` and ``settings`` are a study's, as ``tune.StudyResult.described`` has them; ``receipt`` is an artefact's;
    ``command`` is what was typed.
    """

    plan: EditPlan
    evaluation: Evaluation | None = None
    receipt: Mapping[str, Any] | None = None
    trials: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""


def write_report(report: Report, path: Path, pngs: bool = False) -> list[Path]:
    """Write the page and, with ``pngs``, each figure as ``<stem>-<name>.png`` beside it; the files written.

    Raises Steer2EditError without matplotlib, or where a file cannot be written.
    """
    drawings = _drawings(report)
    write_text(path, _page(report, drawings))
    written = [path]
    for name, drawing in drawings.items() if pngs else ():
        file = path.with_name(f"{path.stem}-{name}.png")
        try:
            file.write_bytes(drawing.png())
        except OSError as error:
            raise Steer2EditError(f"cannot write {file}: {error.strerror or error}") from None
        written.append(file)
    return written


def render_page(report: Report) -> str:
    """The report as one HTML text. Raises Steer2EditError without matplotlib."""
    return _page(report, _drawings(report))


def verdict(report: Report) -> str:
    """What came of the edit, in plain words with their numbers, and whether chance does as well."""
    evaluation, axes = report.evaluation, objectives(report.evaluation, report.settings)
    row = chosen_row(evaluation)
    if evaluation is None or axes is None or row is None:
        return _unmeasured(report.plan)
    utility, attribute = axes
    change = evaluation.change(row, attribute.name)
    cost = evaluation.estimate(row, utility.name)
    at = f"a {utility.name} of {_number(cost.value)} {utility.unit}".strip()
    said = f"{_moved(attribute, change)} at {at}"
    chance = [other for other in evaluation.rows if other.kind in _CHANCE]
    said += "".join(f"; {_best_of(evaluation, attribute, kind, chance)}" for kind in _CHANCE if _of_kind(chance, kind))
    return f"{said}. {_judged(evaluation, attribute, change, chance)}"


# The page.


def _drawings(report: Report) -> dict[str, Drawing]:
    found = tradeoff(report.evaluation, report.trials, report.settings)
    return {**({} if found is None else {"tradeoff": found}), **of_plan(report.plan)}


def _page(report: Report, drawings: Mapping[str, Drawing]) -> str:
    name = f"{report.plan.data.get('name') or 'edits'} in {report.plan.base.name}"
    sections = (
        _section("tradeoff", "Trade-off", _figures(drawings, "tradeoff")),
        _section("candidates", "Candidates", *_candidates(report)),
        _section("answers", "Before and after", *_answers(report)),
        _section("changed", "What changed", *_changed(report.plan, drawings)),
        _section("selection", "Selection", *_selection(report)),
        _section("load", "Load it", *_loading(report)),
        _section("reproduce", "Reproduce it", *_reproduction(report)),
        _section("limits", "Limits", *_limits(report)),
    )
    head = (
        '<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_CSP}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"{_tag('title', name)}\n<style>{_STYLE}</style>"
    )
    header = _tag(
        "header",
        _tag("p", "steer2edit report", class_="eyebrow"),
        _tag("h1", name),
        _tag("p", verdict(report), class_="verdict"),
    )
    footer = _tag("footer", f"Made by steer2edit {__version__}. This file loads nothing from anywhere.")
    body = "\n".join([header, _tag("main", *(one for one in sections if one)), footer])
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _candidates(report: Report) -> list[_Html]:
    evaluation = report.evaluation
    if evaluation is None:
        return []
    chosen = chosen_row(evaluation)
    heads = []
    for metric in evaluation.metrics:
        unit = f"{metric.unit}, " if metric.unit else ""
        count = _count(evaluation, metric)
        heads.append(_joined(metric.name, _tag("small", f"{unit}{metric.goal} is better, n = {count}")))
    rows: list[list[object]] = []
    for row in evaluation.rows:
        note = "chosen edit" + (f", {row.note}" if row.note else "") if row is chosen else row.note
        name = _joined(row.name, _tag("small", note) if note else "")
        rows.append([name, *(_measured(evaluation, row, metric) for metric in evaluation.metrics)])
    base = evaluation.rows[0]
    said = [
        f"Each cell: the value with its 95 % interval, then the change against {base.name}, paired by question"
        + (" (a ratio for perplexity)" if any(m.exponential for m in evaluation.metrics) else "")
        + ". A change is called better or worse where its interval leaves no doubt of the direction; one that is not called "
        "anything may be none."
    ]
    if context := _pairs(evaluation.context):
        said.append(f"Measured on: {context}.")
    table = _table("Every candidate on the same questions", ["candidate", *heads], rows)
    return [*(_tag("p", one) for one in said), table]


def _measured(evaluation: Evaluation, row: Row, metric: Metric) -> object:
    if metric.name not in row.samples:
        return "–"
    value = _joined(_interval(evaluation.estimate(row, metric.name)))
    # the base's own divergence is 0: the change would say the same again
    if row is evaluation.rows[0] or metric.name == "KL":
        return value
    change = evaluation.change(row, metric.name)
    sign = _direction(metric, change)
    word = {0: "", 1: "better", -1: "worse"}[sign]
    shown = _ratio(change) if metric.exponential else _interval(change, signed=True)
    return _joined(value, _tag("small", _joined(shown, _tag("span", word, class_=word) if word else "")))


def _answers(report: Report) -> list[_Html]:
    evaluation, row = report.evaluation, chosen_row(report.evaluation)
    if evaluation is None or row is None:
        return []
    base = evaluation.rows[0]
    asked = list(zip(evaluation.prompts, base.answers, row.answers, strict=False))
    if not asked:
        return []
    differ = [one for one in asked if one[1] != one[2]]
    shown = [*differ, *(one for one in asked if one[1] == one[2])][:SHOWN]
    said = f"{len(differ)} of {len(asked)} answers differ. " + (
        f"These are the first {min(len(differ), SHOWN)} that do, in the order asked: not the best, and not picked by hand."
        if differ
        else "The first are shown."
    )
    if len(differ) < len(shown) and differ:
        said += " The others are the same before and after."
    blocks = []
    for prompt, before, after in shown:
        sides = [(base.name, before), (row.name, after)] if before != after else [("both the same", before)]
        columns = [
            _tag("div", _tag("h4", name), _tag("p", _cut(text) or "(empty)", class_="said")) for name, text in sides
        ]
        asked_for = _tag("h3", _cut(prompt, 300), class_="said")
        blocks.append(_tag("article", asked_for, _tag("div", *columns, class_="sides")))
    return [_tag("p", said), *blocks]


def _changed(plan: EditPlan, drawings: Mapping[str, Drawing]) -> list[_Html]:
    described = describe_plan(plan, _TOP)
    totals = [
        ("Tensors changed", len(plan.edits)),
        ("Size, ‖ΔW‖ in all", _number(plan.norm)),
        ("Method", plan.method.get("name", "–")),
        *_measured_facts(plan.measured),
    ]
    for kind, role in (("heads", "attn_out"), ("neurons", "mlp_out")):
        tables = [table for key, table in plan.scores.items() if key.startswith(f"{role}.")]
        if tables:
            totals.append((f"Edited {kind}", _edited(tables)))
    parts = [_facts(totals), _figures(drawings, "heads", "neurons", "scores")]
    for kind, rows in described["components"].items():
        if rows:
            role = {"head": "attn_out", "neuron": "mlp_out"}[kind]
            shown = [[r["layer"], r[kind], *_scored(plan.scores[f"{role}.{r['layer']}"], r[kind])] for r in rows]
            heads = ["layer", kind, "λ", "g", "sign of g", "g, shuffled labels"]
            parts.append(_table(f"Strongest {kind}s by |λ|", heads, shown))
    if layers := described["layers"]:
        names = list(dict.fromkeys(name for row in layers for name in row))
        shown = [[_value(row.get(name, "–")) for name in names] for row in layers]
        parts.append(_folded("Layer by layer", _table("What was edited in each layer", names, shown)))
    edits: list[list[object]] = [
        [e.tensor, f"rank {e.A.shape[0]}" if isinstance(e, LowRank) else "bias", _number(e.norm)] for e in plan.edits
    ]
    if edits:
        parts.append(_folded("Edited tensors", _table("Every tensor changed", ["tensor", "edit", "‖ΔW‖"], edits)))
    return parts


def _selection(report: Report) -> list[_Html]:
    trials, settings = report.trials, report.settings
    if not trials:
        return []
    states = [str(trial.get("state")) for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    names = {role: str((settings.get(role) or {}).get("name", role)) for role in ("attribute", "utility")}
    goals = {role: (settings.get(role) or {}).get("goal") for role in names}
    heads = [
        _joined(name, _tag("small", f"{goals[role]} is better") if goals[role] else "") for role, name in names.items()
    ]
    front = [trial for trial in trials if trial.get("front")]
    knee = next((trial for trial in trials if trial.get("knee")), None)
    columns = [*heads, *(["KL"] if names["utility"] != "KL" else []), "parameters"]
    rows: list[list[object]] = []
    for trial in front:
        number = _joined(str(trial["number"]), _tag("small", "the knee") if trial is knee else "")
        estimates = [_plain_interval(trial.get(role)) for role in names]
        kl = [_value(trial.get("kl"))] if names["utility"] != "KL" else []
        rows.append([number, *estimates, *kl, _pairs(trial.get("params") or {})])
    sampler = f" by {settings['sampler']}" if settings.get("sampler") else ""
    seed = f", seed {settings['seed']}" if "seed" in settings else ""
    said = [
        f"{len(trials)} trials{sampler}{seed}: {counts}. {len(front)} are on the front: no other trial is as good in both and "
        "better in one."
    ]
    if knee is not None:
        said.append(
            f"Trial {knee['number']} is the knee: the point of the front that lies farthest above the straight line from the "
            "base to the front's strongest point, both axes scaled to the line's ends."
        )
    said.append("These numbers are on the selection split, and the best of many trials looks better there than it is.")
    split = None if report.evaluation is None else report.evaluation.context.get("split")
    if split == "report":
        said.append("The table of candidates is on other questions, the reporting split.")
    elif split == "select":
        said.append("The table of candidates is on the same questions: it is no independent check.")
    table = _table("The front, on the selection split", ["trial", *columns], rows)
    rest = {key: value for key, value in settings.items() if key not in ("attribute", "utility")}
    folded = [_folded("Settings of the study", _facts([(key, _value(v)) for key, v in rest.items()]))] if rest else []
    return [*(_tag("p", one) for one in said), *([table] if rows else []), *folded]


def _loading(report: Report) -> list[_Html]:
    plan, receipt = report.plan, report.receipt
    if receipt is None:
        said = "There is no artefact yet. The plan makes one without running the model:"
        return [_tag("p", said), _code(_emit(plan, "checkpoint"), _emit(plan, "lora"))]
    base = json.dumps(plan.base.name, ensure_ascii=False)
    target = receipt.get("target")
    if target == "lora":
        revision = f", revision={json.dumps(plan.base.revision)}" if plan.base.revision else ""
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({base}{revision})",
            'model = PeftModel.from_pretrained(base, "path/to/the/folder")',
        ]
    elif target == "checkpoint":
        lines = [
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("path/to/the/folder")',
        ]
    else:
        lines = [_emit(plan, str(target))]
    facts = [
        ("Target", target),
        ("Exactness", receipt.get("exactness")),
        ("Remarks", "; ".join(receipt.get("notes") or ())),
    ]
    return [_code(*lines), _facts([(key, value) for key, value in facts if value])]


def _reproduction(report: Report) -> list[_Html]:
    plan = report.plan
    versions = (report.receipt or {}).get("versions") or {"steer2edit": __version__}
    context = {} if report.evaluation is None else report.evaluation.context
    seeds = {
        "search": report.settings.get("seed"),
        "split": context.get("split_seed", report.settings.get("split_seed")),
    }
    facts = [
        ("Base", plan.base.name),
        ("Revision", plan.base.revision),
        ("Base fingerprint", plan.base.fingerprint),
        ("Plan, SHA-256", plan.hash),
        ("Method", plan.method.get("name")),
        ("Options", _pairs({key: value for key, value in plan.method.items() if key != "name"})),
        ("Data", plan.data.get("name")),
        ("Data, SHA-256", plan.data.get("data")),
        ("Examples", _value(plan.data.get("examples"))),
        ("System message", plan.data.get("system")),
        ("Strength", _value(plan.measured.get("strength"))),
        ("Seeds", _pairs({key: value for key, value in seeds.items() if value is not None})),
        ("Versions", _pairs(versions)),
    ]
    lines = [
        *([report.command] if report.command else []),
        f"steer2edit show {_PLAN}",
        _emit(plan, str((report.receipt or {}).get("target") or "checkpoint")),
        f"steer2edit verify FOLDER --base {shlex.quote(plan.base.name)}",
    ]
    said = f"{_PLAN} is the plan, FOLDER where the artefact goes."
    return [_code(*lines), _tag("p", said), _facts([(k, v) for k, v in facts if v not in (None, "", "–")])]


def _limits(report: Report) -> list[_Html]:
    evaluation, plan = report.evaluation, report.plan
    said = []
    if evaluation is not None:
        counts = ", ".join(f"{m.name} {_count(evaluation, m)}" for m in evaluation.metrics)
        split = evaluation.context.get("split")
        said.append(
            f"Intervals are 95 % bootstraps ({DRAWS} draws) over questions, or over windows of neutral text: {counts}. They say "
            "how far another sample of such questions would move the numbers, not what questions of another kind would show."
        )
        if split:
            said.append(f"Everything in the table of candidates is on the {split} split.")
        comparisons = (len(evaluation.rows) - 1) * len(evaluation.metrics)
        if comparisons > 1:
            said.append(
                f"The table holds {comparisons} comparisons with the base and corrects for none: of intervals where nothing "
                "changed, about one in twenty leaves out no change."
            )
    else:
        said.append("The behaviour was not measured here: nothing on this page says that the edit does what it is for.")
    if plan.measured.get("kl") is not None:
        said.append("KL is measured on neutral text, and says little of how far the model moves on other text.")
    if any(table.interval is not None for table in plan.scores.values()):
        said.append(
            "Intervals of g are over resampled contrast examples, component by component. The scores under shuffled labels are "
            "of one shuffling."
        )
    said.append("An edit shifts tendencies: measure it on prompts of your own.")
    return [_tag("ul", *(_tag("li", one) for one in said))]


# What the numbers say.


def _unmeasured(plan: EditPlan) -> str:
    said = f"The plan changes {len(plan.edits)} tensors, by ‖ΔW‖ {_number(plan.norm)} in all"
    kl = plan.measured.get("kl")
    if kl is not None:
        said += f", and moves the model by {_plain_interval({'value': kl, **plan.measured})} nats/token on neutral text"
    return f"{said}. What it does to the behaviour was not measured."


def _moved(metric: Metric, change: Estimate) -> str:
    name, unit = metric.name[:1].upper() + metric.name[1:], f" {metric.unit}" if metric.unit else ""
    if metric.exponential:
        return f"{name} is {_ratio(change)} the base's"
    if not _direction(metric, change):
        return f"{name} changes by {_interval(change, signed=True)}{unit}, which may be no change,"
    ends = sorted(map(abs, (change.low, change.high)))
    size = f"{_number(abs(change.value))}{unit} [{_number(ends[0])}, {_number(ends[1])}]"
    return f"{name} {'rises' if change.value > 0 else 'falls'} by {size}"


def _direction(metric: Metric, change: Estimate) -> int:
    """1 where a change is for the better, -1 where it is for the worse, 0 where its interval leaves that open."""
    none = 1.0 if metric.exponential else 0.0
    # not "low <= none <= high": intervals that are not finite decide nothing
    above, below = change.low > none, change.high < none
    if not (above or below):
        return 0
    return 1 if above == (metric.goal == "more") else -1


def _best_of(evaluation: Evaluation, metric: Metric, kind: str, chance: Sequence[Row]) -> str:
    rows = _of_kind(chance, kind)
    changes = [(evaluation.change(row, metric.name), row) for row in rows]
    best, row = (max if metric.goal == "more" else min)(changes, key=lambda one: one[0].value)
    which = _CHANCE[kind] if len(rows) == 1 else f"the best of {len(rows)} {_PLURALS[kind]}"
    note = f" {row.note}" if row.note.startswith("at ") else ""
    return f"{which}{note}: {_ratio(best) if metric.exponential else _interval(best, signed=True)}"


def _judged(evaluation: Evaluation, metric: Metric, change: Estimate, chance: Sequence[Row]) -> str:
    """Whether the change is one, is the one wanted, and is more than chance gives."""
    said = []
    sign = _direction(metric, change)
    if not sign:
        said.append("The edit is not distinguishable from no change.")
    elif sign < 0:
        said.append(f"That is the wrong way: {metric.goal} is better.")
    alike, ahead = [], []
    for kind, name in _CHANCE.items():
        changes = [evaluation.change(row, metric.name) for row in _of_kind(chance, kind)]
        # a comparison with nan is false, and an interval that is not known is overlapped by all
        apart = [other.high < change.low or other.low > change.high for other in changes]
        if not all(apart):
            alike.append(name)
        elif any((other.value > change.value) == (metric.goal == "more") for other in changes):
            ahead.append(name)
    if alike:
        said.append(f"The edit is not distinguishable from {' or '.join(alike)}.")
    if ahead:
        said.append(f"Of {' and '.join(ahead)} one does better than the edit.")
    if not chance:
        said.append("No random direction was measured beside it, so what any edit of this size does is not known.")
    elif sign > 0 and not alike and not ahead:
        beaten = [name for kind, name in _CHANCE.items() if _of_kind(chance, kind)]
        said.append(
            f"That is more than {' or '.join(beaten)} {'gives' if beaten == ['a random direction'] else 'give'}."
        )
    return " ".join(said)


_PLURALS = {"random": "random directions", "shuffled": "shuffled labels"}


def _of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row.kind == kind]


def _count(evaluation: Evaluation, metric: Metric) -> int:
    return max((len(r.samples[metric.name].values) for r in evaluation.rows if metric.name in r.samples), default=0)


def _edited(tables: Sequence[Scores]) -> str:
    edited, total = sum(int((t.lam != 0).sum()) for t in tables), sum(len(t.lam) for t in tables)
    if any(table.interval is None for table in tables):
        return f"{edited:,} of {total:,}"
    stable = sum(int(table.stable.sum()) for table in tables)
    return f"{edited:,} of {total:,}; the sign of g is stable in {stable:,}"


def _scored(table: Scores, index: int) -> list[object]:
    g = _number(float(table.g[index]), signed=True)
    sign, null = "–", "–"
    if table.interval is not None:
        low, high = (_number(float(end)) for end in table.interval[:, index])
        g, sign = f"{g} [{low}, {high}]", "stable" if bool(table.stable[index]) else "in doubt"
    if table.null is not None:
        null = _number(float(table.null[index]), signed=True)
    return [_number(float(table.lam[index]), signed=True), g, sign, null]


def _measured_facts(measured: Mapping[str, Any]) -> list[tuple[str, object]]:
    facts: list[tuple[str, object]] = []
    if measured.get("strength") is not None:
        facts.append(("Strength", _number(measured["strength"])))
    if measured.get("kl") is not None:
        over = f" over {measured['tokens']:,} tokens of neutral text" if "tokens" in measured else ""
        facts.append(("KL from the base", f"{_plain_interval({'value': measured['kl'], **measured})} nats/token{over}"))
    if measured.get("kl_budget") is not None:
        facts.append(("KL budget", f"{_number(measured['kl_budget'])} nats/token"))
    if measured.get("perplexity") is not None and measured.get("base_perplexity") is not None:
        facts.append(("Perplexity", f"{_number(measured['base_perplexity'])} → {_number(measured['perplexity'])}"))
    return facts


# Values as text.


def _number(value: float, signed: bool = False) -> str:
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif 0 < abs(value) < 1e-4:
        text = f"{value:.1e}"
    else:
        text = f"{value:.3g}"
    return ("+" if signed and value > 0 else "") + text.replace("-", "−")


def _interval(found: Estimate, signed: bool = False) -> str:
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return _number(found.value, signed)
    return f"{_number(found.value, signed)} [{_number(found.low)}, {_number(found.high)}]"


def _ratio(found: Estimate) -> str:
    # a perplexity's ratio is near 1: what differs is behind the point
    value, low, high = (f"{x:.3f}" if abs(x) < 100 else _number(x) for x in (found.value, found.low, found.high))
    return f"× {value} [{low}, {high}]"


def _plain_interval(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "–"
    return _interval(Estimate(found["value"], found.get("low", math.nan), found.get("high", math.nan), 0))


def _value(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, (str, int)):
        return str(value)
    if isinstance(value, Mapping):
        return _pairs(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return str(value)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{str(key).replace('_', ' ')} {_value(value)}" for key, value in values.items() if value not in (None, {}, [])
    )


def _cut(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else f"{text[:longest].rstrip()} …"


_PLAN = "PLAN"


def _emit(plan: EditPlan, target: str) -> str:
    revision = f" --revision {shlex.quote(plan.base.revision)}" if plan.base.revision else ""
    return f"steer2edit emit {_PLAN} {shlex.quote(plan.base.name)}{revision} --to {shlex.quote(target)} -o FOLDER"


# HTML.


class _Html(str):
    """Text that is HTML already; any other text is escaped where it enters a tag."""


def _text(value: object) -> str:
    if isinstance(value, _Html):
        return value
    # halves of surrogate pairs cannot be written, and control characters may not stand in HTML
    plain = "".join(c if c.isprintable() or c in "\n\t " else "\u00a0" if c.isspace() else "\ufffd" for c in str(value))
    return html.escape(plain)


def _tag(name: str, *children: object, **attributes: object) -> _Html:
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"' for key, value in attributes.items())
    return _Html(f"<{name}{given}>{''.join(map(_text, children))}</{name}>")


def _joined(*parts: object) -> _Html:
    return _Html(" ".join(_text(part) for part in parts if part != ""))


def _section(name: str, title: str, *children: _Html) -> _Html:
    if not any(children):
        return _Html("")
    return _Html(
        f"\n{_tag('section', _tag('h2', title, id=f'h-{name}'), *children, id=name, aria_labelledby=f'h-{name}')}"
    )


def _figures(drawings: Mapping[str, Drawing], *names: str) -> _Html:
    found = [drawings[name] for name in names if name in drawings]
    figures = [_tag("figure", _Html(one.svg()), _tag("figcaption", one.caption)) for one in found]
    return _tag("div", *figures, class_="figures") if figures else _Html("")


def _table(caption: str, heads: Sequence[object], rows: Sequence[Sequence[object]]) -> _Html:
    top = _tag("tr", *(_tag("th", head, scope="col") for head in heads))
    body = [_tag("tr", _tag("th", row[0], scope="row"), *(_tag("td", cell) for cell in row[1:])) for row in rows]
    table = _tag("table", _tag("caption", caption), _tag("thead", top), _tag("tbody", *body))
    # focusable, so that the keyboard can scroll it
    return _tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _facts(facts: Sequence[tuple[str, object]]) -> _Html:
    return _tag("dl", *(_tag("div", _tag("dt", key), _tag("dd", value)) for key, value in facts))


def _folded(title: str, content: _Html) -> _Html:
    return _tag("details", _tag("summary", title), content)


def _code(*lines: str) -> _Html:
    return _tag("pre", _tag("code", "\n".join(lines)), tabindex="0")


_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1b1b1f; --soft: #5b5b66; --line: #dcdce3; --box: #f5f5f8;
  --good: #14713d; --bad: #b3261e; --link: #1d5fae }
@media (prefers-color-scheme: dark) { :root { --bg: #111; --ink: #e8e8ec; --soft: #a6a6b2; --line: #34343c; --box: #1b1b20;
  --good: #6fce97; --bad: #ff9a90; --link: #8dbdf5 } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100% }
body { margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 2.5rem) 3rem; max-width: 68rem; background: var(--bg); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere }
h1, h2, h3, h4 { line-height: 1.25; text-wrap: balance }
h1 { font-size: clamp(1.5rem, 5vw, 2.1rem); margin: 0 0 .75rem; letter-spacing: -.01em }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 0 0 .6rem }
h4 { font-size: .8rem; margin: 0 0 .2rem; color: var(--soft); font-weight: 600 }
p, ul { margin: 0 0 .9rem; max-width: 46rem }
ul { padding-left: 1.2rem } li { margin-bottom: .4rem }
small { display: block; font-size: .78rem; font-weight: 400; color: var(--soft) }
.eyebrow, footer { color: var(--soft); font-size: .85rem; margin: 0 0 .4rem }
.verdict { font-size: 1.15rem; line-height: 1.5 }
.better { color: var(--good) } .worse { color: var(--bad) }
.figures { display: grid; gap: 1.5rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr));
  align-items: start; margin: 1rem 0 }
figure { margin: 0; max-width: 34rem; break-inside: avoid } figure svg { display: block; width: 100%; height: auto }
.figures > :only-child { max-width: 40rem }
figcaption, caption { font-size: .85rem; color: var(--soft); text-align: left }
figcaption { margin-top: .5rem } caption { padding: 0 0 .4rem; font-weight: 600 }
.scroll { overflow-x: auto; margin: 1rem 0; max-width: 100% }
.scroll:focus-visible, pre:focus-visible { outline: 2px solid var(--link) }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; line-height: 1.4 }
th, td { text-align: left; vertical-align: top; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; overflow-wrap: normal }
thead th { vertical-align: bottom } tbody th { font-weight: 600; white-space: normal; max-width: 15rem;
  overflow-wrap: anywhere; position: sticky; left: 0; background: var(--bg) }
#candidates tbody th { min-width: clamp(7.5rem, 16vw, 11rem) }
dl { margin: 1rem 0; font-size: .9rem }
dl div { display: grid; grid-template-columns: clamp(6.5rem, 30%, 13rem) minmax(0, 1fr); gap: .2rem 1rem; padding: .3rem 0;
  border-bottom: 1px solid var(--line) }
dt { color: var(--soft) } dd { margin: 0; font-variant-ligatures: none }
article { background: var(--box); border-radius: .5rem; padding: 1rem; margin: 0 0 1rem; break-inside: avoid }
.sides { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
.said { white-space: pre-wrap; margin-bottom: 0 } h3.said { margin-bottom: .6rem; text-wrap: wrap }
.sides .said { font-size: .95rem }
pre { background: var(--box); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.5 }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: normal }
details { margin: 1rem 0 } summary { cursor: pointer; color: var(--link) }
footer { margin: 3rem 0 0; padding-top: 1rem; border-top: 1px solid var(--line) }
@media print { body { max-width: none; padding: 0; font-size: 10pt } .scroll { overflow: visible } pre { white-space: pre-wrap }
  details::details-content { content-visibility: visible; block-size: auto } th, td { white-space: normal } }
"""
