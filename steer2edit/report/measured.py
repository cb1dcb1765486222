"""The sections of the page on measurements: candidates, answers, a study's selection, and limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steer2edit.bootstrap import DRAWS, LEAST_DRAWS, Estimate
from steer2edit.evaluation.comparison import Comparison, compared_rows, comparisons, direction
from steer2edit.evaluation.evaluate import Evaluation, Row
from steer2edit.evaluation.metrics import Metric
from steer2edit.formatting import cut, interval, pairs, plain_interval, plain_value
from steer2edit.plan import EditPlan
from steer2edit.plan.measured import KL_NAMES, is_kl
from steer2edit.report.differences import WORDS, losses, signed
from steer2edit.report.markup import Html, fact_list, folded, joined, table, tag
from steer2edit.report.tradeoff import chosen_row

_SHOWN = 6  # answers


def candidates(evaluation: Evaluation | None) -> list[Html]:
    """Every candidate's metrics, and their change against the base."""
    if evaluation is None:
        return []
    chosen = chosen_row(evaluation)
    heads = []
    for metric in evaluation.metrics:
        unit = f"{metric.unit}, " if metric.unit else ""
        count = _count(evaluation, metric)
        heads.append(joined(metric.name, tag("small", f"{unit}{metric.goal} is better, n = {count}")))
    rows: list[list[object]] = []
    lost: list[str] = []
    edits = compared_rows(evaluation)
    for row in evaluation.rows:
        note = "chosen edit" + (f", {row.note}" if row.note else "") if row is chosen else row.note
        broken = "; ".join(map(str, evaluation.damages(row)))
        mark = tag("small", tag("span", f"breaks {broken}", class_="worse")) if broken else ""
        name = joined(row.name, tag("small", note) if note else "", mark)
        rows.append([name, *(_cell(evaluation, row, metric) for metric in evaluation.metrics)])
        for one in comparisons(evaluation, row) if row in edits else []:
            beyond = joined("" if one.row is row else one.row.name, "beyond", one.against)
            rows.append([beyond, *(_difference(one, metric) for metric in evaluation.metrics)])
            lost += losses(evaluation, [one])
    sentences = [
        *lost,
        f"Each cell: the value with its 95 % interval, then the change against {evaluation.rows[0].name}, paired by question"
        + (" (a ratio for perplexity)" if any(m.exponential for m in evaluation.metrics) else "")
        + ". A change is called better or worse where its whole interval has one sign "
        f"and there are at least {LEAST_DRAWS} questions. A change without a "
        "word may be zero.",
        "A row that begins with beyond: the edit minus that baseline at equal cost, paired by question.",
    ]
    if tolerances := [f"{m.name} {plain_value(m.tolerance)}" for m in evaluation.metrics if m.tolerance is not None]:
        sentences.append(
            "A candidate breaks a metric where the whole interval of the change is worse by more than a tolerance: "
            f"{', '.join(tolerances)}."
        )
    shown = {key: str(value)[:12] if key == "fingerprint" else value for key, value in evaluation.context.items()}
    if context := pairs(shown):
        sentences.append(f"Measured on: {context}.")
    return [
        *(tag("p", one) for one in sentences),
        table("Every candidate on the same questions", ["candidate", *heads], rows),
    ]


def answers(evaluation: Evaluation | None) -> list[Html]:
    """Answers of the base and of the chosen edit. Answers that differ come first."""
    row = chosen_row(evaluation)
    if evaluation is None or row is None:
        return []
    base = evaluation.rows[0]
    asked = list(zip(evaluation.prompts, base.answers, row.answers, strict=False))
    if not asked:
        return []
    differ = [one for one in asked if one[1] != one[2]]
    shown = [*differ, *(one for one in asked if one[1] == one[2])][:_SHOWN]
    summary = f"{len(differ)} of {len(asked)} answers differ. " + (
        f"These are the first {min(len(differ), _SHOWN)} that do, in the order of the questions. They were not selected."
        if differ
        else "The first are shown."
    )
    if 0 < len(differ) < len(shown):
        summary += " The others are the same before and after."
    blocks = []
    for prompt, before, after in shown:
        sides = [(base.name, before), (row.name, after)] if before != after else [("both the same", before)]
        columns = [
            tag("div", tag("h4", name), tag("p", cut(answer, 700) or "(empty)", class_="said"))
            for name, answer in sides
        ]
        question = tag("h3", cut(prompt, 300), class_="said")
        blocks.append(tag("article", question, tag("div", *columns, class_="sides")))
    return [tag("p", summary), *blocks]


def selection(
    trials: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], evaluation: Evaluation | None
) -> list[Html]:
    """A study's trials: their number, the front, the knee, and the questions."""
    if not trials:
        return []
    states = [str(trial.get("state")) for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    front = [trial for trial in trials if trial.get("front")]
    sampler = f" by {settings['sampler']}" if settings.get("sampler") else ""
    seed = f", seed {settings['seed']}" if "seed" in settings else ""
    sentences = [
        f"{len(trials)} trials{sampler}{seed}: {counts}. {len(front)} are on the front: no other trial is at least as good in "
        "both and better in one."
    ]
    sentences += [
        f"Trial {trial['number']} is the knee: the point of the front that lies farthest over the straight line from the base "
        "to the front's strongest point, both axes scaled to that line."
        for trial in trials
        if trial.get("knee")
    ]
    sentences.append("These numbers are on the selection split. The best of many trials looks better there than it is.")
    split = None if evaluation is None else evaluation.context.get("split")
    if split == "report":
        sentences.append("The table of candidates is on other questions, the reporting split.")
    elif split == "select":
        sentences.append("The table of candidates is on the same questions: it is not an independent check.")
    parts = [tag("p", one) for one in sentences]
    if front:
        parts.append(_front(front, settings))
    rest = [(key, plain_value(value)) for key, value in settings.items() if key not in ("attribute", "utility")]
    if rest:
        parts.append(folded("Settings of the study", fact_list(rest)))
    return parts


def limits(plan: EditPlan, evaluation: Evaluation | None) -> list[Html]:
    """What the page does not show, and where its numbers do not hold."""
    sentences = []
    if evaluation is not None:
        counts = ", ".join(f"{m.name} {_count(evaluation, m)}" for m in evaluation.metrics)
        sentences.append(
            f"Intervals are 95 % bootstraps ({DRAWS} draws) over questions, over the base's answers or over windows of prose: "
            f"{counts}. They say how far another sample of the same kind of questions would move the numbers. They say nothing "
            "about other questions."
        )
        if split := evaluation.context.get("split"):
            sentences.append(f"Everything in the table of candidates is on the {split} split.")
        sentences += [evaluation.decoding] if evaluation.decoding else []
        comparisons = (len(evaluation.rows) - 1) * len(evaluation.metrics)
        if comparisons > 1:
            sentences.append(
                f"The table holds {comparisons} comparisons with the base and corrects for none of them. Where nothing changed, "
                "about one interval in twenty says that something did."
            )
    else:
        sentences.append(
            "The behaviour was not measured. Nothing on this page shows that the edit has the wanted effect."
        )
    if plan.measured.costs.keys() == {"prose"}:
        sentences.append(
            "KL is measured on neutral prose. It is not the cost on other text: where questions are answered the same edit can "
            "cost several times as much."
        )
    elif plan.measured.costs:
        sentences.append(
            f"{KL_NAMES['answers' if 'answers' in plan.measured.costs else 'chat']} is measured on the base's own answers to "
            "everyday prompts, KL on prose on running English text. Neither is the cost on other text, such as long chats or "
            "another language."
        )
    if any(site.interval is not None for site in plan.scores.values()):
        sentences.append("Intervals of g are over resampled contrast examples, component by component.")
    if any(site.null is not None for site in plan.scores.values()):
        sentences.append("The scores under shuffled labels come from one random shuffle.")
    sentences.append("An edit shifts tendencies and guarantees nothing. Measure it on prompts of your own.")
    return [tag("ul", *(tag("li", one) for one in sentences))]


def _count(evaluation: Evaluation, metric: Metric) -> int:
    return max((len(r.samples[metric.name].values) for r in evaluation.rows if metric.name in r.samples), default=0)


def _cell(evaluation: Evaluation, row: Row, metric: Metric) -> str:
    if metric.name not in row.samples:
        return "–"
    estimate = interval(evaluation.estimate(row, metric.name))
    # the base's own divergence is 0: the change would say the same again
    if row is evaluation.rows[0] or is_kl(metric.name):
        return estimate
    return joined(estimate, tag("small", _worded(metric, evaluation.change(row, metric.name))))


def _difference(comparison: Comparison, metric: Metric) -> str:
    change = comparison.changes.get(metric.name)
    return "–" if change is None else tag("small", _worded(metric, change))


def _worded(metric: Metric, change: Estimate) -> str:
    word = WORDS[direction(metric, change)]
    return joined(signed(metric, change), tag("span", word, class_=word) if word else "")


def _front(front: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Html:
    objectives = {role: settings.get(role) or {} for role in ("attribute", "utility")}
    names = {role: str(objective.get("name", role)) for role, objective in objectives.items()}
    heads = [
        joined(names[role], tag("small", f"{objective['goal']} is better") if objective.get("goal") else "")
        for role, objective in objectives.items()
    ]
    apart = not is_kl(names["utility"])
    others = [name for name in KL_NAMES.values() if any(name in (one.get("checks") or {}) for one in front)]
    rows: list[list[object]] = []
    for trial in front:
        name = joined(trial["number"], tag("small", "the knee") if trial.get("knee") else "")
        kl = [plain_value(trial.get("kl"))] if apart else []
        kl += [plain_value((trial.get("checks") or {}).get(one)) for one in others]
        estimates = [plain_interval(trial.get(role)) for role in names]
        rows.append([name, *estimates, *kl, pairs(trial.get("params") or {})])
    columns = ["trial", *heads, *(["KL"] if apart else []), *others, "parameters"]
    return table("The front, on the selection split", columns, rows)
